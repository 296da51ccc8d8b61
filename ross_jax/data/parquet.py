"""Parquet files with embedded images, one or a folder of shards, read at random.

    folder ─► shards ─► row groups ─ decoded, the latest are kept ─► rows ─► samples
                        texts apart from images

Published layouts: LLaVA-NeXT and LLaVA-OneVision (`id, image{bytes, path}, conversations`), FineVision
(`images[{bytes, path}], texts[{user, assistant}]`, ratings), and every layout of `turns`.

A row group is decoded as a whole, so reading rows at random would decode a group for each. Plans therefore shuffle
within windows of groups (`mixture`), and a process keeps the groups that it decoded last. Columns of texts are decoded
apart from those of images, so measuring lengths reads no image.
"""

import contextlib
import functools
import hashlib
import operator
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from pyarrow import parquet

from ross_jax.config import UserError, brief, nearest
from ross_jax.data.archives import reading
from ross_jax.data.fields import IMAGE_FIELDS, KNOWN, READ, TURNS, record_images, turns_field
from ross_jax.data.mounts import Mounts, image_value
from ross_jax.data.ranges import NO_CACHES, Caches, FileRange, Ranges, combined_version, open_ranges
from ross_jax.data.records import Version
from ross_jax.data.samples import LazyImage, Sample, SampleError
from ross_jax.data.turns import no_conversations, sample_name
from ross_jax.storage import StorageError

SHUFFLE_MEMORY = 2**29
"""Bytes of decoded row groups among which samples are shuffled, by default."""
_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_CONDITION = re.compile(r"\s*(\w+)\s*(>=|<=|==|!=|>|<)\s*(.+?)\s*")
_RATINGS = ("_ratings", "_min")  # endings of FineVision's columns for conditions
_AT_ONCE = 16  # shards that are opened at the same time


class _Group(NamedTuple):
    """A row group that has samples.

    Attributes:
      file: number of its file.
      number: its number in the file.
      first: number of its first row in the file.
    """

    file: int
    number: int
    first: int


