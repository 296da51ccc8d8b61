"""Paths in buckets of Google Cloud Storage, and addresses in general. The one file that knows fsspec; see `storage`."""

import contextlib
import errno
import fnmatch
import functools
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar, cast

from ross_jax.config import UserError

T = TypeVar("T")

_SCHEMES = {"gs": ("gcsfs", "gcs")}
"""Scheme -> the package that fsspec needs for it, and the extra of this package that installs it."""
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
BLOCK = 32 * 2**20
"""Bytes of one request while a large object is written; a multiple of 256 KiB."""


class StorageError(UserError, OSError):
    """A bucket that does not answer, or refuses."""


class Status(NamedTuple):
    """What `BucketPath.stat` returns; the first names are those of `os.stat_result`.

    Attributes:
      generation: of an object, changes whenever it is written; None for a folder.
    """

    st_size: int
    st_mtime: float
    generation: int | None = None


def scheme(text: str | os.PathLike[str]) -> str:
    """The scheme of an address, such as `gs`; empty for a path of this machine."""
    match = _SCHEME.match(str(text))
    return match[1].lower() if match else ""


def is_remote(path: Any) -> bool:
    """Whether a path, or its text, lies in a bucket."""
    return type(path) is BucketPath or bool(scheme(path))


def location(text: str | os.PathLike[str]) -> Path:
    """The path that a flag or a field names. Never give such a text to `pathlib.Path`, which makes `gs:/b` of `gs://b`.

    Returns:
      A `pathlib.Path`, or a `BucketPath`, which has the same methods.

    Raises:
      UserError: a scheme that is not supported, or whose packages are not installed; no bucket is named.
    """
    if type(text) is BucketPath:
        return cast(Path, text)
    text = os.fspath(cast(str, text))
    name = scheme(text)
    if not name:
        if re.match(r"(gs|s3):/[^/]", text):
            raise UserError(f"{text}: an address has two slashes, such as gs://bucket/folder; give it as text")
        return Path(text)
    if name not in _SCHEMES:
        known = ", ".join(f"{each}://" for each in _SCHEMES)
        raise UserError(f"{text}: {name}:// is not supported; use a path of this machine, or one of {known}")
    package, extra = _SCHEMES[name]
    try:
        __import__(package)
    except ImportError as error:
        raise UserError(f"{text}: {name}:// needs {package}; pip install -e '.[{extra}]'") from error
    rest = text.partition("://")[2].strip("/")
    if not rest:
        raise UserError(f"{text}: names no bucket")
    _configure()
    return cast(Path, BucketPath(name, PurePosixPath(rest)))


@functools.cache
def _configure() -> None:
    """Settings of all file systems of fsspec, those of Orbax included."""
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False}  # other processes write, too
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        options["token"] = "anon"
    fsspec.config.conf.setdefault("gcs", {}).update(options)
    for name in ("gs", "gcs"):  # what gcsfs registers asks another service, over gRPC, what kind of bucket it is
        fsspec.register_implementation(name, "gcsfs.core.GCSFileSystem", clobber=True)
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # logs, with tracebacks, errors that it raises


def file_system(name: str) -> Any:
    """The fsspec file system of a scheme; another one in each process."""
    import fsspec

    _configure()  # again in a process that got a path from another one
    return fsspec.filesystem(name)


def _answer(path: "BucketPath", call: Callable[[], T]) -> T:
    """What a request returns. Anything but a missing or existing object becomes a StorageError."""
    try:
        return call()
    except FileNotFoundError as error:  # whose text is the request
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
    except (FileExistsError, StorageError):
        raise
    except Exception as error:  # of aiohttp, requests, Google's authentication and fsspec
        reason = str(error).strip().partition("\n")[0][:300] or type(error).__name__
        if getattr(error, "code", None) == 401 or reason.startswith("Forbidden"):
            raise StorageError(
                f"{path}: access is refused ({reason}); sign in (`gcloud auth application-default login`), or have the "
                "account admitted to the bucket"
            ) from error
        raise StorageError(f"{path}: the storage does not answer as it should ({reason}); try again") from error


def _status(info: dict[str, Any]) -> Status:
    modified = info["mtime"].timestamp() if info.get("mtime") else 0.0
    generation = None if info.get("generation") is None else int(info["generation"])
    return Status(int(info.get("size") or 0), modified, generation)


