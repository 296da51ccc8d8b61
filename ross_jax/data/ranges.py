"""Byte ranges of files and of objects in buckets, from any thread and any process.

open_range(path) ─► FileRange     a file of this machine
                 └► BucketRange   an object, as it was when it was opened ─► local cache ─► storage
"""

import hashlib
import io
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ross_jax.config import UserError, required
from ross_jax.data.cache import load_arrays, pack_arrays, save_arrays, unpack_arrays
from ross_jax.data.local_cache import LocalCache
from ross_jax.storage import Status, is_remote, location

_AHEAD = 4 * 2**20
"""Bytes of a bucket's object that are read at once where it is read from the beginning to the end."""
_PIECE = 32 * 2**20  # bytes that are asked for at once of an object that goes to this machine as a whole


@dataclass(frozen=True)
class Caches:
    """What is kept of data in buckets. Files of this machine are read as they are.

    Attributes:
      local: cache on a local disk. None: what is needed again is read from the bucket again.
      indices: folder for indices of archives, which may lie in a bucket. None: they are kept in `local`.
    """

    local: LocalCache | None = None
    indices: str | None = None

    def index(self, file: "Ranges", what: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """What `make` returns for a file, kept if the file lies in a bucket.

        Args:
          what: names the kind of the index, and its format.
        """
        if not isinstance(file, BucketRange):
            return make()
        described = f"{what} of {file.key}"
        if self.indices is not None:
            name = hashlib.sha256(described.encode(errors="surrogatepass")).hexdigest()[:20]
            path = location(self.indices) / f"index-{name}.npz"
            found = load_arrays(path, described)
            if found is None:
                save_arrays(path, described, found := make())
            return found
        if self.local is None:
            return make()
        data = self.local.get(described)
        found = None if data is None else unpack_arrays(data, described)
        if found is None:
            self.local.put(described, pack_arrays(described, found := make()))
        return found


NO_CACHES = Caches()
"""Nothing is kept."""


class FileRange:
    """Reads byte ranges of one file.

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
          UserError: the file was changed after it was opened, so that its ranges are not known.
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

    def open(self, ahead: bool = True) -> Any:
        """A file object."""
        return Path(self.path).open("rb")

    def copy(self) -> "FileRange":
        """The file as it was, with a descriptor of its own, which closes when nobody holds the copy."""
        copy = FileRange.__new__(FileRange)
        copy.__dict__ |= self.__getstate__()
        return copy

    def _stat(self) -> tuple[int, int]:
        status = Path(self.path).stat()
        return status.st_size, status.st_mtime_ns

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}

    def __del__(self):
        if self._descriptor is not None:
            os.close(self._descriptor)


class ChangedError(UserError):
    """An object that was written or removed after it was opened."""


class BucketRange:
    """Reads byte ranges of one object, in the generation that it had when it was opened.

    Args:
      caches: where ranges are looked for first, and kept.
      status: of the object, if it is known.
      whole: whether the local cache keeps the object as a whole, because small parts of it are read.

    Attributes:
      path: address of the object.
      version: size in bytes and generation.

    Raises:
      OSError: there is no such object, or it cannot be read.
    """

    def __init__(self, path: str | Path, caches: Caches = NO_CACHES, status: Status | None = None, whole: bool = False):
        self.path, self._caches = str(path), caches
        status = status or location(path).stat()
        if status.generation is None:
            raise IsADirectoryError(21, "Is a directory", self.path)
        self.version = status.st_size, status.generation
        self._whole = whole and caches.local is not None and status.st_size <= caches.local.limit // 2
        self._file: tuple[Path, int] | None = None

    @property
    def key(self) -> str:
        """Names the object and its generation."""
        return f"{self.path}#{self.version[1]}"

    def read(self, start: int, size: int) -> bytes:
        """`size` bytes from `start`.

        Raises:
          UserError: the object was changed, or the storage does not answer.
        """
        local = self._caches.local
        if self._whole:
            return os.pread(self._held()[1], size, start)
        key = f"{self.key} {start}+{size}"
        data = None if local is None else local.get(key)
        if data is None:
            data = self.fetch(start, size)
            if local is not None:
                local.put(key, data)
        return data

    def fetch(self, start: int, size: int) -> bytes:
        """As `read`, always from the bucket."""
        try:
            data = location(self.path).read_range(start, size, self.version[1])
        except FileNotFoundError as error:
            raise ChangedError(f"{self.path}: was changed or removed after it was opened; start again") from error
        if len(data) < size:
            raise UserError(f"{self.path}: ends at byte {start + len(data)}, has {self.version[0]}; start again")
        return data

    def on_this_machine(self) -> Path:
        """The path of the object in the local cache, which keeps it while this object is referenced.

        Raises:
          UserError: there is no local cache, or no room in it.
        """
        return self._held()[0]

    def _held(self) -> tuple[Path, int]:
        if self._file is None:
            file = self._hold()
            if self._file is None:
                self._file = file
            else:  # another thread was faster
                os.close(file[1])
        return self._file

    def _hold(self) -> tuple[Path, int]:
        if self._caches.local is None:
            raise UserError(f"{self.path}: must lie on this machine to be read; set data.local_cache to a folder")

        def fetch(file: io.BufferedIOBase) -> None:
            for start in range(0, self.version[0], _PIECE):
                file.write(self.fetch(start, min(_PIECE, self.version[0] - start)))

        return self._caches.local.hold(self.key, self.version[0], fetch)

    def check(self) -> None:
        """Does nothing: each request names the generation."""

    def open(self, ahead: bool = True) -> Any:
        """A file object.

        Args:
          ahead: whether more is read than is asked for, as fits files that are read from the beginning to the end.
        """
        if self._whole:
            return self._held()[0].open("rb")
        raw = _Stream(self, kept=not ahead)
        return io.BufferedReader(raw, _AHEAD) if ahead else raw

    def copy(self) -> "BucketRange":
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __del__(self):
        if getattr(self, "_file", None) is not None:
            os.close(required(self._file)[1])


Ranges = FileRange | BucketRange


class _Stream(io.RawIOBase):
    """An object as a file. Each read is a request.

    Args:
      kept: whether the local cache is asked, and keeps what is read.
    """

    def __init__(self, ranges: BucketRange, kept: bool):
        self._read, self._size, self._position = ranges.read if kept else ranges.fetch, ranges.version[0], 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError(22, "Invalid argument")
        self._position = base + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._position)
        size = left if size is None or size < 0 else min(size, left)
        data = self._read(self._position, size) if size else b""
        self._position += size
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def open_range(path: str | Path, caches: Caches = NO_CACHES, whole: bool = False) -> Ranges:
    """Byte ranges of a file or an object.

    Args:
      whole: as for `BucketRange`.

    Raises:
      OSError: it does not exist, or cannot be read.
    """
    return BucketRange(path, caches, whole=whole) if is_remote(path) else FileRange(path)


def open_ranges(path: str | Path, suffix: str, caches: Caches = NO_CACHES) -> list[Ranges]:
    """Byte ranges of a file or, of a folder, of all files in it and its subfolders that end in `suffix`, by name.

    Raises:
      OSError: a file does not exist, or cannot be read.
    """
    if is_remote(path):
        place = location(path)
        if not str(path).endswith(suffix) and (found := place.files()):
            return [BucketRange(each, caches, found[each]) for each in sorted(found) if each.name.endswith(suffix)]
        return [BucketRange(place, caches)]
    place = Path(path)
    paths = sorted(place.rglob(f"*{suffix}")) if place.is_dir() else [place]
    return [FileRange(each) for each in paths]


def combined_version(files: Sequence[Ranges]) -> tuple[int, int]:
    """Size of all files, and a number that changes when the size or the time of any of them does."""
    described = str([file.version for file in files]).encode()
    return sum(file.version[0] for file in files), int.from_bytes(hashlib.sha256(described).digest()[:6], "big")


def file_mode(path: str | Path) -> int:
    """What a path leads to, as in `stat`. 0: nothing, or no file can have this name."""
    try:
        if is_remote(path):
            status = location(path).stat()
            return stat.S_IFDIR if status.generation is None else stat.S_IFREG
        return Path(path).stat().st_mode
    except UserError:
        raise
    except (OSError, ValueError):
        return 0
