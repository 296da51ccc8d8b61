"""Stores of images: a folder, a zip file or a tar file. Each is read at random and never unpacked.

Stores are safe in worker processes. No open file is pickled, and a forked process never shares a file position.
`spelling.py` finds names that a record spells in another way than the store.
"""

import bz2
import hashlib
import io
import os
import posixpath
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from ross_jax.config import UserError
from ross_jax.data.formats import foreign_format
from ross_jax.data.images import ImageError
from ross_jax.data.spelling import briefly, spellings

T = TypeVar("T")

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif"}
_MAX_LINKS = 40  # links on the way to one file, as in Linux
_MAX_TARGET = 4096  # bytes of a link's target, as in Linux
MAX_IMAGE_BYTES = 64 * 2**20
"""Most bytes of an image file, by default."""
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


def open_store(path: str | Path, max_bytes: int = MAX_IMAGE_BYTES) -> ImageStore:
    """Opens a folder, a .zip or an uncompressed .tar.

    Args:
      max_bytes: most bytes of an image file; larger ones are not read, whatever an archive says of their size.

    Raises:
      UserError: the path does not exist, or it is no folder and no archive that can be read at random.
    """
    path = Path(path)
    mode = file_mode(path)
    if stat.S_ISDIR(mode):
        return Folder(path, max_bytes)
    if not mode:
        raise UserError(f"image folder {str(path)!r} does not exist; give a folder, a .zip or a .tar that does")
    try:
        with path.open("rb") as file:
            found = foreign_format(file.read(512))
        return Zip(path, max_bytes) if zipfile.is_zipfile(path) else Tar(path, max_bytes)
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


def file_mode(path: Path) -> int:
    """What a path leads to, as in `stat`. 0: nothing, or no file can have this name."""
    try:
        return path.stat().st_mode
    except (OSError, ValueError):
        return 0


class FileRange:
    """Reads byte ranges of one file, from any thread and any process.

    `os.pread` uses no file position, so a forked process may read from the same descriptor. A pickled copy opens its
    own.

    Attributes:
      path: the file.
      version: size in bytes, and time of the last change in ns, when the file was opened.
    """

    def __init__(self, path: str | Path):
        self.path = str(path)
        self._descriptor: int | None = None
        self.version = self._stat()

    def read(self, start: int, size: int) -> bytes:
        """`size` bytes from `start`.

        Raises:
          UserError: the file was changed, so known ranges no longer hold.
        """
        if self._descriptor is None:
            self.check()
            self._descriptor = os.open(self.path, os.O_RDONLY)
        data = os.pread(self._descriptor, size, start)
        if len(data) < size:
            raise UserError(f"{self.path}: has become shorter since it was opened; start again")
        return data

    def check(self) -> None:
        """Raises UserError if the file was changed since it was opened."""
        if self._stat() != self.version:
            raise UserError(f"{self.path}: was changed after it was opened; start again")

    def _stat(self) -> tuple[int, int]:
        status = Path(self.path).stat()
        return status.st_size, status.st_mtime_ns

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}

    def __del__(self):
        if self._descriptor is not None:
            os.close(self._descriptor)


def combined_version(files: Sequence[FileRange]) -> tuple[int, int]:
    """Size of all files, and a number that changes when the size or the time of any of them does."""
    described = str([file.version for file in files]).encode()
    return sum(file.version[0] for file in files), int.from_bytes(hashlib.sha256(described).digest()[:6], "big")


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


class Tar:
    """Members of an uncompressed tar file. Its headers are read once; each image is then one read of a known range."""

    def __init__(self, path: Path, max_bytes: int = MAX_IMAGE_BYTES):
        self.path, self._max_bytes = str(path), max_bytes
        links: dict[str, str] = {}
        self._members: dict[str, tuple[int, int]] = {}
        with tarfile.open(path, "r:", tarinfo=_TarMember) as archive:
            for member in archive:
                name = _clean(member.name)
                if member.isreg():
                    self._members[name] = member.offset_data, member.size
                elif member.issym():
                    links[name] = _link_target(name, member.linkname)
                elif member.islnk():
                    links[name] = _clean(member.linkname)
        self._index = _Index(self._members, links)
        self._file = FileRange(path)

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


