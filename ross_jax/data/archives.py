"""Stores of images: a folder, a zip file or a tar file. Each is read at random and never unpacked.

Stores are safe in worker processes. No open file is pickled, and a forked process never shares a file position.
"""

import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ross_jax.config import UserError
from ross_jax.data.images import ImageError

_SUFFIXES = {".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif"}


@runtime_checkable
class ImageStore(Protocol):
    """Images by name. Names are relative and use forward slashes."""

    path: str

    def names(self) -> list[str]:
        """Names of all files with the suffix of an image format, sorted."""
        ...

    def __contains__(self, name: str) -> bool: ...

    def read(self, name: str) -> bytes:
        """The bytes of the file `name`, which is in the store.

        Raises:
          ImageError: it cannot be read.
        """
        ...


def open_store(path: str | Path) -> ImageStore:
    """Opens a folder, a .zip or an uncompressed .tar.

    Raises:
      UserError: the path does not exist, or it is no folder and no archive that can be read at random.
    """
    path = Path(path)
    if path.is_dir():
        return Folder(path)
    if not path.exists():
        raise UserError(f"image folder {str(path)!r} does not exist; give a folder, a .zip or a .tar that does")
    try:
        if zipfile.is_zipfile(path):
            return Zip(path)
        return Tar(path)
    except (tarfile.ReadError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: is no folder, no zip and no uncompressed tar ({error}); decompress a .tar.gz to read it at random"
        ) from error


class FileRange:
    """Reads byte ranges of one file, from any thread and any process.

    `os.pread` uses no file position, so a forked process may read from the same descriptor. A pickled copy opens its
    own.
    """

    def __init__(self, path: str | Path):
        self._path = str(path)
        self._descriptor: int | None = None
        self._version = self._stat()

    def read(self, start: int, size: int) -> bytes:
        """`size` bytes from `start`.

        Raises:
          UserError: the file was changed, so known ranges no longer hold.
        """
        if self._descriptor is None:
            if self._stat() != self._version:
                raise UserError(f"{self._path}: was changed after it was opened; start again")
            self._descriptor = os.open(self._path, os.O_RDONLY)
        return os.pread(self._descriptor, size, start)

    def _stat(self) -> tuple[int, int]:
        stat = Path(self._path).stat()
        return stat.st_size, stat.st_mtime_ns

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}

    def __del__(self):
        if self._descriptor is not None:
            os.close(self._descriptor)


class Folder:
    """Files below a folder. An absolute name is read as it is, as in the reference."""

    def __init__(self, path: Path):
        self.path = str(path)

    def names(self) -> list[str]:
        root = Path(self.path)
        return _images([file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()])

    def __contains__(self, name: str) -> bool:
        return (Path(self.path) / name).is_file()

    def read(self, name: str) -> bytes:
        return _reading(f"{self.path}/{name}", (Path(self.path) / name).read_bytes)


class Tar:
    """Members of an uncompressed tar file. Its headers are read once; each image is then one read of a known range."""

    def __init__(self, path: Path):
        self.path = str(path)
        with tarfile.open(path, "r:") as archive:
            self._members = {_clean(m.name): (m.offset_data, m.size) for m in archive if m.isreg()}
        self._file = FileRange(path)

    def names(self) -> list[str]:
        return _images(self._members)

    def __contains__(self, name: str) -> bool:
        return _clean(name) in self._members

    def read(self, name: str) -> bytes:
        start, size = self._members[_clean(name)]
        return _reading(f"{self.path}/{name}", lambda: self._file.read(start, size))


class Zip:
    """Members of a zip file, stored or compressed."""

    def __init__(self, path: Path):
        self.path = str(path)
        self._archive: tuple[int, zipfile.ZipFile] | None = None
        self._members = {_clean(m.filename): m.filename for m in self._open().infolist() if not m.is_dir()}

    def _open(self) -> zipfile.ZipFile:
        # A ZipFile locks its file position for threads, but not for processes, so each process opens its own.
        if self._archive is None or self._archive[0] != os.getpid():
            self._archive = os.getpid(), zipfile.ZipFile(self.path)
        return self._archive[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archive": None}

    def names(self) -> list[str]:
        return _images(self._members)

    def __contains__(self, name: str) -> bool:
        return _clean(name) in self._members

    def read(self, name: str) -> bytes:
        return _reading(f"{self.path}/{name}", lambda: self._open().read(self._members[_clean(name)]))


def _clean(name: str) -> str:
    return name.removeprefix("./")


def _images(names) -> list[str]:
    return sorted(name for name in names if Path(name).suffix.lower() in _SUFFIXES)


def _reading(name: str, read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    # RuntimeError: the member is encrypted; NotImplementedError: a compression that Python lacks.
    except (OSError, RuntimeError, NotImplementedError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ImageError(f"{name}: cannot be read: {error}") from error
