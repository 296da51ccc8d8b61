"""Stores of images: a folder, a zip file or a tar file. Each is read at random and never unpacked.

Stores are safe in worker processes. No open file is pickled, and a forked process never shares a file position.
`spelling.py` finds names that a record spells in another way than the store.
"""

import bz2
import copy
import io
import os
import posixpath
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from ross_jax.config import UserError, required
from ross_jax.data.formats import foreign_format
from ross_jax.data.images import ImageError
from ross_jax.data.members import Index, clean, link_target
from ross_jax.data.ranges import NO_CACHES, BucketRange, Caches, ChangedError, FileRange, Ranges, file_mode, open_range
from ross_jax.data.spelling import briefly, spellings
from ross_jax.storage import Status, StorageError, is_remote, location

T = TypeVar("T")

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif"}
_MAX_TARGET = 4096  # bytes of a link's target, as in Linux
MAX_IMAGE_BYTES = 64 * 2**20
"""Most bytes of an image file, by default."""
_MAX_HEADER = 30 + 2 * 2**16 + 24  # bytes around the content of a zip's member: header, name, extra field, descriptor
_PIECE = 4096  # compressed bytes of a zip's member that are decompressed at once, into up to 30 MB


@runtime_checkable
class ImageStore(Protocol):
    """Images by name. Names are relative and use forward slashes."""

    path: str

    def names(self) -> list[str]:
        """Names of all files with the suffix of an image format, sorted. Hidden files and folders are left out."""
        ...

    def __contains__(self, name: str) -> bool: ...

    def read(self, name: str) -> bytes:
        """The bytes of the file `name`, which is in the store.

        Raises:
          ImageError: it cannot be read.
        """
        ...


def open_store(path: str | Path, max_bytes: int = MAX_IMAGE_BYTES, caches: Caches = NO_CACHES) -> ImageStore:
    """Opens a folder, a .zip or an uncompressed .tar, of this machine or in a bucket.

    Args:
      max_bytes: most bytes of an image file; larger ones are not read, whatever an archive says of their size.
      caches: what is kept of buckets.

    Raises:
      UserError: the path does not exist, or it is no folder and no archive that can be read at random.
    """
    mode = file_mode(path)
    if stat.S_ISDIR(mode):
        return BucketFolder(path, max_bytes, caches) if is_remote(path) else Folder(Path(path), max_bytes)
    if not mode:
        raise UserError(f"image folder {str(path)!r} does not exist; give a folder, a .zip or a .tar that does")
    found = None
    try:
        file = open_range(path, caches)
        with file.open(ahead=False) as content:
            found = foreign_format(content.read(512))
            is_zip = zipfile.is_zipfile(content)
        return Zip(file, max_bytes) if is_zip else Tar(file, max_bytes, caches)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    # Python's readers of archives raise several more for damaged ones, ValueError and EOFError among them.
    except Exception as error:
        reason = str(error) or type(error).__name__
        if not found:
            found = f"is no folder, no zip and no tar ({reason})"
        elif "archive" in found:
            found = f"{found.partition(';')[0]} that cannot be read ({reason}); is it complete?"
        raise UserError(
            f"{path}: {found}. Images come from a folder, a .zip or a .tar; decompress a .tar.gz to read it at random"
        ) from error


class Folder:
    """Files below a folder. An absolute name is read as it is, as in the reference."""

    def __init__(self, path: Path, max_bytes: int = MAX_IMAGE_BYTES):
        self.path, self._max_bytes = str(path), max_bytes

    def names(self) -> list[str]:
        return _images(path[len(self.path) :].lstrip("/") for path in _walk(self.path))

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def read(self, name: str) -> bytes:
        def read() -> bytes:
            with (self._find(name) or Path(self.path, name)).open("rb") as file:
                return _read(file, self._max_bytes)

        return reading(f"{self.path}/{name}", read)

    def _find(self, name: str) -> Path | None:
        for spelling in spellings(name):
            path = Path(self.path, spelling)
            if stat.S_ISREG(file_mode(path)):
                return path
        return None if name.isascii() else self._find_by_parts(name.replace("\\", "/"))

    def _find_by_parts(self, name: str) -> Path | None:
        """Path of a file whose folders are spelled in another way than the file itself."""
        path = Path("/" if name.startswith("/") else self.path)
        for part in filter(None, name.split("/")):
            path = next((path / each for each in spellings(part) if file_mode(path / each)), None)
            if path is None:
                return None
        return path if stat.S_ISREG(file_mode(path)) else None


