"""Images: from the bytes of a file to the square uint8 array that a batch holds.

    bytes ─ decode ─► RGB image ─ preprocess ─► uint8[size, size, 3] ─ models.ross.normalise ─► encoder's input
                      host                                             device

`preprocess` resizes as the vision encoder's Hugging Face processor does. Its pixels equal the reference
(`process_images` of LLaVA-1.5 with CLIPImageProcessor or SiglipImageProcessor) bit for bit.
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import ExifTags, Image

from ross_jax.config import UserError
from ross_jax.data.formats import foreign_format
from ross_jax.data.metadata import without_metadata

MAX_PIXELS = 178_956_970
"""Most pixels of a file, which is Pillow's own limit, and of the intermediate images that `preprocess` makes. A file of
1 x 100000 pixels is small, but the square around it has 10^10."""

MAX_MEMORY = 2**30
"""Most bytes that decoding and preprocessing of one image may take. Each thread or process that reads may need them."""
_DECODER_MEMORY = {"AVIF": 2.0, "JPEG2000": 5.5, "WEBP": 4.5, "TIFF": 2.0}
_DECODER_MEMORY |= dict.fromkeys(("BMP", "DIB", "GIF", "JPEG", "MPO", "PNG", "PPM", "TGA"), 0.0)
"""Format -> bytes of each pixel and channel that its decoder needs beside the image. Others are taken to need 1."""
_SAMPLE_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16L": 2, "I;16B": 2, "I;16N": 2}
"""Mode of an image -> bytes that Pillow stores for a pixel. All other modes have 4."""
_STRIP = 2**22  # pixels that are converted at once

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what turns the image upright."""

_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")

Mode = Literal["pad", "square", "crop"]
Colour = tuple[float, float, float]
Decoder = Callable[[bytes | np.ndarray, str], Image.Image]
"""(bytes of a file or pixels, its name) -> RGB image."""


class ImageError(UserError):
    """An image that cannot be used. The text names the file."""


@dataclass(frozen=True)
class ImageConfig:
    """How an image becomes the square input of a vision encoder.

    Attributes:
      size: side of the square in pixels.
      mean, std: normalisation of each channel, for values in [0, 1]. `pad` fills with the mean.
      mode: `pad` first centres the image on a square of the mean colour (LLaVA's `expand2square`), `square` leaves the
        shape to the encoder's processor, and `crop` scales the shorter side to `size` and crops the centre.
      shortest_edge: length in pixels to which the processor scales the shorter side before it crops the centre (CLIP).
        None: it squashes the image to a square (SigLIP).
      resample: number of Pillow's resampling filter; 3 is bicubic.
    """

    size: int
    mean: Colour = (0.5, 0.5, 0.5)
    std: Colour = (0.5, 0.5, 0.5)
    mode: Mode = "pad"
    shortest_edge: int | None = None
    resample: int = 3

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size is {self.size}; an image needs at least 1 pixel")
        if self.shortest_edge is not None and self.shortest_edge < self.size:
            raise ValueError(f"shortest_edge {self.shortest_edge} is below size {self.size}: nothing to crop from")
        if min(self.std) <= 0:
            raise ValueError(f"std {self.std} must be positive")
        if self.resample not in set(Image.Resampling):
            raise ValueError(f"resample {self.resample} is none of Pillow's filters {[*map(int, Image.Resampling)]}")


def encoder_image_config(kind: str, size: int, mean: Colour, std: Colour, mode: Mode, resample: int = 3) -> ImageConfig:
    """`ImageConfig` for a vision encoder of `models.vision`: CLIP's processor crops, the others' squash."""
    return ImageConfig(size, mean, std, mode, size if kind == "clip" else None, resample)


def decode(data: bytes | np.ndarray | Image.Image, name: str) -> Image.Image:
    """The image in `data`, in RGB and turned upright by its EXIF orientation.

    Transparency is dropped and the colour below it kept, as in the reference. 16-bit grey is scaled to 8 bits. An
    animation gives its first frame. Metadata that cannot be read are ignored.

    Args:
      data: bytes of a file in any format that Pillow reads, a uint8 array [H, W] or [H, W, 1 | 3 | 4], or
        an image that Pillow has opened.
      name: file name for errors.

    Raises:
      ImageError: no image, truncated, more than `MAX_PIXELS` or `MAX_MEMORY`, 32-bit samples, whose white is undefined,
        or PostScript, which is a program.
    """
    with _refusing_broken(name, data):
        image = _turn_upright(_open(data))
        if image.mode in _SIXTEEN_BIT:
            return _from_sixteen_bit(image)
        if image.mode in ("I", "F"):
            raise ImageError(f"32-bit samples (mode {image.mode}) of unknown range; save it in 8 or 16 bits")
        return image if image.mode == "RGB" else image.convert("RGB")


