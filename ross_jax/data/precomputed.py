"""Outputs of frozen components for every image, computed once by `launch/cache.py` and read in place of pixels.

A cache is a folder of ArrayRecord files:

    cache.json                            manifest: the layout, and what the cache was made of; written last
    targets-00000-of-00012.arrayrecord    first shard of the part `targets`: what the objective reconstructs
    features-00000-of-00012.arrayrecord   first shard of the part `features`: outputs of the vision encoder

A part has one record per image. Records are counted through its shards: record r belongs to the image with identity r,
and record 0 to a black image, which stands for an empty slot.

    record of an image          01 | values of array 1 | values of array 2 | ...
    record of a broken image    00 | UTF-8 text: why it cannot be used
"""

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from grain.sources import ArrayRecordDataSource

from ross_jax.config import UserError
from ross_jax.data.images import ImageError
from ross_jax.data.ranges import NO_CACHES, BucketRange, Caches
from ross_jax.storage import Status, StorageError, copy_file, is_remote, location
from ross_jax.tree import flatten
from ross_jax.upgrade import upgrade

MANIFEST = "cache.json"
FORMAT = 1
SHARD_BYTES = 2**30
"""About the size of the largest part's shards."""

Arrays = Mapping[str, np.ndarray]
_KEYS = {"records", "shard_records", "parts", "made_of"}


@dataclass(frozen=True)
class ArraySpec:
    """Shape and dtype of one array of a part, for one image."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of one image's values."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Layout:
    """How records are divided into files.

    Attributes:
      records: number of records of every part.
      shard_records: number of records of every shard but the last.
      parts: {part: {batch field: its array}}.
    """

    records: int
    shard_records: int
    parts: Mapping[str, Mapping[str, ArraySpec]]

    @property
    def shards(self) -> int:
        """Number of shards of each part."""
        return -(-self.records // self.shard_records)

    def span(self, shard: int) -> range:
        """Numbers of the records in a shard."""
        first = shard * self.shard_records
        return range(first, min(first + self.shard_records, self.records))

    def name(self, part: str, shard: int) -> str:
        """Name of a shard's file."""
        return f"{part}-{shard:05}-of-{self.shards:05}.arrayrecord"

    def record_bytes(self, part: str) -> int:
        """Bytes of one image's record."""
        return 1 + sum(array.nbytes for array in self.parts[part].values())


