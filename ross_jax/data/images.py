"""Pictures: from the bytes of a file to the square uint8 array that the model is fed.

`decode` turns bytes into an RGB picture, `preprocess` resizes it as the vision encoder's Hugging Face processor does,
and `normalise` is the arithmetic that training leaves to the device. The three together equal the reference
(`process_images` of LLaVA-1.5 with CLIPImageProcessor or SiglipImageProcessor) bit for bit.
"""

import contextlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from ross_jax.config import ConfigError, UserError, from_dict

# Pillow refuses a file beyond this by itself. The same limit holds here for what a picture becomes on the way (the
# padded square, the picture before its centre crop): a 1 x 100000 file is small, its padded square is not.
MAX_PIXELS = 178_956_970

_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")


class ImageError(UserError):
    """A picture that cannot be used. Names the file."""


@dataclass(frozen=True)
class ImageConfig:
    """What a vision encoder's `preprocessor_config.json` says, and how a picture becomes square.

    Attributes:
      size: side of the result in pixels.
      mean, std: per channel, of values in [0, 1].
      mode: `pad` puts the picture in the middle of a square of the mean colour first (LLaVA's `expand2square`);
        `square` is the processor alone: SigLIP's squashes, CLIP's scales the shorter side and crops the centre;
        `crop` scales the shorter side and crops the centre for every processor.
      shortest_edge: length to which the processor scales the shorter side before its centre crop; None: it squashes.
      resample: Pillow's resampling filter by number (3 = bicubic).
      rescale_factor: what a uint8 value is multiplied by before the mean is taken off.
    """

    size: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    mode: Literal["pad", "square", "crop"] = "pad"
    shortest_edge: int | None = None
    resample: int = 3
    rescale_factor: float = 1 / 255

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size is {self.size}; a picture needs at least 1 pixel")
        if self.shortest_edge is not None and self.shortest_edge < self.size:
            raise ValueError(f"shortest_edge {self.shortest_edge} is below size {self.size}: nothing to crop from")
        if min(self.std) <= 0:
            raise ValueError(f"std {self.std} must be positive")
        if self.resample not in set(Image.Resampling):
            raise ValueError(f"resample {self.resample} is none of Pillow's filters {[*map(int, Image.Resampling)]}")


Mode = Literal["pad", "square", "crop"]
Colour = tuple[float, float, float]


def encoder_image_config(kind: str, size: int, mean: Colour, std: Colour, mode: Mode) -> ImageConfig:
    """How pictures are resized for a `siglip` or `clip` encoder; CLIP's scales the shorter side to its size."""
    return ImageConfig(size, mean, std, mode, size if kind == "clip" else None)


def read_image_config(processor: Mapping[str, Any] | str | Path, mode: str = "pad") -> ImageConfig:
    """`ImageConfig` of a CLIPImageProcessor or SiglipImageProcessor.

    Args:
      processor: the content of a `preprocessor_config.json`, its path, or the path of the folder that holds it.
      mode: see `ImageConfig`.

    Raises:
      ConfigError: the file is missing, is no JSON, lacks a field, or leaves out a step that is always done here.
    """
    name = "preprocessor_config.json"
    if not isinstance(processor, Mapping):
        path = Path(processor)
        path = path / name if path.is_dir() else path
        name = str(path)
        try:
            processor = json.loads(path.read_text())
        except OSError as error:
            raise ConfigError(f"{name}: cannot be read ({error.strerror}); give the vision encoder's folder") from error
        except ValueError as error:
            raise ConfigError(f"{name}: is no JSON: {error}") from error
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if not processor.get(step, True):
            raise ConfigError(f"{name}: {step} is false; only processors that resize, rescale and normalise are known")
    size, crop = processor.get("size"), processor.get("crop_size")
    # The oldest CLIP files hold plain integers: the shorter side and the crop.
    if isinstance(size, int):
        size = {"shortest_edge": size} if processor.get("do_center_crop") else {"height": size, "width": size}
    if isinstance(crop, int):
        crop = {"height": crop, "width": crop}
    if not isinstance(size, Mapping) or not ("shortest_edge" in size or {"height", "width"} <= set(size)):
        raise ConfigError(f"{name}: size is {size!r}; expected shortest_edge, or height and width")
    shortest_edge = size.get("shortest_edge")
    target = (crop or {"height": shortest_edge, "width": shortest_edge}) if shortest_edge else size
    if target.get("height") != target.get("width"):
        raise ConfigError(f"{name}: {dict(target)} is no square; only square inputs are known")
    for field in ("image_mean", "image_std"):
        if field not in processor:
            raise ConfigError(f"{name}: {field} is missing")
    values = {
        "size": target["height"],
        "mean": processor["image_mean"],
        "std": processor["image_std"],
        "mode": mode,
        "shortest_edge": shortest_edge,
        "resample": processor.get("resample", 3),
        "rescale_factor": processor.get("rescale_factor", 1 / 255),
    }
    return from_dict(ImageConfig, values, name)


