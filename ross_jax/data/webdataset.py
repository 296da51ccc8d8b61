"""WebDataset shards: tar files in which neighbours with one key make a sample.

    000000123.jpg    the image; several are `000000123.0.jpg`, `000000123.1.jpg`, in the order of the archive
    000000123.json   a record of any layout of `turns`, or one with a `caption`
    000000123.txt    the answer, where the record has no turns

Opening reads the headers and the texts of all shards, and keeps two numbers per sample: where its first header begins,
and where its last member ends. A sample's headers are read again when it is asked for.
"""

import hashlib
import posixpath
import tarfile
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ross_jax.config import UserError
from ross_jax.data.archives import IMAGE_SUFFIXES, reading
from ross_jax.data.fields import TURNS
from ross_jax.data.formats import foreign_format
from ross_jax.data.images import ImageError
from ross_jax.data.ranges import NO_CACHES, Caches, FileRange, Ranges, combined_version, open_ranges
from ross_jax.data.records import MAX_RECORD, Version
from ross_jax.data.samples import LazyImage, Sample, SampleError
from ross_jax.data.spelling import briefly
from ross_jax.json_text import parse_json
from ross_jax.storage import StorageError

_BLOCK = 512  # bytes of a header, and what members are padded to a multiple of
_MAX_EXTENDED = 2**16  # bytes of an extended header
_OPEN_FILES = 64
_AT_ONCE = 16  # shards that are opened at the same time
_TEXTS = (".json", ".txt", ".caption")
_CAPTIONS = ("caption", "text")

Read = Callable[[int, int], bytes]
"""(start, size) -> bytes of a file."""


class Member(NamedTuple):
    """A file in a tar file.

    Attributes:
      name: with forward slashes.
      header: where its first header begins.
      start, size: where its content is.
    """

    name: str
    header: int
    start: int
    size: int

    @property
    def end(self) -> int:
        """Where the next header begins."""
        return self.start + -(-self.size // _BLOCK) * _BLOCK

    @property
    def key(self) -> str:
        """The name up to the first dot after the folder."""
        folder, base = posixpath.split(self.name)
        return posixpath.join(folder, base.partition(".")[0])

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.name)[1].lower()


class WebDataset:
    """Samples of tar files, in the order of the names of the shards and of the members in them.

    Args:
      path: a .tar file, or a folder whose files that end in .tar, in subfolders too, are read.
      known: the version that the run recorded. Its fingerprint is taken if sizes and times of the files are equal.
      caches: what is kept of buckets.

    Attributes:
      version: the files as they were opened.

    Raises:
      UserError: no such file, no tar file, a compressed or damaged one, or no sample.
    """

    def __init__(
        self,
        path: str | Path,
        known: Version | None = None,
        max_image_bytes: int = 2**26,
        caches: Caches = NO_CACHES,
    ):
        self._max_bytes = max_image_bytes
        try:
            self._files = open_ranges(path, ".tar", caches)
        except StorageError:
            raise
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be read ({error.strerror}); give a .tar or a folder") from error
        if not self._files:
            raise UserError(f"{path}: no file in it ends in .tar")
        size, time = combined_version(self._files)
        unchanged = known is not None and (known.size, known.time) == (size, time)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            shards = list(pool.map(lambda file: _kept_index(file, caches, hashed=not unchanged), self._files))
        self._spans = np.concatenate([spans for spans, _ in shards])
        self._ends = np.cumsum([len(spans) for spans, _ in shards])
        if not len(self._spans):
            raise UserError(f"{path}: no sample in it; a sample is neighbours such as 0001.jpg and 0001.json")
        digests = b"".join(digest for _, digest in shards)
        self.fingerprint = known.fingerprint if known and unchanged else hashlib.sha256(digests).hexdigest()
        self.version = Version(str(path), len(self._spans), self.fingerprint, size, time)
        self._open: OrderedDict[int, Ranges] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Sample:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        file = self._file(shard)
        start, end = self._spans[index].tolist()
        name = f"{file.path}, bytes {start} to {end}"
        read = self._reader(file, start, end, name)
        members = list(_members(read, start, end))
        place = f"{file.path}, {briefly(members[0].key)}"
        images = [member for member in members if member.suffix in IMAGE_SUFFIXES]
        try:
            texts = {member.suffix: _text(read, member) for member in members if member.suffix in _TEXTS}
            record = _record(texts, len(images))
        except (ValueError, RecursionError) as error:
            raise SampleError(f"{place}: {error}") from error
        record.setdefault("id", members[0].key)
        record["image"] = [member.name for member in images]
        return Sample(str(record["id"]), record, tuple(self._image(shard, member, read) for member in images), place)

    def _reader(self, file: Ranges, start: int, end: int, name: str) -> Read:
        """Reads a sample. Of a bucket's, all members come at once, because a request takes longer than its bytes."""
        if isinstance(file, FileRange) or end - start > self._max_bytes + MAX_RECORD:
            return file.read
        try:
            data = file.read(start, end - start)
        except StorageError as error:
            raise StorageError(f"{name}: {error}") from error
        return lambda at, size: data[at - start : at - start + size]

    def _image(self, shard: int, member: Member, fetched: Read) -> LazyImage:
        def read() -> bytes:
            if member.size > self._max_bytes:
                raise ImageError(f"has more than {self._max_bytes} bytes; scale it down, or raise data.max_image_bytes")
            file = self._file(shard)
            return (file.read if isinstance(file, FileRange) else fetched)(member.start, member.size)

        name = briefly(member.name)
        return LazyImage(name, lambda: reading(f"{self._files[shard].path}/{name}", read))

    def _file(self, shard: int) -> Ranges:
        """The open file of a shard. Of many shards the latest stay open, and others as long as a thread reads them."""
        file = self._open.pop(shard, None) or self._files[shard].copy()
        self._open[shard] = file
        while len(self._open) > _OPEN_FILES:
            self._open.popitem(last=False)
        return file