class _TarMember(tarfile.TarInfo):
    """A header whose size is not below 0: Python would read the same header for ever."""

    def _block(self, count: int) -> int:
        if count < 0:
            raise tarfile.ReadError(f"a member of {count} bytes")
        return super()._block(count)  # pyright: ignore[reportAttributeAccessIssue]


class Zip:
    """Members of a zip file, stored or compressed."""

    def __init__(self, path: Path, max_bytes: int = MAX_IMAGE_BYTES):
        self.path, self._max_bytes = str(path), max_bytes
        self._archive: tuple[int, zipfile.ZipFile] | None = None
        self._members: dict[str, str] = {}
        links: dict[str, str] = {}
        archive = self._open()
        for member in archive.infolist():
            name = _clean(member.filename)
            if stat.S_ISLNK(member.external_attr >> 16):
                links[name] = _link_target(name, os.fsdecode(_read_member(archive, member, _MAX_TARGET)))
            elif not member.is_dir():
                self._members[name] = member.filename
        self._index = _Index(self._members, links)

    def _open(self) -> zipfile.ZipFile:
        # A ZipFile locks its file position for threads, but not for processes, so each process opens its own.
        if self._archive is None or self._archive[0] != os.getpid():
            self._archive = os.getpid(), zipfile.ZipFile(self.path)
        return self._archive[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archive": None}

    def names(self) -> list[str]:
        return _images(self._index)

    def __contains__(self, name: str) -> bool:
        return self._index.find(name) is not None

    def read(self, name: str) -> bytes:
        def read() -> bytes:
            return _read_member(self._open(), self._members[self._index.target(name)], self._max_bytes)

        return reading(f"{self.path}/{name}", read)


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


class _Index:
    """Names of an archive's members, and where its links lead.

    Args:
      members: the names of files.
      links: name of a link -> name that it leads to, relative to the archive's root. A link that leads out of the
        archive leads to no member.
    """

    def __init__(self, members: Mapping[str, Any], links: Mapping[str, str]):
        self._members, self._links = members, links

    def __iter__(self) -> Iterator[str]:
        yield from self._members
        folders = {parent for name in self._members for parent in _parents(name)}
        yield from (name for name in self._links if self._follow(name) not in folders)

    def find(self, name: str) -> str | None:
        """The member or link that a record means by `name`; None if there is none."""
        for spelling in spellings(name):
            clean = _clean(spelling)
            if clean in self._members or clean in self._links or self._follow(clean) in self._members:
                return clean
        return None

    def target(self, name: str) -> str:
        """The member that holds the bytes of `name`.

        Raises:
          ImageError: it is a link that leads to no member.
        """
        target = self._follow(self.find(name) or name)
        if target not in self._members:
            raise ImageError(f"is a link to {briefly(target)!r}, which is not in the archive")
        return target

    def _follow(self, name: str) -> str:
        """The name with every link in it replaced."""
        for _ in range(_MAX_LINKS if self._links else 0):
            link = next((each for each in (name, *_parents(name)) if each in self._links), None)
            if link is None:
                break
            name = posixpath.normpath(self._links[link] + name[len(link) :])
        return name


def _parents(name: str) -> Iterator[str]:
    """Folders of a name, the innermost first."""
    while "/" in name:
        name = name.rpartition("/")[0]
        yield name


def _link_target(name: str, target: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), target))


def _clean(name: str) -> str:
    return posixpath.normpath(name.replace("\\", "/")).lstrip("/")


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
    except UserError:
        raise
    except Exception as error:  # the system and each compression raise their own: OSError, zlib.error, LZMAError ...
        raise ImageError(f"{briefly(name)}: cannot be read: {error or type(error).__name__}") from error