def _walk(root: str) -> Iterator[str]:
    """Paths of the files below a folder. Links are followed, and each folder is searched once.

    A link that leads nowhere counts as a file, so that it is noticed when it is read.

    Raises:
      UserError: a folder cannot be read.
    """
    seen: set[str] = set()
    folders, links = [root], list[str]()
    while folders or links:  # links last, so that a folder's files have their own names, not those of a link to it
        folder = folders.pop() if folders else links.pop(0)
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        try:
            with os.scandir(folder) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if _is_hidden(entry.name):
                        continue
                    if not entry.is_symlink():
                        if entry.is_dir():
                            folders.append(entry.path)
                        elif entry.is_file():
                            yield entry.path
                    elif stat.S_ISDIR(mode := file_mode(Path(entry.path))):
                        links.append(entry.path)
                    elif stat.S_ISREG(mode) or not mode:
                        yield entry.path
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be read ({error.strerror}); make it readable, or move it away"
            ) from error


class BucketFolder:
    """Objects below a folder in a bucket, as they were when the folder was listed, which is done once."""

    def __init__(self, path: str | Path, max_bytes: int, caches: Caches):
        place = location(path)
        self.path, self._max_bytes, self._caches = str(place), max_bytes, caches
        found = {file.relative_to(place).as_posix(): status for file, status in place.files().items()}
        self._members = {name: (status.st_size, required(status.generation)) for name, status in found.items()}
        self._index = Index({clean(name): name for name in self._members}, {})

    def names(self) -> list[str]:
        return _images(self._members)

    def __contains__(self, name: str) -> bool:
        return self._index.find(name) is not None

    def read(self, name: str) -> bytes:
        def read() -> bytes:
            member = self._index.member(self._index.target(name))
            size, generation = self._members[member]
            if size > self._max_bytes:
                raise _too_large(self._max_bytes)
            place = location(self.path) / member
            try:
                return BucketRange(place, self._caches, Status(size, 0.0, generation)).read(0, size)
            except ChangedError as error:  # an image that is removed from a disk is a broken one, too
                raise ImageError("was changed or removed after the folder was listed") from error

        return reading(f"{self.path}/{name}", read)


class Tar:
    """Members of an uncompressed tar file. Its headers are read once; each image is then one read of a known range."""

    def __init__(self, file: Ranges, max_bytes: int, caches: Caches):
        self.path, self._max_bytes, self._file = file.path, max_bytes, file
        index = caches.index(file, "members of a tar, 1", lambda: _tar_index(file))
        names, links, targets = (_split(index[name]) for name in ("names", "links", "targets"))
        self._members = dict(zip(names, map(tuple, index["ranges"].tolist()), strict=True))
        self._index = Index(self._members, dict(zip(links, targets, strict=True)))

    def names(self) -> list[str]:
        return _images(self._index)

    def __contains__(self, name: str) -> bool:
        return self._index.find(name) is not None

    def read(self, name: str) -> bytes:
        def read() -> bytes:
            start, size = self._members[self._index.target(name)]
            if size > self._max_bytes:
                raise _too_large(self._max_bytes)
            return self._file.read(start, size)

        return reading(f"{self.path}/{name}", read)


def _tar_index(file: Ranges) -> dict[str, np.ndarray]:
    """Names of a tar's files, int64[files, 2], their first bytes and sizes, and where its links lead."""
    links: dict[str, str] = {}
    members: dict[str, tuple[int, int]] = {}
    with file.open() as content, tarfile.open(fileobj=content, mode="r:", tarinfo=_TarMember) as archive:
        for member in archive:
            name = clean(member.name).replace("\0", "")
            if member.isreg():
                members[name] = member.offset_data, member.size
            elif member.issym():
                links[name] = link_target(name, member.linkname)
            elif member.islnk():
                links[name] = clean(member.linkname)
    ranges = np.array(list(members.values()), np.int64).reshape(-1, 2)
    return {"names": _joined(members), "ranges": ranges, "links": _joined(links), "targets": _joined(links.values())}


def _joined(names: Iterable[str]) -> np.ndarray:
    return np.frombuffer("\0".join(names).encode(errors="surrogatepass"), np.uint8)


def _split(joined: np.ndarray) -> list[str]:
    return joined.tobytes().decode(errors="surrogatepass").split("\0") if len(joined) else []


class _TarMember(tarfile.TarInfo):
    """A header whose size is not below 0: Python would read the same header for ever."""

    def _block(self, count: int) -> int:
        if count < 0:
            raise tarfile.ReadError(f"a member of {count} bytes")
        return super()._block(count)  # pyright: ignore[reportAttributeAccessIssue]


