"""Images of other programs: sound pixels in files whose metadata are not."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from ross_jax.data.images import decode

LYING, UPRIGHT = (60, 40), (40, 60)  # width and height as stored, and after a turn by 90 degrees


def metadata(*tags: tuple[int, int, int, int]) -> bytes:
    """EXIF: orientation 6 (the camera was turned by 90 degrees), then `tags` (tag, type, count, value or offset)."""
    tags = ((0x0112, 3, 1, 6), *tags)
    directory = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + directory + bytes(4)


def negative_altitude() -> bytes:
    """GPSAltitude -5/1 in a GPS directory that begins at byte 38. EXIF's altitudes are unsigned."""
    gps = struct.pack("<HHHIII", 1, 0x0006, 10, 1, 56, 0)
    return metadata((0x8825, 4, 1, 38)) + gps + struct.pack("<iI", -5, 1)


def image_file(kind: str, exif: bytes) -> bytes:
    """A file whose image is red on the left and blue on the right, as stored."""
    pixels = np.zeros((LYING[1], LYING[0], 3), np.uint8)
    pixels[:, :30, 0] = pixels[:, 30:, 2] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, exif=b"Exif\0\0" + exif, lossless=True)
    return buffer.getvalue()


EXIF = {
    "no TIFF": (b"not a TIFF", LYING),
    "cut short": (metadata()[:20], LYING),
    "altitude below zero": (negative_altitude(), UPRIGHT),
    "resolution as a byte": (metadata((0x011A, 1, 1, 72)), UPRIGHT),
    "header twice": (b"Exif\0\0" + metadata(), UPRIGHT),
}
"""Name -> (metadata, size of the image as it is meant to be seen)."""


@pytest.mark.parametrize(
    ("kind", "exif", "size"),
    [
        pytest.param(kind, *values, id=f"{kind}, {name}")
        for kind in ("PNG", "WEBP", "JPEG")
        for name, values in EXIF.items()
    ],
)
def test_broken_exif_costs_no_image(kind, exif, size):
    """A user's images come from cameras and editors that write broken EXIF; every viewer shows them."""
    image = decode(image_file(kind, exif), "a file")
    assert image.size == size
    red, blue = image.getpixel((0, 0)), image.getpixel((size[0] - 1, size[1] - 1))
    assert red[0] > 200 > 50 > red[2] and blue[2] > 200 > 50 > blue[0]