class ParquetSource:
    """Rows of Parquet files.

    Args:
      path: a file, or a folder, whose files that end in .parquet, in subfolders too, are read in the order of names.
      images: folders and archives of images that rows name.
      where: conditions such as `relevance_min >= 4`. Rows that do not satisfy all of them are left out. If a column has
        a list with a value for each item of `texts`, items are left out, and rows without any left.
      caption: column that becomes the answer.
      known: the version that the run recorded. Its fingerprint is taken if sizes and times of the files are equal.
      memory: bytes of decoded row groups among which samples are shuffled; a process keeps twice as many.
      caches: what is kept of buckets.

    Attributes:
      version: the files as they were opened.
      groups: int64[groups, 2]: samples of each row group, and their bytes in memory.

    Raises:
      UserError: no such file, no Parquet, no column with turns or images, or a condition that fits no column.
    """

    def __init__(
        self,
        path: str | Path,
        images: Sequence[str] = (),
        where: Sequence[str] = (),
        caption: str | None = None,
        known: Version | None = None,
        max_image_bytes: int = 2**26,
        memory: int = SHUFFLE_MEMORY,
        caches: Caches = NO_CACHES,
    ):
        self._path, self._caption, self._where = str(path), caption, tuple(where)
        self._mounts, self._memory = Mounts(images, max_image_bytes, caches), 2 * memory
        self._files = _shards(path, caches)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            shards = list(pool.map(lambda file: _Shard(file, self._where, caption), self._files))
        for shard in shards[1:]:
            if shard.texts != shards[0].texts or shard.images != shards[0].images:
                raise UserError(f"{shard.path}: other columns than {shards[0].path}; give them a source each")
        self._texts, self._images, self._unread = shards[0].texts, shards[0].images, shards[0].unread
        found = [
            (_Group(number, group, first), rows, size)
            for number, shard in enumerate(shards)
            for group, (first, size, rows) in enumerate(shard.groups)
            if len(rows)
        ]
        if not found:
            raise UserError(f"{path}: no row" + (f" satisfies {list(where)}" if where else " in it"))
        self._places = [place for place, *_ in found]
        self._rows = np.concatenate([rows for _, rows, _ in found])
        self.groups = np.array([(len(rows), size) for _, rows, size in found], np.int64)
        self._ends = np.cumsum(self.groups[:, 0])
        size, time = combined_version(self._files)
        if known and (known.size, known.time, known.records) == (size, time, len(self)):
            self.fingerprint = known.fingerprint
        else:
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                hashes = pool.map(_Shard.hash, shards)
                parts = [self._rows.tobytes(), str((self._where, caption)).encode(), *hashes]
                self.fingerprint = hashlib.sha256(b"\0".join(parts)).hexdigest()
        self.version = Version(self._path, len(self), self.fingerprint, size, time)
        self._forget()

    def _forget(self) -> None:
        self._decoded: OrderedDict[tuple[int, bool], tuple[pyarrow.Table, int]] = OrderedDict()
        self._lock, self._loading = threading.Lock(), dict[tuple[int, bool], threading.Lock]()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_decoded", "_lock", "_loading")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._forget()

    def findings(self) -> Iterator[str]:
        """Sentences about columns that are not read."""
        if self._unread:
            yield f"{self._path}: columns that are not read: {', '.join(map(repr, self._unread))}"

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        group, row = int(np.searchsorted(self._ends, index, side="right")), int(self._rows[index])
        file, _, first = self._places[group]
        place = f"{self._files[file].path}, row {first + row}"
        try:
            record = self._values(group, row, images=False)
        except StorageError as error:
            raise StorageError(f"{place}: {error}") from error
        except (pyarrow.ArrowException, OSError) as error:
            raise SampleError(f"{place}: cannot be read: {brief(str(error))}") from error
        kept = _passing(record, self._where)
        for name in {_condition(text)[0] for text in self._where} - READ:
            record.pop(name, None)
        if isinstance(texts := record.get("texts"), list) and len(texts) == len(kept):
            record["texts"] = [text for text, keep in zip(texts, kept, strict=True) if keep]
        if self._caption:
            turns = ("human", "<image>"), ("gpt", record.pop(self._caption, None))
            record["conversations"] = [{"from": role, "value": value} for role, value in turns]
        if turns_field(record) is None and not record_images(record):
            raise SampleError(f"{place}: {sample_name(record)}: {no_conversations(record)}")
        record.setdefault("id", f"{Path(self._files[file].path).name}[{first + row}]")
        return Sample(str(record["id"]), record, self._lazy_images(record, group, row), place)

    def _lazy_images(self, record: dict[str, Any], group: int, row: int) -> tuple[LazyImage, ...]:
        @functools.cache
        def values() -> list[Any]:
            return record_images(record | self._values(group, row, images=True))

        def lazy(number: int, named: Any) -> LazyImage:
            name = image_value(named)
            name = name if isinstance(name, str) else f"image {number}"
            return LazyImage(name, lambda: reading(name, lambda: self._mounts.image(values()[number], number).read()))

        return tuple(lazy(number, named) for number, named in enumerate(record_images(record)))

    def _values(self, group: int, row: int, images: bool) -> dict[str, Any]:
        """Column -> value of a row, without nulls."""
        table = self._table(group, images)
        values = {name: table.column(name)[row].as_py() for name in table.column_names}
        return {name: value for name, value in values.items() if value is not None}

    def _table(self, group: int, images: bool) -> pyarrow.Table:
        """A decoded row group. Threads that ask for the same one wait for the first of them."""
        key = group, images
        with self._lock:
            loading = self._loading.setdefault(key, threading.Lock())
        with loading:
            with self._lock:
                if key in self._decoded:
                    self._decoded.move_to_end(key)
                    return self._decoded[key][0]
            file, number, _ = self._places[group]
            self._files[file].check()
            table = _decode(self._files[file], number, self._images if images else self._texts)
            with self._lock:
                self._decoded[key] = table, table.nbytes
                while len(self._decoded) > 2 and sum(size for _, size in self._decoded.values()) > self._memory:
                    oldest, _ = self._decoded.popitem(last=False)
                    self._loading.pop(oldest, None)
            return table


def _shards(path: str | Path, caches: Caches) -> list[Ranges]:
    try:
        found = open_ranges(path, ".parquet", caches)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: does not exist; give a Parquet file or a folder of them") from error
    except StorageError:
        raise
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give a Parquet file or a folder of them"
        ) from error
    if not found:
        raise UserError(f"{path}: no file in it ends in .parquet")
    return found


@contextlib.contextmanager
def reading_parquet(path: str | Path) -> Iterator[None]:
    """Turns errors of pyarrow into a UserError that names the file."""
    try:
        yield
    except StorageError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: no Parquet file that can be read: {brief(str(error))}") from error


def open_parquet(file: Ranges) -> parquet.ParquetFile:
    """A Parquet file or object. Of an object, ranges that lie side by side are asked for at once."""
    if isinstance(file, FileRange):
        return parquet.ParquetFile(file.path)
    return parquet.ParquetFile(file.open(ahead=False), pre_buffer=True)


def _decode(ranges: Ranges, group: int, columns: Sequence[str]) -> pyarrow.Table:
    with open_parquet(ranges) as file:
        return file.read_row_group(group, list(columns))


