"""Files of predictions: JSON lines that are written as answers come, and from which scores are made.

    OUTPUT/pope.jsonl   {"benchmark": "pope", "questions": 9000, "checkpoint": ..., ...}     the first line
                        {"number": 0, "index": "1", "prompt": ..., "prediction": "Yes", "answers": ["Yes"], ...}
                        {"number": 1, "index": "2", "error": "image is broken", ...}

Several processes write `pope.0-of-2.jsonl` and `pope.1-of-2.jsonl`. A file without the first line can be scored, too.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from ross_jax.config import UserError, brief
from ross_jax.evaluation.questions import Broken, Question
from ross_jax.evaluation.scores import Answered
from ross_jax.json_text import parse_json

_MAX_LINE = 2**26


@dataclasses.dataclass(frozen=True)
class Share:
    """The part of the questions that a process answers: every `count`-th, from `number` on."""

    number: int = 0
    count: int = 1

    def file(self, folder: Path, name: str) -> Path:
        """The share's file of predictions."""
        return folder / (f"{name}.jsonl" if self.count == 1 else f"{name}.{self.number}-of-{self.count}.jsonl")


@dataclasses.dataclass
class Predictions:
    """What a benchmark's files hold, in the order of the questions.

    Attributes:
      header: settings of the run; empty if the files have none.
      answers: answered questions.
      broken: records that were not answered, with those that made no question.
      missing: questions that are not answered yet.
    """

    header: dict[str, Any]
    answers: list[Answered]
    broken: list[Broken]
    missing: int = 0


def fingerprint(questions: Sequence[Question]) -> str:
    """Digest of what is asked, by which a file of predictions is recognised as that of these questions."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(json.dumps([question.index, question.question, question.answers, question.choices]).encode())
    return digest.hexdigest()[:16]


class PredictionFile:
    """A share's file, opened to go on where it ends. A line that an interruption cut is dropped.

    Attributes:
      done: numbers of the questions that it has answers or errors of.

    Raises:
      UserError: the file cannot be written, or holds predictions of other questions, settings or another model.
    """

    def __init__(self, path: Path, header: dict[str, Any]):
        self.done: set[int] = set()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            data = path.read_bytes() if path.is_file() else b""
            whole = data[: data.rfind(b"\n") + 1]
            if whole:
                self._check(path, whole, header)
            self._file: TextIO = path.open("r+" if whole else "w", encoding="utf-8")
            self._file.truncate(len(whole))
            self._file.seek(len(whole))
            if not whole:
                self._write(header)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error

    def _check(self, path: Path, data: bytes, header: dict[str, Any]) -> None:
        lines = [line for _, line in _lines(path, data)]
        found = lines[0] if "number" not in lines[0] else {}
        changed = [name for name, value in header.items() if name != "broken" and found.get(name) != value]
        if changed:
            listed = "; ".join(f"{name} {brief(found.get(name))}, now {brief(header[name])}" for name in changed)
            raise UserError(f"{path}: holds other predictions: {listed}; choose another --output, or remove the file")
        self.done = {line["number"] for line in lines[1:]}

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()

    def answer(self, number: int, question: Question, prompt: str, prediction: str) -> None:
        """Writes an answer."""
        content = {"prompt": prompt, "prediction": prediction, "answers": question.answers, "choices": question.choices}
        self._write({"number": number, "index": question.index, **content, "fields": question.fields})

    def error(self, number: int, question: Question, reason: str) -> None:
        """Writes why a question has no answer."""
        self._write({"number": number, "index": question.index, "error": reason, "fields": question.fields})

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _lines(path: Path, data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, text in enumerate(data.split(b"\n"), 1):
        if text.strip():
            try:
                line = parse_json(text, _MAX_LINE)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: corrupt JSON: {error}") from error
            if not isinstance(line, dict):
                raise UserError(f"{path}, line {number}: a JSON {type(line).__name__}; expected an object")
            yield number, line


def prediction_files(folder: Path) -> dict[str, list[Path]]:
    """Name of a benchmark -> its files of predictions in a folder."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        found.setdefault(path.name.split(".")[0], []).append(path)
    return found


def read_predictions(paths: Sequence[Path]) -> Predictions:
    """Reads the files of a benchmark.

    Raises:
      UserError: a file that cannot be read, or a line without what a scorer needs. Names the line.
    """
    header: dict[str, Any] = {}
    answers: dict[int, Answered] = {}
    broken: dict[int, Broken] = {}
    for path in paths:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
        for number, line in _lines(path, data):
            if "index" not in line and "questions" in line:
                header = line
                continue
            place = line.get("number", number)
            if "error" in line:
                where = f"question {line.get('index')}"
                broken[place] = Broken(where, str(line["error"]), str(line.get("index")), line.get("fields") or {})
            else:
                answers[place] = _answered(f"{path}, line {number}", line)
    unread = [Broken(each["place"], each["reason"]) for each in header.get("broken", ())]
    missing = max(0, header.get("questions", 0) - len(answers) - len(broken))
    ordered = [answers[place] for place in sorted(answers)]
    return Predictions(header, ordered, unread + [broken[place] for place in sorted(broken)], missing)


def _answered(where: str, line: dict[str, Any]) -> Answered:
    answers = line.get("answers", line.get("answer"))
    answers = [answers] if isinstance(answers, str) else answers
    index, prediction = line.get("index"), line.get("prediction")
    if index is None or not isinstance(prediction, str) or not isinstance(answers, list) or not answers:
        raise UserError(f"{where}: expected index, prediction and answers, found {brief(line)}")
    choices = {str(letter): str(text) for letter, text in (line.get("choices") or {}).items()}
    fields = line.get("fields") or {}
    return Answered(str(index), line.get("prompt", ""), prediction.strip(), tuple(map(str, answers)), choices, fields)