def _record(texts: dict[str, str], images: int) -> dict[str, Any]:
    """The record of a sample, from the texts of its members by suffix.

    Raises:
      ValueError: what a member holds is no record.
    """
    record = parse_json(texts[".json"].encode()) if ".json" in texts else {}
    record = {"conversations": record} if isinstance(record, list) else record
    if not isinstance(record, dict):
        raise ValueError(f"its .json holds a JSON {type(record).__name__}; expected an object or a list of turns")
    if any(field in record for field in TURNS):
        return {name: value for name, value in record.items() if name != "images"}
    named = (record[field] for field in _CAPTIONS if isinstance(record.get(field), str))
    caption = texts.get(".txt", texts.get(".caption", next(named, None)))
    identity = {"id": record["id"]} if "id" in record else {}
    if caption is None:
        return identity
    question = "<image>" * images or "Write a text."
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": caption.strip()}]
    return identity | {"conversations": turns}


def _text(read: Read, member: Member) -> str:
    if member.size > MAX_RECORD:
        raise ValueError(f"{briefly(member.name)} has more than {MAX_RECORD} bytes")
    try:
        return read(member.start, member.size).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{briefly(member.name)} is not UTF-8 at byte {error.start}") from error


def _kept_index(file: Ranges, caches: Caches, hashed: bool) -> tuple[np.ndarray, bytes]:
    """As `_index`, which is kept for a shard in a bucket."""
    if isinstance(file, FileRange):
        own = file.copy()
        return _index(own, own.read, hashed)

    def make() -> dict[str, np.ndarray]:
        with file.open() as content:

            def read(start: int, size: int) -> bytes:
                content.seek(start)
                return content.read(size)

            spans, digest = _index(file, read, hashed=True)
        return {"spans": spans, "digest": np.frombuffer(digest, np.uint8)}

    index = caches.index(file, "samples of a tar, 1", make)
    return index["spans"], index["digest"].tobytes()


def _index(file: Ranges, read: Read, hashed: bool) -> tuple[np.ndarray, bytes]:
    """(int64[samples, 2]: begin and end of each sample, hash of names and texts) of a shard."""
    spans, digest, key = array("q"), hashlib.sha256(), None
    try:
        for member in _members(read, 0, file.version[0]):
            if member.suffix not in IMAGE_SUFFIXES and member.suffix not in _TEXTS:
                key = None if member.key != key else key
                continue
            if member.key == key:
                spans[-1] = member.end
            else:
                spans.extend((member.header, member.end))
            key = member.key
            if hashed:
                digest.update(f"{member.name}\0{member.size}\0".encode(errors="surrogateescape"))
                digest.update(read(member.start, min(member.size, MAX_RECORD)) if member.suffix in _TEXTS else b"")
    except tarfile.TarError as error:
        found = foreign_format(read(0, min(_BLOCK, file.version[0])))
        found = found if found and "tar archive" not in found else f"is no tar file that can be read ({error})"
        raise UserError(f"{file.path}: {found}") from error
    return np.frombuffer(spans, np.int64).reshape(-1, 2), digest.digest()


def _members(read: Read, start: int, end: int) -> Iterator[Member]:
    """The regular files whose headers lie between two positions.

    Raises:
      TarError: the file is damaged or cut.
    """
    position, header, extended = start, start, dict[str, str]()
    while position + _BLOCK <= end:
        block = read(position, _BLOCK)
        if block.count(b"\0") == _BLOCK:
            return
        kind, size = block[156:157], _size(block, position)
        size = int(extended.get("size", size))
        content = position + _BLOCK
        if size < 0 or content + size > end:
            raise tarfile.ReadError(f"a member of {size} bytes at byte {position}, where the file ends before")
        position = content + -(-size // _BLOCK) * _BLOCK
        if kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME) and size <= _MAX_EXTENDED:
            extended |= _extended(kind, read(content, size))
        elif kind in (tarfile.REGTYPE, tarfile.AREGTYPE):
            yield Member((extended.get("path") or _name(block)).lstrip("./"), header, content, size)
        if kind not in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            header, extended = position, {}
    if position < end:
        raise tarfile.ReadError(f"no header at byte {position}, where the file ends")


def _size(block: bytes, position: int) -> int:
    """The size in a header, which is octal or, from 8 GiB on, binary.

    Raises:
      TarError: its checksum is wrong, so it is no header.
    """
    try:
        if int(block[148:156].rstrip(b"\0 ") or b"0", 8) != 256 + sum(block[:148]) + sum(block[156:]):
            raise tarfile.ReadError(f"no header at byte {position}")
        if block[124] == 0x80:
            return int.from_bytes(block[125:136], "big")
        return int(block[124:136].rstrip(b"\0 ") or b"0", 8)
    except ValueError as error:
        raise tarfile.ReadError(f"no header at byte {position}") from error


def _name(block: bytes) -> str:
    """The name in a header, after its folder in the format of POSIX."""
    folder = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    name = block[:100].partition(b"\0")[0]
    return (folder + b"/" + name if folder else name).decode("utf-8", "surrogateescape")


def _extended(kind: bytes, content: bytes) -> dict[str, str]:
    """What an extended header says of the next member: `25 path=a/long/name\\n` for each field, or a name alone."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": content.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    fields, position = dict[str, str](), 0
    while position < len(content) and content[position : position + 1].isdigit():
        length, _, _ = content[position:].partition(b" ")
        line = content[position + len(length) + 1 : position + int(length) - 1]
        name, _, value = line.partition(b"=")
        fields[name.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        position += max(1, int(length))
    return fields
