"""Images of records: named files in folders and archives, or bytes inside the record.

"coco/1.jpg"                     a file, found in one of several stores
"data:image/png;base64,iVBO..."  the image itself; also without what stands before the comma
b"\\xff\\xd8..."                   the image itself
{"bytes": ..., "path": ...}      the image itself if there are bytes, or else a file
"""

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ross_jax.config import UserError, brief
from ross_jax.data.archives import ImageStore, open_store
from ross_jax.data.images import ImageError
from ross_jax.data.ranges import NO_CACHES, Caches, file_mode
from ross_jax.data.samples import LazyImage
from ross_jax.data.spelling import briefly

_LONGEST_NAME = 255
_URL_SAFE = str.maketrans("-_", "+/")
_BASE64 = re.compile(r"[A-Za-z0-9+/=_\s-]+")
_BUCKET = re.compile(r"(?:([^=]*)=)?([A-Za-z][A-Za-z0-9+.-]*://.*)", re.DOTALL)
_BEGINNINGS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0A", "AAAA")
"""Base64 of the first bytes of JPEG, PNG, GIF, WebP, BMP, TIFF (two orders of bytes), and AVIF or JPEG 2000."""


def decode_base64(text: str) -> bytes:
    """Bytes of base64 text, in a `data:` address or alone.

    Raises:
      ImageError: it is no base64.
    """
    content = text.partition("base64,")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode("".join(content.split()).translate(_URL_SAFE), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"is no base64: {error}") from error


def image_value(value: Any) -> bytes | str | None:
    """What a record has as an image: its bytes, its base64 text or its file's name; None if it is no image."""
    if isinstance(value, Mapping):
        return next(filter(None, (image_value(value.get(name)) for name in ("bytes", "path", "url"))), None)
    return value if isinstance(value, bytes | str) and value else None


def _is_inline(text: str) -> bool:
    if text.startswith("data:"):
        return True
    return len(text) > _LONGEST_NAME and text.startswith(_BEGINNINGS) and _BASE64.fullmatch(text) is not None


def split_mount(place: str) -> tuple[str, str]:
    """The prefix and the path of an entry of `SourceConfig.images`: `coco=gs://bucket/coco.zip`. May have no prefix."""
    if match := _BUCKET.fullmatch(place):
        return match[1] or "", match[2]
    prefix, _, path = ("", "", place) if file_mode(place) else place.rpartition("=")
    return prefix, path


class Mounts:
    """Several stores of images with one name space; see `SourceConfig.images`.

    Raises:
      UserError: a folder or archive cannot be read.
    """

    def __init__(self, places: Sequence[str], max_bytes: int, caches: Caches = NO_CACHES):
        self._max_bytes = max_bytes
        self._stores: list[tuple[str, ImageStore]] = []
        for place in places:
            prefix, path = split_mount(place)
            self._stores.append((prefix.rstrip("/") + "/" if prefix else "", open_store(path, max_bytes, caches)))

    def image(self, value: Any, number: int) -> LazyImage:
        """A record's image.

        Args:
          value: as the record has it.
          number: of the image in the record, which names an image without a file.

        Raises:
          ImageError: it is neither a name nor an image.
        """
        found = image_value(value)
        if found is None:
            raise ImageError(
                f"an image must be a file name, base64, bytes or an object with 'bytes' or 'path', found {brief(value)}"
            )
        if isinstance(found, str) and not _is_inline(found):
            return LazyImage(briefly(found), lambda: self._read(found))
        name = f"image {number}"
        return LazyImage(name, lambda: self._inline(name, found))

    def _inline(self, name: str, found: bytes | str) -> bytes:
        try:
            data = found if isinstance(found, bytes) else decode_base64(found)
        except ImageError as error:
            raise ImageError(f"{name}: {error}") from error
        if len(data) > self._max_bytes:
            raise ImageError(
                f"{name}: has more than {self._max_bytes} bytes; scale it down, or raise data.max_image_bytes"
            )
        return data

    def _read(self, name: str) -> bytes:
        if name.startswith(("http://", "https://", "s3://", "gs://")):
            raise ImageError(
                f"{briefly(name)}: is an address, not a file's name; download the image, and name its file"
            )
        if not self._stores:
            raise UserError(
                f"{briefly(name)}: the data has images, but no image folder is set; give the source its 'images'"
            )
        for prefix, store in self._stores:
            inside = name.removeprefix(prefix)
            if name.startswith(prefix) and inside in store:
                return store.read(inside)
        stores = ", ".join(prefix + store.path for prefix, store in self._stores)
        raise ImageError(f"{briefly(name)}: no such image in {stores}")
