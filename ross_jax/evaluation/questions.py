"""Questions of a benchmark, from the files in which benchmarks are published.

    POPE.tsv (VLMEvalKit), coco_pope_random.json, Questions.csv (MMVP), *.parquet, *.jsonl
      └─► Question(index="7", question="Is there a dog?", images=(...), answers=("Yes",), choices={}, fields={...})

A record that makes no question becomes a `Broken` with its place and the reason. README.md lists formats and fields.
"""

import ast
import csv
import dataclasses
import io
import json
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from ross_jax.config import UserError, brief
from ross_jax.data.formats import foreign_format
from ross_jax.data.images import ImageError
from ross_jax.data.mounts import decode_base64
from ross_jax.data.parquet import open_parquet, reading_parquet
from ross_jax.data.ranges import open_range
from ross_jax.data.samples import LazyImage
from ross_jax.json_text import parse_json
from ross_jax.storage import StorageError

SUFFIXES = (".tsv", ".jsonl", ".json", ".csv", ".parquet")
_MISSING = "#N/A|#N/A N/A|#NA|-1.#IND|-1.#QNAN|-NaN|-nan|1.#IND|1.#QNAN|<NA>|N/A|NA|NULL|NaN|None|n/a|nan|null"
MISSING = frozenset(["", *_MISSING.split("|")])
"""Cells of a TSV that pandas, and so VLMEvalKit, takes for missing."""
MAX_BYTES = 2**32
_LONGEST_REFERENCE = 64  # characters; a shorter image is the index of the row that has it
_NAMES = {
    "index": ("index", "id", "question_id", "questionId"),
    "question": ("question", "text", "prompt"),
    "answer": ("answers", "answer", "label", "gt_answer"),
    "image": ("image", "images", "image_path", "img", "imageId", "image_id"),
    "choices": ("choices", "options"),
}
"""What is read -> fields that may hold it; the first one that a record has counts."""
_ASIDE = {name for names in _NAMES.values() for name in names if name != "index"} | {"conversations", "ocr_tokens"}

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Question:
    """A question of a benchmark.

    Attributes:
      index: its name in the file.
      question: the text, without marks for images.
      answers: what is right; several if people or authors gave several.
      choices: letter -> option.
      fields: everything else that scores depend on, such as `category` and `split`.
      images: the images, which are read when they are needed.
      hint: text that prompts put before the question.
      ocr_tokens: words that a text recogniser found in the image (TextVQA).
    """

    index: str
    question: str
    answers: tuple[str, ...]
    choices: dict[str, str] = dataclasses.field(default_factory=dict)
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    images: tuple[LazyImage, ...] = ()
    hint: str | None = None
    ocr_tokens: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Broken:
    """A record that cannot be asked or scored: its place, the reason and, where they are known, index and fields."""

    place: str
    reason: str
    index: str | None = None
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Questions:
    """What a benchmark's file holds. `skipped` counts rows without an image, which VLMEvalKit leaves out, too."""

    questions: list[Question]
    broken: list[Broken]
    skipped: int = 0


def read_questions(paths: Sequence[Path], images: tuple[Path, ...] = ()) -> Questions:
    """The questions of files, or of all files of folders.

    Args:
      images: folders that images are searched in, after the file's own folder and its `images`.

    Raises:
      UserError: a file that cannot be read, of a format that is not known, or without any question.
    """
    files = [file for path in paths for file in _files(path)]
    prefixes = {file: f"{file.stem}:" if len(files) > 1 else "" for file in files}
    questions: dict[str, Question] = {}
    broken: list[Broken] = []
    skipped = 0
    for file in files:
        try:
            for number, (place, row) in enumerate(_rows(file)):
                if not isinstance(row, str) and _first(row, "index") is None:
                    row = {**row, "index": f"{prefixes[file]}{number}"}
                found = row if isinstance(row, str) else _question(place, row, _Images(file, images))
                if found is None:
                    skipped += 1
                elif isinstance(found, str):
                    broken.append(Broken(place, found))
                elif found.index in questions:
                    broken.append(Broken(place, f"index {found.index} has come before", None))
                else:
                    questions[found.index] = found
        except StorageError:
            raise
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error
    if not questions:
        reason = f"; the first of {len(broken)} broken records: {broken[0].place}: {broken[0].reason}" if broken else ""
        raise UserError(f"{', '.join(map(str, paths))}: no question in it{reason}")
    found = list(questions.values())
    shared = any(file.suffix.lower() == ".tsv" for file in files)
    return Questions(_with_shared_images(found) if shared else found, broken, skipped)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{path}: expected a file that ends in {', '.join(SUFFIXES)}")
        return [path]
    found = sorted(each for each in path.glob("*") if each.suffix.lower() in SUFFIXES)
    if not found:
        reason = f"no file of {', '.join(SUFFIXES)} in it" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {reason}")
    return found


