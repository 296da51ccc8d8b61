"""A bounded cache on a local disk of what was read from buckets. All processes of a host share it.

    FOLDER/used                bytes that all entries take, by the count of the processes
    FOLDER/3f/3f9a...          a byte range of an object, and the 4 bytes of its checksum
    FOLDER/3f/3fb0....whole    a whole object, for libraries that read files of this machine

An entry appears whole or not at all, and its room is counted before it is written. When the cache is full, the entries
that were used longest ago disappear. Whole objects that a process holds open stay. What a killed process leaves is
removed later, and its locks are free at once.
"""

import contextlib
import fcntl
import hashlib
import io
import logging
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from ross_jax.config import UserError
from ross_jax.storage import is_remote

logger = logging.getLogger(__name__)

_BLOCK = 4096  # what a file takes on a disk is a multiple of this
_CHECKSUM = 4  # bytes
_LEFT_AFTER = 0.9  # share of the limit that is left when entries have been removed
_ABANDONED = 3600.0  # seconds after which an unfinished file has no writer


class LocalCache:
    """Entries by key; a key names an object, its generation and a range. It can be pickled to worker processes.

    Args:
      folder: on a disk of this machine. It is made if it is not there.
      limit: most bytes that the entries take.

    Raises:
      UserError: the folder lies in a bucket, or cannot be written.
    """

    def __init__(self, folder: str, limit: int):
        if is_remote(folder):
            raise UserError(f"data.local_cache {folder!r}: is a bucket; name a folder on a disk of this machine")
        self.folder, self.limit = Path(folder), limit
        self._complained = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._counting():
                pass
        except OSError as error:
            raise UserError(f"data.local_cache {folder!r}: cannot be written ({error.strerror})") from error

    def _path(self, key: str, suffix: str = "") -> Path:
        name = hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()[:40]
        return self.folder / name[:2] / (name + suffix)

    def get(self, key: str) -> bytes | None:
        """The bytes of an entry; None if there is none, or if it is damaged."""
        path = self._path(key)
        try:
            content = path.read_bytes()
            data, checksum = content[:-_CHECKSUM], content[-_CHECKSUM:]
            if zlib.crc32(data).to_bytes(_CHECKSUM) != checksum:
                path.unlink(missing_ok=True)
                return None
            os.utime(path)
        except OSError:
            return None
        return data

    def put(self, key: str, data: bytes) -> None:
        """Keeps bytes, if there is room. A disk that cannot be written is no reason to end."""
        path = self._path(key)
        try:
            if not self._reserve(len(data) + _CHECKSUM):
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, partial = tempfile.mkstemp(".part", dir=path.parent)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
                    file.write(zlib.crc32(data).to_bytes(_CHECKSUM))
                Path(partial).replace(path)
            except BaseException:
                Path(partial).unlink()
                raise
        except OSError as error:
            if not self._complained:
                logger.warning("%s: cannot be written (%s); data is not kept there", self.folder, error.strerror)
            self._complained = True

    def hold(self, key: str, size: int, fetch: Callable[[io.BufferedIOBase], None]) -> tuple[Path, int]:
        """A whole object as a file of this machine. Of several processes that ask for it, one fetches it.

        Args:
          size: bytes of the object.
          fetch: writes the object to a file.

        Returns:
          The file's path, and an open descriptor. The file stays in the cache until the descriptor is closed.

        Raises:
          UserError: there is no room for it.
        """
        path = self._path(key, ".whole")
        try:
            while True:
                descriptor = _held(path, size)
                if descriptor is not None:
                    return path, descriptor
                self._fetch(path, size, fetch)
        except OSError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self.folder}: cannot be written ({error.strerror}); free the disk") from error

    def _fetch(self, path: Path, size: int, fetch: Callable[[io.BufferedIOBase], None]) -> None:
        partial = path.with_name(f"{path.name}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # Another process may have finished it, so that this is the entry itself, or have given up.
            if not _is_current(file.fileno(), partial):
                return
            if not self._reserve(size):
                partial.unlink()
                raise UserError(
                    f"{self.folder}: has no room for {size:,} bytes that must lie on this machine; raise "
                    f"data.local_cache_gb, which is {self.limit / 1e9:g}"
                )
            try:
                file.truncate(size)  # counts as a whole one from now on
                fetch(file)
                file.flush()
                os.fsync(file.fileno())
                partial.replace(path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise

    @contextlib.contextmanager
    def _counting(self) -> Iterator[io.BufferedIOBase]:
        """The file of the count, for one process at a time."""
        with os.fdopen(os.open(self.folder / "used", os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _reserve(self, size: int) -> bool:
        """Counts an entry's bytes, and removes others if the cache is full. False: there is no room."""
        size = _on_disk(size)
        if size > self.limit:
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._counting() as file:
            text = file.read()
            used = int(text) if text.isdigit() else self.limit
            if used + size > self.limit:
                used = self._evict(max(0, int(self.limit * _LEFT_AFTER) - size))
            fits = used + size <= self.limit
            file.seek(0)
            file.truncate()
            file.write(str(used + size * fits).encode())
            return fits

    def _evict(self, most: int) -> int:
        """Removes the entries that were used longest ago until at most so many bytes are left. Returns what is left."""
        found, now = [], time.time()
        for folder in os.scandir(self.folder):
            for entry in os.scandir(folder.path) if folder.is_dir() else ():
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    found.append((status.st_mtime, _on_disk(status.st_size), Path(entry.path)))
        left = sum(size for _, size, _ in found)
        for used, size, path in sorted(found):
            unfinished = path.suffix == ".part"
            if (left > most and not unfinished) or (unfinished and now - used > _ABANDONED):
                left -= size * _remove(path)
        return left


def _on_disk(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _is_current(descriptor: int, path: Path) -> bool:
    """Whether a path names the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _held(path: Path, size: int) -> int | None:
    """A descriptor of a whole object, which keeps it; None if it is not there."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if _is_current(descriptor, path):
        if os.fstat(descriptor).st_size == size:
            os.utime(path)
            return descriptor
        path.unlink(missing_ok=True)
    os.close(descriptor)
    return None


def _remove(path: Path) -> bool:
    """Removes a file, unless a process holds it. Returns whether it is gone."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