class _Shard:
    """What a file says of itself.

    Attributes:
      texts: columns without the content of images. A column of images is represented by the paths in it.
      images: columns of images.
      unread: columns that are not read.
      groups: of each row group: its first row, bytes when it is decoded, and int32[samples], the rows that are samples.
    """

    def __init__(self, ranges: Ranges, where: Sequence[str], caption: str | None):
        self.path, self._ranges = (path := ranges.path), ranges
        with reading_parquet(path), open_parquet(ranges) as file:
            schema, metadata = file.schema_arrow, file.metadata
            leaves = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
            conditions = [_checked(path, text, schema) for text in where]
            if caption and caption not in schema.names:
                raise UserError(f"{path}: no column {caption!r}{nearest(caption, schema.names)}; it has {schema.names}")
            images = [name for name in ("image", "images", *IMAGE_FIELDS) if name in schema.names]
            if not images and not set(TURNS) & set(schema.names):
                raise UserError(f"{path}: no column of {[*TURNS, 'image', 'images']}; it has {schema.names}")
            read = [name for name in schema.names if name in READ or name in {caption, *conditions}]
            unread = set(schema.names) - READ - KNOWN - {caption, *conditions}
            self.unread = sorted(name for name in unread if not name.endswith(_RATINGS))
            self.images = tuple(images)
            self.texts = tuple(sorted(leaf for name in read for leaf in _leaves(name, leaves, name in images)))
            self.groups, first = [], 0
            for number in range(metadata.num_row_groups):
                group = metadata.row_group(number)
                rows = np.arange(group.num_rows, dtype=np.int32)
                if where:
                    rows = _satisfying(file.read_row_group(number, list(dict.fromkeys(conditions))), where)
                self.groups.append((first, group.total_byte_size, rows))
                first += group.num_rows

    def hash(self) -> bytes:
        """Hash of the stored bytes of all columns that are no images."""
        digest = hashlib.sha256()
        with reading_parquet(self.path), open_parquet(self._ranges) as file, self._ranges.open(ahead=False) as content:
            for number in range(file.metadata.num_row_groups):
                group = file.metadata.row_group(number)
                for column in map(group.column, range(group.num_columns)):
                    if {column.path_in_schema, column.path_in_schema.split(".")[0]} & set(self.texts):
                        start = column.dictionary_page_offset or column.data_page_offset
                        content.seek(start)
                        digest.update(content.read(column.total_compressed_size))
        return digest.digest()


def _leaves(name: str, leaves: Sequence[str], is_image: bool) -> list[str]:
    """What is read of a column without the content of images: the paths inside it if it has any, else the column."""
    paths = [leaf for leaf in leaves if leaf.startswith(f"{name}.") and leaf.endswith(".path")]
    return paths if is_image and paths else [name]


def _condition(text: str) -> tuple[str, str, Any]:
    """(column, operator, value) of a condition such as `relevance_min >= 4`."""
    match = _CONDITION.fullmatch(text)
    if not match:
        raise UserError(f"where: {text!r} is no condition; write a column, one of {list(_OPERATORS)} and a value")
    name, sign, value = match.groups()
    try:
        return name, sign, float(value)
    except ValueError:
        return name, sign, value.strip("'\"")


def _checked(path: str, text: str, schema: pyarrow.Schema) -> str:
    """The column of a condition.

    Raises:
      UserError: there is no such column, or it cannot be compared with the value.
    """
    name, _, value = _condition(text)
    if name not in schema.names:
        raise UserError(
            f"{path}: where: {text!r}: no column {name!r}{nearest(name, schema.names)}; it has {schema.names}"
        )
    kind = schema.field(name).type
    kind = kind.value_type if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) else kind
    numbers = pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind)
    if numbers != isinstance(value, float):
        raise UserError(f"{path}: where: {text!r}: the column has {kind} values")
    return name


def _satisfying(table: pyarrow.Table, where: Sequence[str]) -> np.ndarray:
    """int32: numbers of the rows that satisfy all conditions, or of which an item does."""
    kept = np.ones(len(table), bool)
    lists = []
    for text in where:
        name, sign, value = _condition(text)
        column = table.column(name)
        if pyarrow.types.is_nested(column.type):
            lists.append(text)
        else:
            values = column.fill_null(type(value)()).to_numpy()
            kept &= _OPERATORS[sign](values, value) & column.is_valid().to_numpy()
    if lists:
        kept &= [any(_passing(row, lists)) for row in table.to_pylist()]
    return np.flatnonzero(kept).astype(np.int32)


def _passing(row: Mapping[str, Any], where: Sequence[str]) -> list[bool]:
    """Whether each item of a row satisfies all conditions. A single value counts for every item."""
    found = []
    for text in where:
        name, sign, value = _condition(text)
        values = row.get(name)
        values = values if isinstance(values, list) else [values]
        found.append([each is not None and _OPERATORS[sign](each, value) for each in values])
    items = max(map(len, found), default=0)
    return [all(each) for each in zip(*(one * items if len(one) == 1 else one for one in found), strict=False)]
