"""Requests in a JSONL file, whose answers go to another one.

Input, a request per line; other fields are those of `Request`, but for `on_text`:

    {"id": 7, "image": "photo.jpg", "prompt": "What is it?", "temperature": 0.5}

Output, in the order in which answers finish:

    {"id": 7, "answer": "A red kite."}
"""

import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from ross_jax.config import UserError, nearest
from ross_jax.inference.model import Model
from ross_jax.inference.prompts import Request
from ross_jax.storage import is_remote

CHUNK = 256
"""Requests whose images are in memory at once."""
_TYPES: dict[str, tuple[type, ...]] = {
    "id": (str, int),
    "image": (str, list),
    "prompt": (str,),
    "history": (list,),
    "max_new_tokens": (int,),
    "temperature": (int, float),
    "top_k": (int,),
    "top_p": (int, float),
    "min_p": (int, float),
    "repetition_penalty": (int, float),
    "seed": (int,),
    "stop": (list,),
}
"""Fields of a line, and the types of their values."""


@dataclasses.dataclass
class Outcome:
    """How many requests of a file were answered now, had an answer before, and could not be used."""

    answered: int = 0
    skipped: int = 0
    broken: int = 0


def answer_file(model: Model, source: Path, target: Path, settings: Mapping[str, Any], rows: int) -> Outcome:
    """Answers the requests of `source` that have no answer in `target` yet, and adds their answers to it.

    Requests that cannot be used are named on stderr, and the others are answered.

    Args:
      settings: fields of `Request` for lines that do not set them.
      rows: requests that are answered at once.

    Raises:
      UserError: a file that cannot be read or written, or a damaged `target`.
    """
    outcome = Outcome()
    try:
        lines = source.read_bytes().split(b"\n")
        if target.exists() and not is_remote(source) and target.samefile(source):
            raise UserError(f"{target}: holds the requests; name another file for the answers")
        done = _answered_ids(target)
        with target.open("a", encoding="utf-8") as output, _Progress() as progress:
            waiting = _read(lines, source, done, settings, outcome, progress)
            progress.start(len(waiting), outcome)
            for first in range(0, len(waiting), CHUNK):
                _answer(model, waiting[first : first + CHUNK], rows, output, outcome, progress)
    except OSError as error:
        raise UserError(f"{error.filename or target}: {error.strerror or error}") from error
    return outcome


@dataclasses.dataclass(frozen=True)
class _Line:
    where: str
    id: str | int
    request: Request


class _Progress:
    """A progress bar on a terminal, and plain lines elsewhere. Messages go to stderr."""

    def __enter__(self):
        self._bar: Any = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def start(self, total: int, outcome: Outcome) -> None:
        self._total = total
        self.say(f"{total} requests to answer, {outcome.skipped} answered before, {outcome.broken} broken")
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, unit="answer")

    def say(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    def step(self, outcome: Outcome) -> None:
        if self._bar is not None:
            self._bar.update()
        elif outcome.answered % max(1, self._total // 20) == 0:
            self.say(f"{outcome.answered} of {self._total} answered")


def _answered_ids(target: Path) -> set[str | int]:
    """Ids that have an answer. A half-written last line is cut off."""
    if not target.exists():
        return set()
    content = target.read_bytes()
    whole = content.rfind(b"\n") + 1
    ids = set()
    for number, line in enumerate(content[:whole].splitlines(), 1):
        try:
            ids.add(json.loads(line)["id"])
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{target}, line {number}: is no answer with an id; remove the line or the file") from error
    if whole < len(content):
        os.truncate(target, whole)
    return ids


def _read(
    lines: list[bytes],
    source: Path,
    done: set[str | int],
    settings: Mapping[str, Any],
    outcome: Outcome,
    progress: _Progress,
) -> list[_Line]:
    """Requests to answer. Broken lines are named and counted."""
    waiting, seen = [], {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{source}, line {number}"
        try:
            record = _record(line)
            if record["id"] in seen:
                raise UserError(f"id {record['id']!r}: line {seen[record['id']]} has it already")
            seen[record["id"]] = number
            if record["id"] in done:
                outcome.skipped += 1
            else:
                waiting.append(_Line(where, record["id"], _request(record, source.parent, settings)))
        except UserError as error:
            outcome.broken += 1
            progress.say(f"error: {where}: {error}")
    return waiting


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"is no JSON ({error})") from error
    if not isinstance(record, dict):
        raise UserError(f"expected an object, found {type(record).__name__}")
    for name in ("id", "prompt"):
        if name not in record:
            raise UserError(f"has no {name!r}")
    for name, value in record.items():
        if name not in _TYPES:
            raise UserError(f"{name!r}: no such field{nearest(name, list(_TYPES))}")
        if not isinstance(value, _TYPES[name]) or isinstance(value, bool):
            expected = " or ".join(each.__name__ for each in _TYPES[name])
            raise UserError(f"{name}: expected {expected}, found {value!r:.80}")
    return record


def _request(record: dict[str, Any], folder: Path, settings: Mapping[str, Any]) -> Request:
    fields = {**settings, **record}
    del fields["id"]
    for name in record.keys() & fields.keys():
        if float in _TYPES[name]:
            fields[name] = float(max(-1e300, min(fields[name], 1e300)))  # JSON has integers beyond a float's range
    images = fields.pop("image", [])
    images = [images] if isinstance(images, str) else images
    for i, turn in enumerate(fields.get("history", ())):
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise UserError(f"history[{i}]: expected [question, answer], found {turn!r:.80}")
    for i, image in enumerate(images):
        if not isinstance(image, str) or not image:
            raise UserError(f"image[{i}]: expected a path, found {image!r:.80}")
    return Request([folder / image for image in images], **fields)


def _answer(
    model: Model, lines: list[_Line], rows: int, output: IO[str], outcome: Outcome, progress: _Progress
) -> None:
    def write(number: int, answer: str) -> None:
        output.write(json.dumps({"id": lines[number].id, "answer": answer}, ensure_ascii=False) + "\n")
        output.flush()
        outcome.answered += 1
        progress.step(outcome)

    def refuse(number: int, error: UserError) -> None:
        outcome.broken += 1
        progress.say(f"error: {lines[number].where}: {error}")

    model.ask_many([line.request for line in lines], rows, write, refuse)
