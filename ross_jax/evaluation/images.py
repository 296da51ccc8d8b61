"""Scores of images against their originals, and labelled grids of images."""

from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped, UInt8
from PIL import Image, ImageDraw, ImageFont

from ross_jax.config import UserError
from ross_jax.storage import location

_GAP = 4
_LABEL_HEIGHT = 14


def to_uint8(pixels: Float[Array | np.ndarray, "items height width 3"]) -> UInt8[np.ndarray, "items height width 3"]:
    """Maps images from [-1, 1] to uint8; values outside are clipped."""
    return np.asarray(jnp.round((jnp.clip(pixels, -1.0, 1.0) + 1.0) * 127.5)).astype(np.uint8)


def psnr(
    images: Shaped[np.ndarray, "items height width 3"], originals: Shaped[np.ndarray, "items height width 3"]
) -> Float[np.ndarray, " items"]:
    """Peak signal-to-noise ratio of each image, in dB; infinite for equal images. Values range from 0 to 255."""
    error = np.mean(np.square(images.astype(np.float64) - originals.astype(np.float64)), axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255.0**2 / error)


def is_nearest(
    images: Shaped[np.ndarray, "items height width 3"], originals: Shaped[np.ndarray, "items height width 3"]
) -> Bool[np.ndarray, " items"]:
    """Whether each image is nearer, in mean squared error, to its own original than to all others."""
    flat = images.reshape(len(images), -1).astype(np.float64)
    others = originals.reshape(len(originals), -1).astype(np.float64)
    distances = np.square(flat).sum(1)[:, None] - 2 * flat @ others.T + np.square(others).sum(1)
    return np.argmin(distances, axis=1) == np.arange(len(images))


def ssim(
    images: UInt8[np.ndarray, "items height width 3"], originals: UInt8[np.ndarray, "items height width 3"]
) -> Float[np.ndarray, " items"]:
    """Structural similarity of each image (Wang et al., 2004); 1 for equal images.

    Raises:
      UserError: scikit-image is not installed.
    """
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise UserError("SSIM: scikit-image is not installed; run `pip install -e '.[demo]'`") from error
    pairs = zip(images, originals, strict=True)
    return np.array([structural_similarity(a, b, channel_axis=-1, data_range=255) for a, b in pairs])


def draw_grid(path: str | Path, columns: Mapping[str, UInt8[np.ndarray, "items height width 3"]], scale: int = 2):
    """Writes a PNG grid with one labelled column per entry and one image per row.

    Args:
      path: file to write.
      columns: label -> images. All columns have the same shape.
      scale: side of a square in the PNG that shows one pixel of an image.

    Raises:
      UserError: the columns differ in shape.
    """
    shapes = {images.shape for images in columns.values()}
    if len(shapes) != 1:
        raise UserError(f"columns of a grid must have one shape, found {sorted(shapes)}")
    items, height, width, _ = shapes.pop()
    font = ImageFont.load_default()
    cell = max(width * scale, *(int(font.getlength(label)) + 1 for label in columns)) + _GAP
    row = height * scale + _GAP
    grid = Image.new("RGB", (_GAP + cell * len(columns), _LABEL_HEIGHT + _GAP + row * items), "white")
    draw = ImageDraw.Draw(grid)
    for j, (label, images) in enumerate(columns.items()):
        left = _GAP + cell * j
        draw.text((left, 1), label, fill="black", font=font)
        for i, pixels in enumerate(images):
            image = Image.fromarray(pixels).resize((width * scale, height * scale), Image.Resampling.NEAREST)
            grid.paste(image, (left, _LABEL_HEIGHT + _GAP + row * i))
    with location(path).open("wb") as file:
        grid.save(file, "PNG")