class Zip:
    """Members of a zip file, stored or compressed. In a bucket, a member is one read of a range."""

    def __init__(self, file: Ranges, max_bytes: int):
        self.path, self._max_bytes, self._file = file.path, max_bytes, file
        self._archive: tuple[int, zipfile.ZipFile] | None = None
        self._members: dict[str, str] = {}
        links: dict[str, str] = {}
        archive = self._open()
        members = archive.infolist()
        starts = np.array([member.header_offset for member in members], np.int64)
        self._starts = np.append(np.sort(starts), archive.start_dir)
        for member in members:
            name = clean(member.filename)
            if stat.S_ISLNK(member.external_attr >> 16):
                links[name] = link_target(name, os.fsdecode(_read_member(archive, member, _MAX_TARGET)))
            elif not member.is_dir():
                self._members[name] = member.filename
        self._index = Index(self._members, links)

    def _open(self) -> zipfile.ZipFile:
        # A ZipFile locks its file position for threads, but not for processes, so each process opens its own.
        if self._archive is None or self._archive[0] != os.getpid():
            self._archive = os.getpid(), zipfile.ZipFile(self._file.open(ahead=False))
        return self._archive[1]

    def _fetched(self, name: str) -> zipfile.ZipFile:
        """The archive with the bytes of one member alone, read without holding the archive's lock."""
        archive = self._open()
        start = archive.getinfo(name).header_offset
        end = int(self._starts[np.searchsorted(self._starts, start, side="right")])
        end = min(end, start + _MAX_HEADER + archive.getinfo(name).compress_size)
        if end - start > self._max_bytes + _MAX_HEADER:
            raise _too_large(self._max_bytes)
        part = copy.copy(archive)
        part.fp = _Part(start, self._file.read(start, end - start))
        return part

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archive": None}

    def names(self) -> list[str]:
        return _images(self._index)

    def __contains__(self, name: str) -> bool:
        return self._index.find(name) is not None

    def read(self, name: str) -> bytes:
        def read() -> bytes:
            member = self._members[self._index.target(name)]
            archive = self._open() if isinstance(self._file, FileRange) else self._fetched(member)
            return _read_member(archive, member, self._max_bytes)

        return reading(f"{self.path}/{name}", read)


class _Part(io.BytesIO):
    """A part of a file, whose bytes have the positions that they have in the file."""

    def __init__(self, start: int, data: bytes):
        super().__init__(data)
        self._start = start

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return super().seek(offset - self._start if whence == io.SEEK_SET else offset, whence) + self._start

    def tell(self) -> int:
        return super().tell() + self._start


def _read_member(archive: zipfile.ZipFile, member: str | zipfile.ZipInfo, max_bytes: int) -> bytes:
    with archive.open(member) as file:
        if isinstance(decompressor := file._decompressor, bz2.BZ2Decompressor):  # pyright: ignore
            file._decompressor = _BoundedBzip2(decompressor, max_bytes)  # pyright: ignore
        return _read(file, max_bytes, _PIECE)


class _BoundedBzip2:
    """A decompressor of bzip2 that stops: 4 kB may hold gigabytes, and `zipfile` asks for all of them at once."""

    def __init__(self, decompressor: bz2.BZ2Decompressor, max_bytes: int):
        self._decompressor, self._max_bytes = decompressor, max_bytes

    @property
    def eof(self) -> bool:
        return self._decompressor.eof

    def decompress(self, data: bytes) -> bytes:
        found = self._decompressor.decompress(data, self._max_bytes + 1)
        if len(found) > self._max_bytes:
            raise _too_large(self._max_bytes)
        return found


def _read(file: io.BufferedIOBase, max_bytes: int, piece: int = 2**20) -> bytes:
    """All bytes of a file.

    Raises:
      ImageError: they are more than `max_bytes`.
    """
    pieces, size = [], 0
    while data := file.read(piece):
        size += len(data)
        if size > max_bytes:
            raise _too_large(max_bytes)
        pieces.append(data)
    return b"".join(pieces)


def _too_large(max_bytes: int) -> ImageError:
    return ImageError(f"has more than {max_bytes} bytes; scale it down, or raise data.max_image_bytes")


def _is_hidden(name: str) -> bool:
    """Whether a file or folder belongs to a system and not to the data, such as `.DS_Store` and `__MACOSX`."""
    return name.startswith(".") or name in ("__MACOSX", "@eaDir")


def _images(names: Iterable[str]) -> list[str]:
    """Sorted names with the suffix of an image format. Hidden files and folders are left out."""
    found = (name for name in names if posixpath.splitext(name)[1].lower() in IMAGE_SUFFIXES)
    return sorted(name for name in found if not any(map(_is_hidden, name.split("/"))))


def reading(name: str, read: Callable[[], T]) -> T:
    """The result of `read`.

    Raises:
      ImageError: it fails in any way. Names what was read.
    """
    try:
        return read()
    except ImageError as error:
        raise ImageError(f"{briefly(name)}: {error}") from error
    except StorageError as error:
        raise StorageError(f"{briefly(name)}: {error}") from error
    except UserError:
        raise
    except Exception as error:  # the system and each compression raise their own: OSError, zlib.error, LZMAError ...
        raise ImageError(f"{briefly(name)}: cannot be read: {error or type(error).__name__}") from error