def _rows(file: Path) -> Iterator[tuple[str, Row | str]]:
    """(place, record), or (place, reason) for what is no record."""
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet_rows(file)
        return
    with file.open("rb") as opened:
        found = foreign_format(opened.read(512))
    if found:
        raise UserError(f"{file}: {found}")
    if suffix in (".tsv", ".csv"):
        yield from _table_rows(file, "\t" if suffix == ".tsv" else ",")
    else:
        yield from _json_rows(file)


def _table_rows(file: Path, delimiter: str) -> Iterator[tuple[str, Row | str]]:
    limit = csv.field_size_limit(2**31 - 1)  # a cell holds an image
    try:
        with io.TextIOWrapper(cast(Any, file.open("rb")), encoding="utf-8-sig", newline="") as opened:
            names: list[str] = []
            for number, row in enumerate(csv.reader(opened, delimiter=delimiter)):
                if not names:
                    names = ["Index" if name == "lndex" else name for name in row]  # MMVP's file has a small L
                    continue
                if len(row) != len(names):
                    yield f"{file}, record {number}", f"{len(row)} cells; the header has {len(names)}"
                    continue
                cells = {name: None if cell in MISSING else cell for name, cell in zip(names, row, strict=True)}
                yield f"{file}, record {number}", _mmvp(cells, number) if "Correct Answer" in cells else cells
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: is no UTF-8 table: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _mmvp(cells: Row, number: int) -> Row | str:
    """A row of MMVP's Questions.csv: `1,Is it open?,(a) Open (b) Closed,(a)`. Two rows make a pair."""
    index, question, options, answer = (cells.get(n) for n in ("Index", "Question", "Options", "Correct Answer"))
    texts = [part.split(")")[1].strip() for part in (options or "").split("(")[1:] if ")" in part]
    letter = (answer or "").strip().lower()[1:2].upper()
    if not index or not question or len(texts) < 2 or letter not in string.ascii_uppercase[: len(texts)] or not letter:
        return f"expected Index, Question, Options `(a) ... (b) ...` and Correct Answer `(a)`, found {brief(cells)}"
    choices = dict(zip(string.ascii_uppercase, texts, strict=False))
    row = {"index": index, "question": question, "answer": letter, "choices": choices, "pair": (number - 1) // 2}
    return row | {"image": f"{index}.jpg"}


def _json_rows(file: Path) -> Iterator[tuple[str, Row | str]]:
    """Records of a JSON list, of JSON lines, of `{"data": [...]}` or of `{index: record}`."""
    data = file.read_bytes()
    extra = {"category": file.stem.removeprefix("coco_pope_")} if file.stem.startswith("coco_pope_") else {}
    prefix = f"{extra['category']}-" if extra else ""
    head = data[: 2**16].lstrip(b"\xef\xbb\xbf \t\r\n")
    if file.suffix.lower() == ".jsonl" or (head.startswith(b"{") and _is_record(head.split(b"\n")[0])):
        for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError as error:
                row = f"corrupt JSON: {error}"
            yield f"{file}, line {number}", _renamed(row, extra, prefix)
        return
    try:
        value = parse_json(data, MAX_BYTES)
    except ValueError as error:
        raise UserError(f"{file}: corrupt JSON: {error}") from error
    if isinstance(value, dict):
        rows = value.get("data")
        value = (
            rows
            if isinstance(rows, list)
            else [row | {"index": index} if isinstance(row, dict) else row for index, row in value.items()]
        )
    if not isinstance(value, list):
        raise UserError(f"{file}: holds a JSON {type(value).__name__}; expected a list of questions")
    for number, row in enumerate(value):
        yield f"{file}, record {number}", _renamed(row, extra, prefix)


def _is_record(line: bytes) -> bool:
    try:
        value = json.loads(line)
    except ValueError:
        return False
    return isinstance(value, dict) and any(name in value for name in (*_NAMES["question"], "conversations"))


def _renamed(row: Any, extra: Row, prefix: str) -> Row | str:
    """A record of POPE with the split that its file is named after; its index is only unique in its file."""
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        return f"a JSON {type(row).__name__}; expected an object"
    name = next((name for name in _NAMES["index"] if name in row), None)
    return row | extra | ({"index": f"{prefix}{row[name]}"} if prefix and name else {})


def _parquet_rows(file: Path) -> Iterator[tuple[str, Row]]:
    with reading_parquet(file):
        number = 0
        with open_parquet(open_range(file)) as opened:
            for batch in opened.iter_batches(256):
                for row in batch.to_pylist():
                    yield f"{file}, record {number}", row
                    number += 1


@dataclasses.dataclass(frozen=True)
class _Images:
    """Finds the images of a file's records."""

    file: Path
    folders: tuple[Path, ...]

    def find(self, value: Any, place: str) -> tuple[LazyImage, ...]:
        """Images that a field names or holds: base64, `{bytes, path}`, a path, or a list of these."""
        if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
            value = ast.literal_eval(value)
        if isinstance(value, list | tuple):
            return tuple(image for each in value for image in self.find(each, place))
        if value is None:
            return ()
        if isinstance(value, dict):
            data, path = value.get("bytes"), value.get("path")
            return (LazyImage(f"{place}, image", lambda: data),) if data else self.find(path, place)
        if isinstance(value, bytes):
            return (LazyImage(f"{place}, image", lambda: value),)
        text = str(value)
        if text.startswith("data:") or (len(text) > _LONGEST_REFERENCE and "." not in text):
            return (LazyImage(f"{place}, image", lambda: _decode(text, place)),)
        name = text if Path(text).suffix else f"{text}.jpg"
        return (LazyImage(f"{place}, image {text}", self._reader(name, text)),)

    def _reader(self, name: str, text: str) -> Callable[[], bytes]:
        here = self.file.parent
        folders = (here, here / "images", here / "MMVP Images", *self.folders)

        def read() -> bytes:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise UserError(f"image {brief(text)}: expected a path inside the folder of images")
            path = next((each / name for each in folders if (each / name).is_file()), None)
            if path is None:
                raise UserError(
                    f"image {brief(text)}: not found in {', '.join(map(str, folders))}; name its folder: --images"
                )
            return path.read_bytes()

        return read


def _decode(text: str, place: str) -> bytes:
    try:
        return decode_base64(text)
    except ImageError as error:
        raise UserError(f"{place}: image {error}") from error


def _first(row: Row, what: str) -> Any:
    return next((row[name] for name in _NAMES[what] if row.get(name) not in (None, "")), None)


def _question(place: str, row: Row, images: _Images) -> Question | str | None:
    """The question of a record; a reason if it makes none; None for a row of a table without its image."""
    index, question, answer = (_first(row, what) for what in ("index", "question", "answer"))
    turns = row.get("conversations")
    if isinstance(turns, list) and len(turns) >= 2 and all(isinstance(turn, dict) for turn in turns[:2]):
        question, answer = question or turns[0].get("value"), answer or turns[1].get("value")
    if not isinstance(question, str):
        return f"has no question; expected one of {', '.join(_NAMES['question'])}, or conversations"
    found = _first(row, "image")
    if found is None:
        found = [row[name] for name in sorted(row) if re.fullmatch(r"image_\d+", name) and row[name] is not None]
        if images.file.suffix.lower() == ".tsv" and "image" in row:
            return None
    try:
        choices, answers = _choices(row), _answers(answer)
        pictures = images.find(found, place)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        return f"a field that cannot be read: {brief(str(error))}"
    if not answers:
        return f"has no answer; expected one of {', '.join(_NAMES['answer'])}"
    tokens = row.get("ocr_tokens")
    return Question(
        index=str(index),
        question=question.replace("<image>\n", "").replace("<image>", "").strip("\n"),
        answers=answers,
        choices=choices,
        fields={
            name: value
            for name, value in row.items()
            if isinstance(value, str | int | float) and name not in _ASIDE and name not in choices and name != "hint"
        },
        images=pictures,
        hint=None if row.get("hint") is None else str(row["hint"]),
        ocr_tokens=tuple(map(str, tokens)) if isinstance(tokens, list) else (),
    )


def _choices(row: Row) -> dict[str, str]:
    """Letter -> option, from fields named A, B, ... or from a list or mapping."""
    value = _first(row, "choices")
    if isinstance(value, str):
        value = ast.literal_eval(value)
    if isinstance(value, list):
        value = dict(zip(string.ascii_uppercase, value, strict=False))
    source = value if isinstance(value, dict) else row
    return {letter: str(source[letter]) for letter in string.ascii_uppercase if source.get(letter) is not None}


def _answers(value: Any) -> tuple[str, ...]:
    """Answers that are accepted. `['12', 'twelve']` in a cell is a list."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        try:
            found = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return (value,)
        value = found if isinstance(found, list) else value
    if isinstance(value, dict):  # VQA: [{"answer": ...}, ...]
        value = value.get("answer")
    if isinstance(value, list):
        return tuple(text for each in value for text in _answers(each))
    return () if value is None else (str(value),)


def _with_shared_images(questions: list[Question]) -> list[Question]:
    """Questions in which an image that names another row is that row's image, as VLMEvalKit saves space."""
    by_index = {question.index: question for question in questions}

    def shared(question: Question) -> Question:
        match = re.search(r", image (\S+)$", question.images[0].name) if len(question.images) == 1 else None
        owner = by_index.get(match[1]) if match and len(match[1]) <= _LONGEST_REFERENCE else None
        return dataclasses.replace(question, images=owner.images) if owner and owner is not question else question

    return [shared(question) for question in questions]
