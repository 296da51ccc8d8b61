"""What frozen components make of every picture, computed once and read instead of pixels: a folder of ArrayRecords.

    cache.json                            what is in the folder and what it was made of; written last
    targets-00000-of-00012.arrayrecord    a part, here of the reconstruction's targets, in shards
    features-00000-of-00012.arrayrecord   another: features of the vision encoder

Record r of a part, counted through its shards, belongs to the picture with identity r; record 0 to what an empty slot
holds, a black picture. A record is a byte 1 and then the values of the part's arrays, one after the other; or a byte 0
and, as text, why the picture cannot be used.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  NumPy learns of bfloat16
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from grain.sources import ArrayRecordDataSource

from ross_jax.config import UserError
from ross_jax.data.images import ImageError
from ross_jax.tree import flatten
from ross_jax.upgrade import upgrade

MANIFEST = "cache.json"
FORMAT = 1
SHARD_BYTES = 2**30
"""About what the largest part's shards have."""

Arrays = Mapping[str, np.ndarray]
_KEYS = {"records", "shard_records", "parts", "made_of"}


@dataclass(frozen=True)
class ArraySpec:
    """One array of a part: what it is for one picture."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Of one picture."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Layout:
    """How records are divided into files.

    Attributes:
      records: of every part.
      shard_records: in each shard but the last.
      parts: part -> array -> what it is.
    """

    records: int
    shard_records: int
    parts: Mapping[str, Mapping[str, ArraySpec]]

    @property
    def shards(self) -> int:
        """Files of each part."""
        return -(-self.records // self.shard_records)

    def span(self, shard: int) -> range:
        """The records in a shard."""
        first = shard * self.shard_records
        return range(first, min(first + self.shard_records, self.records))

    def name(self, part: str, shard: int) -> str:
        """Of a shard's file."""
        return f"{part}-{shard:05}-of-{self.shards:05}.arrayrecord"

    def record_bytes(self, part: str) -> int:
        """Of one picture."""
        return 1 + sum(array.nbytes for array in self.parts[part].values())