def _from_sixteen_bit(image: Image.Image) -> Image.Image:
    """A 16-bit grey image in RGB, converted in strips: NumPy's intermediate arrays take four times the memory."""
    result, rows = Image.new("RGB", image.size), max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = np.asarray(image.crop((0, top, image.width, min(top + rows, image.height)))).astype(np.uint32)
        result.paste(Image.fromarray(((strip + 128) // 257).astype(np.uint8)), (0, top))
    return result


def decode_official(data: bytes | np.ndarray, name: str) -> Image.Image:
    """The image in `data`, decoded as by the reference's `Image.open(...).convert("RGB")`.

    The EXIF orientation is ignored, and Pillow clips 16- and 32-bit samples. Arguments and errors are those of
    `decode`.
    """
    with _refusing_broken(name, data):
        return _open(data).convert("RGB")


def _open(data: bytes | np.ndarray | Image.Image) -> Image.Image:
    if isinstance(data, Image.Image):
        return data
    if isinstance(data, np.ndarray):
        return Image.fromarray(data[..., 0] if data.ndim == 3 and data.shape[-1] == 1 else data)
    try:
        return _load(data)
    except (Image.DecompressionBombError, ImageError):
        raise
    except Exception:  # see `_refusing_broken`
        pixels = without_metadata(data)
        if pixels is None:
            raise
        return _load(pixels)


def _load(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    if image.format == "EPS":
        raise ImageError("is PostScript, which is a program; save it as PNG")
    channels = len(image.getbands())
    decoder = 2.0 if image.info.get("progressive") else _DECODER_MEMORY.get(image.format or "", 1.0)
    _check_memory(image.size, _stored(image) + channels * decoder)
    image.load()
    _check_memory(image.size, _stored(image) + (4 if image.mode != "RGB" else 0))  # an icon has another size now
    return image


def _stored(image: Image.Image) -> int:
    return _SAMPLE_BYTES.get(image.mode, 4)


def _check_memory(size: tuple[int, int], per_pixel: int | float) -> None:
    width, height = size
    if (needed := int(width * height * per_pixel)) > MAX_MEMORY:
        raise ImageError(f"{width} x {height} pixels need {needed} bytes of memory, not {MAX_MEMORY}; scale it down")


def _turn_upright(image: Image.Image) -> Image.Image:
    """The image, turned by its EXIF orientation if that can be read."""
    try:
        turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow raises anything for broken EXIF, from SyntaxError to struct.error
        return image
    if turn is None:
        return image
    _check_memory(image.size, 2 * _stored(image))
    return image.transpose(turn)


@contextlib.contextmanager
def _refusing_broken(name: str, data: bytes | np.ndarray | Image.Image) -> Iterator[None]:
    try:
        yield
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error
    except Image.UnidentifiedImageError as error:
        found = foreign_format(data) if isinstance(data, bytes) else None
        raise ImageError(f"{name}: {found or 'empty, or no image that Pillow can read'}") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: more than {MAX_PIXELS} pixels (a decompression bomb?); scale it down") from error
    except Exception as error:  # decoders raise anything for a broken file, from SyntaxError to struct.error
        raise ImageError(f"{name}: broken image: {error}") from error


def preprocess(image: Image.Image, config: ImageConfig, name: str = "image") -> np.ndarray:
    """Resizes an RGB image as `config.mode` says.

    Args:
      name: file name for errors.

    Returns:
      uint8[size, size, 3].

    Raises:
      ImageError: an intermediate image would exceed `MAX_PIXELS` or `MAX_MEMORY`, because the aspect ratio is extreme.
    """
    resample = Image.Resampling(config.resample)
    shortest_edge = config.shortest_edge
    if config.mode == "crop" and shortest_edge is None:
        shortest_edge = config.size
    if config.mode == "pad":
        resized = _resize_padded(image, shortest_edge or config.size, config, name)
    elif shortest_edge is None:
        resized = image.resize((config.size, config.size), resample)
    else:
        width, height = image.size
        longest_edge = int(shortest_edge * max(width, height) / min(width, height))
        _check_area(shortest_edge * longest_edge, image, name)
        size = (shortest_edge, longest_edge) if width <= height else (longest_edge, shortest_edge)
        resized = image.resize(size, resample)
    left, top = (resized.width - config.size) // 2, (resized.height - config.size) // 2
    return np.asarray(resized.crop((left, top, left + config.size, top + config.size)))


def _resize_padded(image: Image.Image, size: int, config: ImageConfig, name: str) -> Image.Image:
    """The image, centred on a square of the mean colour and resized to `size`.

    Pillow resizes rows, then columns. Rows of one colour stay as they are, so a wide image is padded in between.
    """
    width, height = image.size
    side, resample = max(width, height), Image.Resampling(config.resample)
    _check_area(side * side, image, name)
    columns = side
    if width > height:
        columns, image = size, image.resize((size, height), resample)
    padded = Image.new("RGB", (columns, side), tuple(int(value * 255) for value in config.mean))
    padded.paste(image, ((columns - image.width) // 2, (side - height) // 2))
    return padded.resize((size, size), resample)


def _check_area(pixels: int, image: Image.Image, name: str) -> None:
    width, height = image.size
    if pixels > MAX_PIXELS or 4 * (width * height + pixels) > MAX_MEMORY:
        raise ImageError(f"{name}: {width} x {height} would become {pixels} pixels in between; crop or scale it")