@functools.total_ordering
class BucketPath:
    """An object or a folder in a bucket: what this package uses of `pathlib.Path`.

    `isinstance(path, Path)` is true, so that annotations hold. It has no `__fspath__`, so that no library takes it for
    a file of this machine.
    """

    __class__ = property(lambda self: Path)  # pyright: ignore[reportAssignmentType]

    def __init__(self, scheme: str, place: PurePosixPath):
        """Names `place`, which is `bucket/name`."""
        self._scheme, self._place = scheme, place

    def __reduce__(self) -> tuple[Any, ...]:
        return BucketPath, (self._scheme, self._place)

    def _with(self, place: PurePosixPath) -> "BucketPath":
        return BucketPath(self._scheme, place)

    def __str__(self) -> str:
        return f"{self._scheme}://{self._place}"

    def __repr__(self) -> str:
        return f"BucketPath({str(self)!r})"

    def __hash__(self) -> int:
        return hash(str(self))

    def __eq__(self, other: object) -> bool:
        return type(other) is BucketPath and str(self) == str(other)

    def __lt__(self, other: "BucketPath") -> bool:
        return str(self) < str(other)

    def __truediv__(self, name: Any) -> "BucketPath":
        return self.joinpath(name)

    def joinpath(self, *names: Any) -> "BucketPath":
        return self._with(self._place.joinpath(*(str(name).lstrip("/") for name in names)))

    def with_name(self, name: str) -> "BucketPath":
        return self._with(self._place.with_name(name))

    def with_suffix(self, suffix: str) -> "BucketPath":
        return self._with(self._place.with_suffix(suffix))

    def relative_to(self, other: "BucketPath") -> PurePosixPath:
        return self._place.relative_to(other._place)

    def is_relative_to(self, other: Any) -> bool:
        return type(other) is BucketPath and self._place.is_relative_to(other._place)

    def as_posix(self) -> str:
        return str(self)

    def resolve(self) -> "BucketPath":
        return self

    absolute = expanduser = resolve

    def is_absolute(self) -> bool:
        return True

    def is_symlink(self) -> bool:
        return False

    @property
    def name(self) -> str:
        return self._place.name

    @property
    def stem(self) -> str:
        return self._place.stem

    @property
    def suffix(self) -> str:
        return self._place.suffix

    @property
    def parts(self) -> tuple[str, ...]:
        return (f"{self._scheme}://", *self._place.parts)

    @property
    def parent(self) -> "BucketPath":
        return self if self.is_bucket() else self._with(self._place.parent)

    @property
    def parents(self) -> tuple["BucketPath", ...]:
        return tuple(self._with(place) for place in self._place.parents[:-1])

    def is_bucket(self) -> bool:
        """Whether it is a whole bucket."""
        return len(self._place.parts) == 1

    @property
    def file_system(self) -> Any:
        """The fsspec file system, for libraries that read through one; it knows this path as its text."""
        return file_system(self._scheme)

    def _ask(self, method: str, *args: Any, **options: Any) -> Any:
        return _answer(self, lambda: getattr(self.file_system, method)(str(self), *args, **options))

    def _info(self) -> dict[str, Any] | None:
        try:
            return self._ask("info")
        except FileNotFoundError:
            return None

    def exists(self) -> bool:
        return self._info() is not None

    def is_file(self) -> bool:
        return (self._info() or {}).get("type") == "file"

    def is_dir(self) -> bool:
        return (self._info() or {}).get("type") == "directory"

    def stat(self) -> Status:
        info = self._info()
        if info is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return _status(info)

    def files(self) -> dict["BucketPath", Status]:
        """All files below a folder. Empty, where there is none."""
        try:
            found = self._ask("find", detail=True).values()
        except FileNotFoundError:
            return {}
        return {self._with(PurePosixPath(i["name"])): _status(i) for i in found if not i["name"].endswith("/")}

    def _children(self) -> Iterator[tuple["BucketPath", bool]]:
        """Everything directly in a folder, and whether it is a folder."""
        for info in self._ask("ls", detail=True):
            place = PurePosixPath(info["name"])
            if place.parent == self._place:
                yield self._with(place), info["type"] == "directory"

    def iterdir(self) -> Iterator["BucketPath"]:
        return (path for path, _ in self._children())

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        """What matches a pattern with `*` and `?` in names, but no `**`. Nothing, where there is no folder."""
        first, _, rest = pattern.partition("/")
        with contextlib.suppress(FileNotFoundError):
            for path, is_folder in self._children():
                if fnmatch.fnmatchcase(path.name, first):
                    if not rest:
                        yield path
                    elif is_folder:
                        yield from path.glob(rest)

    def rglob(self, pattern: str) -> Iterator["BucketPath"]:
        """All files below, in order, whose own names match. Folders are left out."""
        with contextlib.suppress(FileNotFoundError):
            for name in sorted(self._ask("find")):
                if fnmatch.fnmatchcase(PurePosixPath(name).name, pattern) and not name.endswith("/"):
                    yield self._with(PurePosixPath(name))

    def open(self, mode: str = "r", buffering: int = -1, encoding: str | None = None, **options: Any) -> Any:
        """A file object. What is written appears when it is closed, and never if the `with` block fails.

        Args:
          buffering: ignored.
          options: of fsspec, such as `cache_type`.
        """
        if mode not in ("r", "rb", "w", "wb"):
            raise ValueError(f"{self}: cannot be opened as {mode!r}")
        if "w" in mode:
            raw = cast(Any, _Writer(self, self._ask("open", "wb", block_size=BLOCK)))
            return raw if "b" in mode else _TextWriter(raw, encoding=encoding or "utf-8", write_through=True)
        raw = self._ask("open", "rb", **options)
        return raw if "b" in mode else io.TextIOWrapper(raw, encoding=encoding or "utf-8")

    def read_bytes(self) -> bytes:
        return self._ask("cat_file")

    def read_range(self, start: int, length: int, generation: int | None = None) -> bytes:
        """`length` bytes from `start` on, or those that there are.

        Args:
          generation: that the object must have. None: any.

        Raises:
          FileNotFoundError: the object is not there, or has another generation.
        """
        if not length:
            return b""
        fs = self.file_system
        bucket, key, _ = fs.split_path(str(self))
        place = f"{fs._location}/download/storage/v1/b/{{}}/o/{{}}"
        headers = {"Range": f"bytes={start}-{start + length - 1}"}
        options: dict[str, Any] = {"alt": "media", "headers": headers}
        options |= {} if generation is None else {"generation": str(generation)}
        _, content = _answer(self, lambda: fs.call("GET", place, bucket, key, **options))
        return content

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self.read_bytes().decode(encoding, errors)

    def write_bytes(self, data: bytes) -> int:
        self._ask("pipe_file", bytes(data))
        return len(data)

    def write_text(self, text: str, encoding: str = "utf-8") -> int:
        return self.write_bytes(text.encode(encoding))

    def touch(self) -> None:
        if not self.exists():
            self.write_bytes(b"")

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing: a folder is there as soon as something is in it."""

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self._ask("rm_file")
        except FileNotFoundError:
            if not missing_ok:
                raise

    def replace(self, target: "BucketPath") -> "BucketPath":
        """Copies an object, inside the storage, to another name, and removes it under its own."""
        self._ask("cp_file", str(target))
        self.unlink()
        return target

    rename = replace

    def read_version(self) -> tuple[bytes, int] | None:
        """An object's content and its generation, which changes whenever it is written; None if it is absent."""
        fs = self.file_system
        bucket, key, _ = fs.split_path(str(self))
        place = f"{fs._location}/storage/v1/b/{{}}/o/{{}}"
        try:
            headers, content = _answer(self, lambda: fs.call("GET", place, bucket, key, alt="media"))
        except FileNotFoundError:
            return None
        return content, int(headers["X-Goog-Generation"])

    def write_version(self, data: bytes, generation: int) -> int | None:
        """Writes the object if its generation is still this one; 0: if it is absent.

        Returns:
          The new generation; None if another process was faster.
        """
        fs = self.file_system
        bucket, key, _ = fs.split_path(str(self))
        head = "--=-=\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n"
        middle = "\r\n--=-=\r\nContent-Type: application/octet-stream\r\n\r\n"
        body = f"{head}{json.dumps({'name': key})}{middle}".encode() + data + b"\r\n--=-=--"
        # Only uploads of this type are conditional wherever they are answered.
        how = {"uploadType": "multipart", "ifGenerationMatch": str(generation), "json_out": True}
        headers = {"Content-Type": 'multipart/related; boundary="=-="'}
        place = f"{fs._location}/upload/storage/v1/b/{{}}/o"
        try:
            answer = _answer(self, lambda: fs.call("POST", place, bucket, headers=headers, data=body, **how))
        except FileExistsError:
            found = self.read_version()  # the answer to a request that succeeded may have been lost
            return found[1] if found and found[0] == data and found[1] != generation else None
        return int(answer["generation"])

    def unlink_version(self, generation: int) -> None:
        """Removes the object if its generation is still this one."""
        fs = self.file_system
        bucket, key, _ = fs.split_path(str(self))
        place = f"{fs._location}/storage/v1/b/{{}}/o/{{}}"
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            _answer(self, lambda: fs.call("DELETE", place, bucket, key, ifGenerationMatch=str(generation)))


class _Writer(io.RawIOBase):
    """An object that is being written. Leaving a `with` block by an error discards it."""

    def __init__(self, path: BucketPath, file: Any):
        self._path, self._file = path, file

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def write(self, data: Any) -> int:
        return _answer(self._path, lambda: self._file.write(data))

    def close(self) -> None:
        if not self.closed:
            super().close()
            if not self._file.closed:
                _answer(self._path, self._file.close)

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is not None:
            self.discard()
        self.close()

    def discard(self) -> None:
        """Forgets what was written."""
        with contextlib.suppress(Exception):
            self._file.discard()
        self._file.closed = True

    def __del__(self) -> None:
        if not self.closed:
            self.discard()
            self.close()


class _TextWriter(io.TextIOWrapper):
    """The text of an object that is being written."""

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is not None:
            cast(Any, self.buffer).discard()
        self.close()
