"""Image files without their metadata, for files whose pixels are sound and whose metadata are not."""

import struct
import zlib
from collections.abc import Iterator

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_JPEG_KEPT = (0xEE,)  # APP14, which says how colours are stored
_JPEG_SCAN = 0xDA  # pixels follow


def without_metadata(data: bytes) -> bytes | None:
    """A PNG or JPEG file that holds the same pixels and nothing else. None for other formats and unsound files.

    Orientation is metadata, too. A PNG keeps it if its checksum is right.
    """
    try:
        if data.startswith(_PNG):
            return _PNG + b"".join(_png_chunks(data))
        if data.startswith(b"\xff\xd8"):
            return b"\xff\xd8" + b"".join(_jpeg_segments(data))
    except (struct.error, IndexError):
        pass
    return None


def _png_chunks(data: bytes) -> Iterator[bytes]:
    start = len(_PNG)
    while start < len(data):
        size, kind = struct.unpack_from(">I4s", data, start)
        content, checksum = data[start + 4 : start + 8 + size], data[start + 8 + size : start + 12 + size]
        sound_exif = kind == b"eXIf" and struct.pack(">I", zlib.crc32(content)) == checksum
        if kind in _PNG_KEPT or sound_exif:
            yield data[start : start + 12 + size]
        start += 12 + size


def _jpeg_segments(data: bytes) -> Iterator[bytes]:
    start = 2
    while (marker := data[start + 1]) != _JPEG_SCAN:
        if marker == 0xFF:  # padding
            start += 1
            continue
        (size,) = struct.unpack_from(">H", data, start + 2)
        is_metadata = 0xE0 <= marker <= 0xEF or marker == 0xFE
        if not is_metadata or (marker in _JPEG_KEPT and size >= 14):
            yield data[start : start + 2 + size]
        start += 2 + size
    yield data[start:]
