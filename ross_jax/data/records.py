"""Records of a JSON list or of a JSONL file, each parsed when it is asked for.

    file ─ pieces ─► text ─► one record at a time ─► its place in the file: two integers
                                                 └─► `visit`, for who wants to see every record once

A file is read through once at the start, so corrupt JSON is found before training. Memory holds the places, and one
piece of the file, or one record if that is larger.
"""

import codecs
import hashlib
import io
import json
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ross_jax.config import UserError, required
from ross_jax.data.formats import foreign_format
from ross_jax.data.ranges import NO_CACHES, Caches, open_range
from ross_jax.json_text import check_depth
from ross_jax.storage import StorageError

_BLANK = re.compile(r"[ \t\n\r\ufeff]*")  # white space of JSON, and a byte order mark
_PIECE = 2**20  # bytes that are read at once
MAX_RECORD = 2**24
"""Most bytes of a record. Its objects in memory can take thirty times as much."""
_LONGEST_ATOM = 16  # characters: a number's or word's end, or an escape, that a piece may cut
_DECODER = json.JSONDecoder()

_TOO_LONG = f"a record of more than {MAX_RECORD} bytes (is a quote or a bracket missing? images belong in files)"

Record = dict[str, Any]
Located = tuple[Any, int, int]
"""A JSON value, its first byte in the file, and the byte after its last."""
Hashed = Callable[[bytes], None]
"""Called with each piece of a file."""


@dataclass(frozen=True)
class Version:
    """What is remembered of a source, to notice later that it was changed.

    Attributes:
      path: as the source's config has it.
      records: number of samples.
      fingerprint: changes when the text does.
      size, time: of a single file: its bytes, and when it was changed, in ns; of several files their
        `combined_version`. While both are the same, the text counts as the same and is not hashed again.
    """

    path: str
    records: int
    fingerprint: str
    size: int | None = None
    time: int | None = None

    def changes(self, now: "Version") -> str | None:
        """What differs from this version in a later one; None if the text is the same."""
        if self.fingerprint == now.fingerprint:
            return None
        differing = [
            f"{before} {what} before, {after} now"
            for what, before, after in (("records", self.records, now.records), ("bytes", self.size, now.size))
            if before != after
        ]
        return f"{self.path}: " + ("; ".join(differing) or f"another text in {now.records} records as before")


class RecordFile(Sequence[Record]):
    """Records of a JSON list or, with the suffix .jsonl, of a JSONL file.

    Only places of records are kept, so worker processes hold no copies of the data.

    Args:
      path: the file.
      known: the version that the run recorded. Its fingerprint is taken if size and time of the file are equal.
      visit: called with every record, once.
      caches: what is kept of buckets.

    Attributes:
      version: the file as it was read.

    Raises:
      UserError: the file is missing, empty, no UTF-8, corrupt (line and column given), no list of objects, or of
        another format.
    """

    def __init__(
        self,
        path: str | Path,
        known: Version | None = None,
        visit: Callable[[Record], None] = lambda record: None,
        caches: Caches = NO_CACHES,
    ):
        self.path = str(path)
        try:
            self._file = open_range(path, caches, whole=True)
            size, time = self._file.version
            digest = None if known and (known.size, known.time) == (size, time) else hashlib.sha256()
            with self._file.open() as file:
                self._spans = self._find(file, digest.update if digest else lambda piece: None, visit)
        except StorageError:
            raise
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); give a LLaVA JSON or JSONL file") from error
        fingerprint = digest.hexdigest() if digest else required(known).fingerprint
        self.version = Version(self.path, len(self._spans), fingerprint, size, time)

    def _find(self, file: io.BufferedIOBase, hashed: Hashed, visit: Callable[[Record], None]) -> np.ndarray:
        """int64[records, 2]: the first byte of each record, and the byte after it."""
        if found := foreign_format(file.read(512)):
            raise UserError(f"{self.path}: {found}. Data is a JSON list, or JSON lines in a file named .jsonl")
        file.seek(0)
        lines = self.path.lower().endswith(".jsonl")
        spans, name = array("q"), "line" if lines else "item"
        for number, record, *span in (_lines if lines else _items)(file, self.path, hashed):
            if not isinstance(record, dict):
                raise UserError(
                    f"{self.path}: {name} {number} is a JSON {type(record).__name__}; expected an object with "
                    "'conversations'"
                )
            visit(record)
            spans.extend(span)
            self._one_per_line = lines and number == len(spans) // 2
        if not spans:
            raise UserError(f"{self.path}: is empty: no record in it")
        return np.frombuffer(spans, np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Record:
        start, end = self._spans[index].tolist()
        try:
            return json.loads(self._file.read(start, end - start))
        except StorageError as error:
            raise StorageError(f"{self.place(index)}: {error}") from error
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{self.path}: was changed while it was read; start again") from error

    def place(self, index: int) -> str:
        """How errors name a record: `data.jsonl, record 7 (line 8)`. Records are counted from 0."""
        return f"{self.path}, record {index}" + (f" (line {index + 1})" if self._one_per_line else "")


def _lines(file: io.BufferedIOBase, path: str, hashed: Hashed) -> Iterator[tuple[int, Any, int, int]]:
    """The values of a JSONL file: line, value, first byte, byte after the last. Blank lines are skipped."""
    if file.read(_PIECE).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):  # one line may hold a list of gigabytes
        raise UserError(f"{path}: line 1 is a JSON list, or its beginning; name a file that is one list .json")
    file.seek(0)
    start = 0
    for number, line in enumerate(iter(lambda: file.readline(MAX_RECORD + 1), b""), start=1):
        if len(line) > MAX_RECORD:
            raise _corrupt(path, number, 1, _TOO_LONG)
        hashed(line)
        try:
            text = line.removesuffix(b"\n").decode()
        except UnicodeDecodeError as error:
            raise _no_utf_8(path, start + error.start, number) from error
        first = _BLANK.match(text).end()
        if first < len(text):
            try:
                record, end = _DECODER.raw_decode(text, first)
                check_depth(record)
                if (rest := _BLANK.match(text, end).end()) < len(text):
                    raise json.JSONDecodeError("Extra data", text, rest)
            except json.JSONDecodeError as error:
                several = text[first:].strip() == "{"
                hint = "; write each record in one line, or all as a list into a file named .json" if several else ""
                raise _corrupt(path, number, error.colno, error.msg + hint) from error
            except (ValueError, RecursionError) as error:
                raise _corrupt(path, number, first + 1, str(error)) from error
            yield number, record, start + len(text[:first].encode()), start + len(line)
        start += len(line)