def plan_layout(records: int, parts: Mapping[str, Mapping[str, ArraySpec]], shard_bytes: int = SHARD_BYTES) -> Layout:
    """A layout whose shards have about `shard_bytes` in the largest part."""
    largest = max(Layout(records, 1, parts).record_bytes(part) for part in parts)
    return Layout(records, max(1, shard_bytes // largest), parts)


def encode_record(arrays: Mapping[str, ArraySpec], values: Arrays) -> bytes:
    """The record of an image, from {batch field: its values}."""
    parts = [np.ascontiguousarray(values[name], spec.dtype).tobytes() for name, spec in arrays.items()]
    return b"".join([b"\x01", *parts])


def encode_broken(reason: str) -> bytes:
    """The record of an image that cannot be used."""
    return b"\x00" + reason.encode()


def write_shards(files: Mapping[str, Path], records: Iterable[Mapping[str, bytes]]) -> None:
    """Writes one shard of every part. If it fails, no incomplete file is left.

    Args:
      files: {part: path of its shard}. One in a bucket is written on this machine first.
      records: {part: record} for each image, in order.

    Raises:
      UserError: a file cannot be written, as on a full disk.
    """
    with contextlib.ExitStack() as stack:
        partial = {part: path.with_name(path.name + ".partial") for part, path in files.items()}
        if any(map(is_remote, files.values())):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ross_jax_")))
            partial = {part: folder / path.name for part, path in files.items()}
        for path in partial.values():
            stack.callback(path.unlink, missing_ok=True)
        writers = {}
        for part, path in partial.items():
            with _writing(path):
                writers[part] = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        for record in records:
            for part, writer in writers.items():
                with _writing(partial[part]):
                    writer.write(record[part])
                    if not writer.ok():
                        writer.close()  # raises the reason
        for part, writer in writers.items():
            with _writing(partial[part]):
                writer.close()
                with partial[part].open("rb+") as file:
                    os.fsync(file.fileno())
        for part, path in files.items():
            with _writing(path):
                copy_file(partial[part], path) if is_remote(path) else partial[part].replace(path)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns errors of the system, and ArrayRecord's RuntimeErrors, into a UserError that names the file."""
    try:
        yield
    except StorageError:
        raise
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition(";")[0]
        raise UserError(
            f"{path}: cannot be written ({reason}); free the disk and run the same command again"
        ) from error


def write_json(path: Path, values: Any) -> None:
    """Writes a JSON file. If it fails, no incomplete file is left.

    Raises:
      UserError: the file cannot be written.
    """
    text = json.dumps(values, indent=1) + "\n"
    if is_remote(path):
        path.write_text(text)
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with _writing(path):
        try:
            partial.write_text(text)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """The content of a manifest, in today's names.

    Raises:
      UserError: it is damaged, or has another format.
    """
    try:
        values = json.loads(path.read_text())
    except StorageError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    found = values.get("format") if isinstance(values, dict) else None
    if found == FORMAT and _KEYS - values.keys():
        raise UserError(f"{path}: damaged, {sorted(_KEYS - values.keys())} are not in it; make the cache again")
    if found != FORMAT:
        raise UserError(f"{path}: format {found}, this version reads {FORMAT}; make the cache again")
    return upgrade(MANIFEST, values)


def differences(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """A line for every value that differs between two nested descriptions. A list counts as one value."""
    there, here = (flatten(json.loads(json.dumps(each))) for each in (recorded, current))  # tuples become lists
    return [
        f"{name.replace('/', '.')}: {there.get(name)!r} there, {here.get(name)!r} now"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]


class Precomputed:
    """Reader of a cache, by the identity of images. It can be pickled to worker processes.

    Args:
      folder: what `launch/cache.py` wrote.
      parts: names of the parts to read; None: all.
      caches: what is kept of buckets.

    Attributes:
      folder: path of the cache.
      parts: names of the parts that are read.
      made_of: description of the images and, for each part, of the component that computed it.

    Raises:
      UserError: the folder holds no cache or an incomplete one; a shard is missing or has another size; or the folder
        lies in a bucket, and the local cache has no room for it.
    """

    def __init__(self, folder: Path | str, parts: Sequence[str] | None = None, caches: Caches = NO_CACHES):
        self.folder, self._caches = location(folder), caches
        if not (self.folder / MANIFEST).is_file():
            started = (self.folder / f"{MANIFEST}.partial").is_file()
            what = "is not complete: run the same launch/cache.py again" if started else "holds no cache"
            raise UserError(f"{folder}: {what}")
        manifest = read_json(self.folder / MANIFEST)
        self.made_of = manifest["made_of"]
        self.layout = layout_of(manifest)
        self.parts = tuple(self.layout.parts if parts is None else parts)
        sizes = {name: size for name, size in manifest["bytes"].items() if name.rsplit("-", 3)[0] in self.parts}
        self._statuses = self._check_files(sizes)
        self._sources = {part: self._open(part) for part in self.parts}
        self._empty = self.read(0)

    def select(self, parts: Sequence[str]) -> "Precomputed":
        """A reader of some of the parts."""
        return Precomputed(self.folder, parts, self._caches)

    def _check_files(self, sizes: Mapping[str, int]) -> dict[str, Status]:
        """Compares the sizes of files. Returns {name: status} of those in a bucket."""
        statuses: dict[str, Status] = {}
        if is_remote(self.folder):
            statuses = {path.name: status for path, status in self.folder.files().items()}
            found = {name: status.st_size for name, status in statuses.items()}
            local = self._caches.local
            if local is None or sum(sizes.values()) > local.limit:
                raise UserError(
                    f"{self.folder}: {sum(sizes.values()):,} bytes of precomputed arrays must lie on this machine to "
                    "be read; set data.local_cache to a folder, and data.local_cache_gb to more than that"
                )
        else:
            paths = [self.folder / name for name in sizes]
            found = {path.name: path.stat().st_size for path in paths if path.is_file()}
        bad = [
            f"{name}: " + (f"{found[name]} bytes instead of {size}" if name in found else "missing")
            for name, size in sizes.items()
            if found.get(name) != size
        ]
        if bad:
            listed = "\n  ".join(bad)
            raise UserError(
                f"{self.folder}: shards are not as they were written:\n  {listed}\n"
                "Remove them and run the same launch/cache.py again, which writes them again"
            )
        return statuses

    def _open(self, part: str) -> Any:
        """Records of a part, by number."""
        # Given the number of records, ArrayRecord opens no file before it is read.
        shards = range(self.layout.shards)
        paths = [self._path(part, shard) for shard in shards]
        if self._statuses:
            files = [BucketRange(path, self._caches, self._statuses[path.name]) for path in paths]
            return _Fetched(files, self.layout.shard_records)
        return ArrayRecordDataSource([f"{paths[s]}[0:{len(self.layout.span(s))}]" for s in shards])

    def _path(self, part: str, shard: int) -> Path:
        return self.folder / self.layout.name(part, shard)

    def read(self, image_id: int) -> dict[str, np.ndarray]:
        """{batch field: array} of one image.

        Raises:
          ImageError: the image was broken when the cache was made.
          UserError: the shard is damaged.
        """
        values: dict[str, np.ndarray] = {}
        for part in self.parts:
            record = self._record(part, image_id)
            if not record[0]:
                raise ImageError(record[1:].decode())
            start = 1
            for name, spec in self.layout.parts[part].items():
                array = np.frombuffer(record, spec.dtype, math.prod(spec.shape), start)
                values[name] = array.reshape(spec.shape)
                start += spec.nbytes
        return values

    def _record(self, part: str, image_id: int) -> bytes:
        try:
            record = self._sources[part][image_id]
            if record[:1] != b"\x00" and len(record) != self.layout.record_bytes(part):
                raise ValueError(f"record of {len(record)} bytes, expected {self.layout.record_bytes(part)}")
        except UserError:
            raise
        except (OSError, RuntimeError, ValueError, IndexError) as error:
            path = self._path(part, image_id // self.layout.shard_records)
            raise UserError(
                f"{path}: damaged ({str(error).partition(' (')[0]}); remove this file and run the same "
                "launch/cache.py again, which writes it again"
            ) from error
        return record

    def empty(self, rows: int, slots: int) -> dict[str, np.ndarray]:
        """{batch field: array[rows, slots, ...]} of a batch whose slots are all empty."""
        return {name: np.tile(value, (rows, slots, *[1] * value.ndim)) for name, value in self._empty.items()}


class _Fetched:
    """Records of shards in a bucket. Each shard lies in the local cache as a whole from its first record on.

    Args:
      files: the shards.
      records: number of records of each but the last.
    """

    def __init__(self, files: Sequence[BucketRange], records: int):
        self._files, self._records = files, records
        self._opened: dict[int, ArrayRecordDataSource] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}

    def __getitem__(self, index: int) -> bytes:
        shard, number = divmod(index, self._records)
        if shard not in self._opened:
            self._opened[shard] = ArrayRecordDataSource(str(self._files[shard].on_this_machine()))
        return self._opened[shard][number]


def layout_of(manifest: Mapping[str, Any]) -> Layout:
    """The layout that a manifest describes."""
    parts = {
        part: {name: ArraySpec(tuple(spec["shape"]), spec["dtype"]) for name, spec in arrays.items()}
        for part, arrays in manifest["parts"].items()
    }
    return Layout(manifest["records"], manifest["shard_records"], parts)