def decode(data: bytes | np.ndarray, name: str) -> Image.Image:
    """The picture in `data` as RGB, turned upright.

    Transparency is dropped and the colour below it kept, as in the reference, whose processors saw such pictures;
    16-bit grey is scaled to 8 bits; of an animation the first frame is taken.

    Args:
      data: the bytes of a file in any format that Pillow reads, or a uint8 array [H, W], [H, W, 1 | 3 | 4].
      name: of the file, for errors.

    Raises:
      ImageError: no picture, truncated, larger than `MAX_PIXELS`, or of 32-bit samples, whose white is undefined.
    """
    with _refusing_broken(name):
        image = ImageOps.exif_transpose(_open(data))
        if image.mode in _SIXTEEN_BIT:
            wide = np.asarray(image).astype(np.uint32)
            return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
        if image.mode in ("I", "F"):
            raise ImageError(f"{name}: 32-bit samples (mode {image.mode}) of unknown range; save it in 8 or 16 bits")
        return image.convert("RGB")


def decode_official(data: bytes | np.ndarray, name: str) -> Image.Image:
    """As `decode`, but like the reference's `Image.open(...).convert("RGB")`.

    It ignores the EXIF orientation, and whatever Pillow makes of 16- and 32-bit samples (it clips them) is kept.
    """
    with _refusing_broken(name):
        return _open(data).convert("RGB")


def _open(data: bytes | np.ndarray) -> Image.Image:
    if isinstance(data, np.ndarray):
        return Image.fromarray(data[..., 0] if data.ndim == 3 and data.shape[-1] == 1 else data)
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


@contextlib.contextmanager
def _refusing_broken(name: str) -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"{name}: empty, or no picture that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: more than {MAX_PIXELS} pixels (a decompression bomb?); scale it down") from error
    except Exception as error:  # a broken file makes decoders raise anything, from SyntaxError to struct.error
        raise ImageError(f"{name}: broken picture: {error}") from error


def preprocess(image: Image.Image, config: ImageConfig, name: str = "picture") -> np.ndarray:
    """Resizes an RGB picture as `config.mode` says; see `ImageConfig`.

    Returns:
      uint8 [size, size, 3].

    Raises:
      ImageError: the aspect ratio is so extreme that the intermediate picture would exceed `MAX_PIXELS`.
    """
    shortest_edge = config.shortest_edge
    if config.mode == "pad":
        image = _expand_to_square(image, config.mean, name)
    elif config.mode == "crop" and shortest_edge is None:
        shortest_edge = config.size
    resample = Image.Resampling(config.resample)
    if shortest_edge is None:
        return np.asarray(image.resize((config.size, config.size), resample))
    width, height = image.size
    longest_edge = int(shortest_edge * max(width, height) / min(width, height))
    _check_area(shortest_edge * longest_edge, image, name)
    width, height = (shortest_edge, longest_edge) if width <= height else (longest_edge, shortest_edge)
    left, top = (width - config.size) // 2, (height - config.size) // 2
    resized = np.asarray(image.resize((width, height), resample))
    return np.ascontiguousarray(resized[top : top + config.size, left : left + config.size])


def _expand_to_square(image: Image.Image, mean: tuple[float, float, float], name: str) -> Image.Image:
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    _check_area(side * side, image, name)
    square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in mean))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _check_area(pixels: int, image: Image.Image, name: str) -> None:
    if pixels > MAX_PIXELS:
        width, height = image.size
        raise ImageError(f"{name}: {width} x {height} would become {pixels} pixels on the way; crop or scale it")


def normalise(pixels: np.ndarray, config: ImageConfig) -> np.ndarray:
    """What the processor does after resizing: rescale in float64, round to float32, then (x - mean) / std in float32.

    Args:
      pixels: uint8 [..., H, W, 3].

    Returns:
      float32 [..., H, W, 3].
    """
    scaled = (pixels * np.float64(config.rescale_factor)).astype(np.float32)
    return (scaled - np.asarray(config.mean, np.float32)) / np.asarray(config.std, np.float32)