def _items(file: io.BufferedIOBase, path: str, hashed: Hashed) -> Iterator[tuple[int, Any, int, int]]:
    """The items of a JSON list: number from 0, value, first byte, byte after the last."""
    text = _Text(file, path, hashed)
    first = text.skip_blank()
    if not first:
        return
    if first != "[":
        raise text.no_list()
    text.position += 1
    number = 0
    while text.skip_blank() != "]" or number:
        yield number, *text.parse()
        number += 1
        after = text.skip_blank()
        if after == "]":
            break
        if after != ",":
            raise text.corrupt("Expecting ',' or ']'")
        text.position += 1
    text.position += 1
    if text.skip_blank():
        raise text.corrupt("Extra data")


class _Text:
    """UTF-8 text of a file, read in pieces.

        text      | parsed, not yet forgotten | position: parsed next ... |      the rest of the file is not read
                    ^ line, column, byte

    Args:
      hashed: called with each piece of the file.

    Attributes:
      position: place of what is parsed next, in characters of the piece that is in memory.
    """

    def __init__(self, file: io.BufferedIOBase, path: str, hashed: Hashed):
        self._file, self._path, self._hashed = file, path, hashed
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self.position = "", 0
        self._line = self._column = 1
        self._byte = self._counted = self._read = 0

    def skip_blank(self) -> str:
        """Skips white space. Returns the character after it; the empty string at the end of the file."""
        while True:
            self.position = _BLANK.match(self._text, self.position).end()
            if self.position < len(self._text) or not self._more():
                return self._text[self.position : self.position + 1]

    def parse(self) -> Located:
        """The JSON value at `position`, which moves behind it."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self.position)
                check_depth(value)
                if end - self.position > MAX_RECORD:
                    raise ValueError(_TOO_LONG)
                break
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - _LONGEST_ATOM
                if cut and len(self._text) - self.position > MAX_RECORD:
                    raise self.corrupt(_TOO_LONG) from error
                if not cut or not self._more():
                    raise self.corrupt(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:  # a number of 4300 digits, a list in a list in a list ...
                raise self.corrupt(str(error)) from error
        start = self._count(self.position)
        self.position = end
        return value, start, self._count(end)

    def _count(self, position: int) -> int:
        """The byte at which a character is. Positions must not go back."""
        self._byte += len(self._text[self._counted : position].encode())
        self._counted = position
        return self._byte

    def _more(self) -> bool:
        """Forgets what is parsed, and reads at least as much as is left. False at the end of the file."""
        piece = self._file.read(max(_PIECE, len(self._text) - self.position))
        try:
            more = self._decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            line = self._line + self._text.count("\n") + error.object[: error.start].count(b"\n")
            raise _no_utf_8(self._path, self._read + len(piece) - len(error.object) + error.start, line) from error
        if not piece:
            return False
        self._hashed(piece)
        self._read += len(piece)
        self._count(self.position)
        self._line, self._column = self._where(self.position)
        self._text = self._text[self.position :] + more
        self.position = self._counted = 0
        return True

    def _where(self, position: int) -> tuple[int, int]:
        """Line and column of a character."""
        newline = self._text.rfind("\n", 0, position)
        column = position - newline if newline >= 0 else self._column + position
        return self._line + self._text.count("\n", 0, position), column

    def corrupt(self, message: str, position: int | None = None) -> UserError:
        """An error that names line and column of a character, by default of the one at `position`."""
        return _corrupt(self._path, *self._where(self.position if position is None else position), message)

    def no_list(self) -> UserError:
        """An error for a file that begins with another value than a list."""
        kind, rest = "object", ""
        try:
            value, end = _DECODER.raw_decode(self._text, self.position)
            kind, rest = type(value).__name__, self._text[end:].strip()
        except ValueError as error:
            pos = getattr(error, "pos", 0)
            if (
                self._text[self.position] != "{"
                or pos < len(self._text) - _LONGEST_ATOM
                or len(self._text) < _PIECE // 4
            ):
                begins = self._text[self.position : self.position + 20]
                message = (
                    f"{getattr(error, 'msg', error)}; expected a list of conversations, and it begins with {begins!r}"
                )
                return self.corrupt(message, pos)
        hint = "it looks like JSONL: name it .jsonl" if rest else "expected a list of conversations"
        return UserError(f"{self._path}: holds a JSON {kind}, not a list; {hint}")


def _no_utf_8(path: str, byte: int, line: int) -> UserError:
    return UserError(
        f"{path}: is not UTF-8 at byte {byte}, in line {line}; convert it to UTF-8 (`iconv -f ENCODING -t UTF-8`)"
    )


def _corrupt(path: str, line: int, column: int, message: str) -> UserError:
    return UserError(f"{path}: corrupt JSON at line {line}, column {column}: {message}")