def plan_layout(records: int, parts: Mapping[str, Mapping[str, ArraySpec]], shard_bytes: int = SHARD_BYTES) -> Layout:
    """Shards of about `shard_bytes` for the largest part."""
    largest = max(Layout(records, 1, parts).record_bytes(part) for part in parts)
    return Layout(records, max(1, shard_bytes // largest), parts)


def encode_record(arrays: Mapping[str, ArraySpec], values: Arrays) -> bytes:
    """A picture's record."""
    parts = [np.ascontiguousarray(values[name], spec.dtype).tobytes() for name, spec in arrays.items()]
    return b"".join([b"\x01", *parts])


def encode_broken(reason: str) -> bytes:
    """The record of a picture that cannot be used."""
    return b"\x00" + reason.encode()


def write_shards(files: Mapping[str, Path], records: Iterable[Mapping[str, bytes]]) -> None:
    """Writes one shard of every part, each file whole or not at all.

    Args:
      files: part -> its file.
      records: part -> record, picture by picture.

    Raises:
      UserError: a file cannot be written: a full disk.
    """
    partial = {part: path.with_name(path.name + ".partial") for part, path in files.items()}
    try:
        writers = {}
        for part, path in partial.items():
            with _writing(path):
                writers[part] = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        for record in records:
            for part, writer in writers.items():
                with _writing(partial[part]):
                    writer.write(record[part])
                    if not writer.ok():
                        writer.close()  # says what is wrong
        for part, writer in writers.items():
            with _writing(partial[part]):
                writer.close()
                with partial[part].open("rb+") as file:
                    os.fsync(file.fileno())
        for part, path in files.items():
            with _writing(path):
                partial[part].replace(path)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns the system's errors, and ArrayRecord's, which are RuntimeErrors, into one that says what goes on."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition(";")[0]
        raise UserError(f"{path}: cannot be written ({reason}); make room, and the same command goes on") from error


def write_json(path: Path, values: Any) -> None:
    """Whole or not at all.

    Raises:
      UserError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with _writing(path):
        try:
            partial.write_text(json.dumps(values, indent=1) + "\n")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """A manifest, in today's names.

    Raises:
      UserError: it is damaged, or of another version.
    """
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    found = values.get("format") if isinstance(values, dict) else None
    if found == FORMAT and _KEYS - values.keys():
        raise UserError(f"{path}: damaged, {sorted(_KEYS - values.keys())} are not in it; make it anew")
    if found != FORMAT:
        raise UserError(f"{path}: format {found}, this version reads {FORMAT}; make it anew with launch/cache.py")
    return upgrade(MANIFEST, values)


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """A line for every value of two nested descriptions that is not the same; lists count as values."""
    there, here = (flatten(json.loads(json.dumps(each))) for each in (theirs, ours))  # JSON knows no tuples
    return [
        f"{name.replace('/', '.')}: {there.get(name)!r} there, {here.get(name)!r} now"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]


class Precomputed:
    """Reads what was computed of pictures, by their identity; it can be pickled to worker processes.

    Args:
      folder: of `launch/cache.py`.
      parts: those to read; None: all.

    Attributes:
      parts: that are read.
      made_of: what it was made of: `images`, and each part's.

    Raises:
      UserError: the folder is none or incomplete; a shard is missing or has another size, by name.
    """

    def __init__(self, folder: Path | str, parts: Sequence[str] | None = None):
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).is_file():
            started = (self.folder / f"{MANIFEST}.partial").is_file()
            what = "not complete: run the same launch/cache.py again" if started else "nothing of launch/cache.py there"
            raise UserError(f"{folder}: {what}")
        manifest = read_json(self.folder / MANIFEST)
        self.made_of = manifest["made_of"]
        self.layout = layout_of(manifest)
        self.parts = tuple(self.layout.parts if parts is None else parts)
        self._check_files(manifest["bytes"])
        self._sources = {part: ArrayRecordDataSource(self._instructions(part)) for part in self.parts}
        self._empty = self.read(0)

    def select(self, parts: Sequence[str]) -> "Precomputed":
        """The same with some of its parts."""
        return Precomputed(self.folder, parts)

    def _check_files(self, sizes: Mapping[str, int]) -> None:
        bad = []
        for name, size in sizes.items():
            path = self.folder / name
            found = path.stat().st_size if path.is_file() else None
            if name.rsplit("-", 3)[0] in self.parts and found != size:
                bad.append(f"{name}: " + ("missing" if found is None else f"{found} bytes, written were {size}"))
        if bad:
            listed = "\n  ".join(bad)
            raise UserError(
                f"{self.folder}: shards are not as they were written:\n  {listed}\n"
                "Remove what is left of them; the launch/cache.py that made them makes them anew"
            )

    def _instructions(self, part: str) -> list[str]:
        # With the numbers of records, no file is opened before it is read.
        shards = range(self.layout.shards)
        return [f"{self._path(part, shard)}[0:{len(self.layout.span(shard))}]" for shard in shards]

    def _path(self, part: str, shard: int) -> Path:
        return self.folder / self.layout.name(part, shard)

    def read(self, image_id: int) -> dict[str, np.ndarray]:
        """The arrays of one picture.

        Raises:
          ImageError: the picture was broken.
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
        except (OSError, RuntimeError, ValueError, IndexError) as error:
            path = self._path(part, image_id // self.layout.shard_records)
            raise UserError(
                f"{path}: damaged ({str(error).partition(' (')[0]}); remove this file, and the launch/cache.py that "
                "made it makes it anew"
            ) from error
        return record

    def empty(self, rows: int, slots: int) -> dict[str, np.ndarray]:
        """Arrays [rows, slots, ...] of a batch in which every slot is empty."""
        return {name: np.tile(value, (rows, slots, *[1] * value.ndim)) for name, value in self._empty.items()}


def layout_of(manifest: Mapping[str, Any]) -> Layout:
    """The layout that a manifest describes."""
    parts = {
        part: {name: ArraySpec(tuple(spec["shape"]), spec["dtype"]) for name, spec in arrays.items()}
        for part, arrays in manifest["parts"].items()
    }
    return Layout(manifest["records"], manifest["shard_records"], parts)
