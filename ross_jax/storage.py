"""Where files lie: on this machine, or in buckets of Google Cloud Storage.

    location("runs/a")         pathlib.Path("runs/a"), as ever
    location("gs://bucket/a")  BucketPath: the methods of pathlib.Path that this package uses, over the network
    location("s3://bucket/a")  UserError: not supported

A bucket has objects with long names instead of folders. An object appears whole or not at all and replaces an older one
at once, but nothing can be renamed. So whatever must appear as a whole folder has a marker, which is written last.

The client repeats requests that met a lost connection or a 5xx answer for about half a minute. Then a `StorageError` is
raised, which is both a `UserError` and an `OSError`.
"""

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from ross_jax.buckets import BLOCK, BucketPath, Status, StorageError, is_remote, location, scheme
from ross_jax.config import UserError

__all__ = [
    "BucketPath",
    "GrowingFile",
    "Status",
    "StorageError",
    "copy_file",
    "copy_tree",
    "is_remote",
    "local_copy",
    "local_folder",
    "location",
    "naming",
    "read_range",
    "remove_tree",
    "scheme",
    "working_copy",
    "write_whole",
]

_SHARE = 50
"""A growing file is uploaded again after this many times as long as its last upload took."""
_LEAST = 10.0
"""Least number of seconds between two uploads of a growing file."""


def read_range(path: Path, start: int, length: int) -> bytes:
    """`length` bytes of a file from `start` on, or those that there are."""
    if is_remote(path):
        return cast(Any, path).read_range(start, length)
    with path.open("rb") as file:
        file.seek(start)
        return file.read(length)


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a small file, which appears whole or not at all and replaces an older one at once."""
    data = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        path.write_bytes(data)
        return
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(data)
    partial.replace(path)


def copy_file(source: Path, target: Path) -> None:
    """Copies a file between any two places."""
    if not is_remote(source) and not is_remote(target):
        shutil.copyfile(source, target)
        return
    with source.open("rb") as file, target.open("wb") as copy:
        shutil.copyfileobj(file, copy, BLOCK)


def copy_tree(source: Path, target: Path) -> None:
    """Copies a folder between any two places. Files that are there already are replaced."""
    if not is_remote(source) and not is_remote(target):
        shutil.copytree(source, target, dirs_exist_ok=True)
        return
    for path in source.rglob("*"):
        if path.is_file():
            copy = target / path.relative_to(source).as_posix()
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy_file(path, copy)


def remove_tree(folder: Path) -> None:
    """Removes a folder and everything in it, as far as it is there and can be removed."""
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    for path in [*folder.rglob("*")]:
        path.unlink(missing_ok=True)


def _copy_into(folder: str, path: Path) -> Path:
    """The place of a copy in a temporary folder. It is there if there is something to copy."""
    copy = Path(folder) / path.name
    if path.is_file():
        copy_file(path, copy)
    elif path.exists():
        copy.mkdir()
        copy_tree(path, copy)
    return copy


@contextlib.contextmanager
def naming(path: Path, copy: Path) -> Iterator[None]:
    """Mistakes that name a temporary copy name the path that it is a copy of in its place."""
    try:
        yield
    except UserError as error:
        error.args = tuple(str(each).replace(str(copy), str(path)) for each in error.args)
        raise


@contextlib.contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """A file or folder as libraries can read it that know only this machine: itself, or a temporary copy."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="ross_jax_") as folder:
        copy = _copy_into(folder, path)
        with naming(path, copy):
            yield copy


@contextlib.contextmanager
def local_folder(target: Path) -> Iterator[Path]:
    """A folder as libraries can fill it that know only this machine: `target`, or a temporary one.

    What is in the temporary one goes to `target` when the block ends without an error.
    """
    if not is_remote(target):
        target.mkdir(parents=True, exist_ok=True)
        yield target
        return
    with tempfile.TemporaryDirectory(prefix="ross_jax_") as folder:
        with naming(target, Path(folder)):
            yield Path(folder)
        copy_tree(Path(folder), target)


@contextlib.contextmanager
def working_copy(path: Path) -> Iterator[Path]:
    """A file or folder to add to: itself, or a temporary copy, whose new and changed files go to the bucket at the end.

    They go there also when the block ends by an error, so that the same command continues.
    """
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="ross_jax_") as folder:
        copy = _copy_into(folder, path)

        def state() -> dict[Path, tuple[int, int]]:
            files = [file for file in (copy, *copy.rglob("*")) if file.is_file()]
            return {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in files}

        before = state()
        try:
            with naming(path, copy):
                yield copy
        finally:
            for file, found in state().items():
                if before.get(file) != found:
                    copy_file(file, path if file == copy else path / file.relative_to(copy).as_posix())


class GrowingFile:
    """A file to which lines are appended. In a bucket, it is a local file that is uploaded now and then.

    Attributes:
      target: the file's place.
      local: the file to append to. It begins with what was there before.
    """

    def __init__(self, target: Path):
        """Opens a file that may be there."""
        self.target, self.local, self._temporary = target, target, None
        self._due, self._sent = 0.0, -1
        if is_remote(target):
            self._temporary = tempfile.TemporaryDirectory(prefix="ross_jax_")
            self.local = Path(self._temporary.name) / target.name
            with contextlib.suppress(FileNotFoundError):
                copy_file(target, self.local)
                self._sent = self.local.stat().st_size

    def sync(self, now: bool = False) -> None:
        """Uploads what is new, unless the last upload was a moment ago or, for a large file, some minutes.

        Args:
          now: whether it is uploaded in any case.
        """
        began = time.monotonic()
        if self._temporary is None or not (now or began >= self._due) or not self.local.exists():
            return
        size = self.local.stat().st_size
        if size != self._sent:
            copy_file(self.local, self.target)
            self._sent = size
            self._due = time.monotonic() + max(_LEAST, _SHARE * (time.monotonic() - began))

    def close(self) -> None:
        """Uploads what is new, and removes the local file of a bucket's one."""
        if self._temporary is not None:
            try:
                self.sync(now=True)
            finally:
                self._temporary.cleanup()
