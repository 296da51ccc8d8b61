"""Asks a model the questions of a benchmark, and writes its answers as they come."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from ross_jax.config import UserError
from ross_jax.data.images import decode
from ross_jax.evaluation import prompts
from ross_jax.evaluation.benchmarks import Benchmark, find_benchmark
from ross_jax.evaluation.predictions import PredictionFile, Share, fingerprint
from ross_jax.evaluation.questions import Question, Questions
from ross_jax.evaluation.scores import Answered
from ross_jax.inference.model import Model
from ross_jax.inference.prompts import Request

_CHUNK = 8  # batches that are asked at once; answers are written after each chunk


@dataclasses.dataclass(frozen=True)
class Asking:
    """How questions are asked.

    Attributes:
      prompts: `reference` builds them as the paper's evaluation does; `question` takes the question alone.
      max_new_tokens: length of the longest answer; None: the benchmark's.
      rows: questions that are answered at once.
      limit: number of questions; None: all.
      share: the part of them that this process answers.
    """

    prompts: Literal["reference", "question"] = "reference"
    max_new_tokens: int | None = None
    rows: int = 8
    limit: int | None = None
    share: Share = dataclasses.field(default_factory=Share)


def answer_benchmark(
    model: Model, name: str, found: Questions, folder: Path, asking: Asking, facts: dict[str, Any]
) -> None:
    """Answers questions into a file of predictions; those that it has already are not asked again.

    Args:
      name: of the benchmark.
      folder: of the predictions.
      facts: what identifies the model in the file, such as its directory and step.

    Raises:
      UserError: the model cannot answer at all, or the file holds other predictions.
    """
    questions = found.questions[: asking.limit]
    benchmark = find_benchmark(name)
    tokens = asking.max_new_tokens or benchmark.max_new_tokens
    header = {
        "benchmark": name,
        "questions": len(questions),
        "fingerprint": fingerprint(questions),
        **facts,
        "prompts": asking.prompts,
        "max_new_tokens": tokens,
        "skipped": found.skipped,
        "broken": [{"place": each.place, "reason": each.reason} for each in found.broken],
    }
    file = PredictionFile(asking.share.file(folder, name), header)
    mine = range(asking.share.number, len(questions), asking.share.count)
    left = [number for number in mine if number not in file.done]
    bar = tqdm(total=len(mine), initial=len(mine) - len(left), desc=benchmark.title, unit="question", file=sys.stderr)
    progress = _Progress(bar, model)
    try:
        for first in range(0, len(left), asking.rows * _CHUNK):
            chunk = [(number, questions[number]) for number in left[first : first + asking.rows * _CHUNK]]
            asked = _ask(model, benchmark, chunk, asking, tokens, proven=bool(file.done or first))
            for (number, question), (prompt, prediction, error) in zip(chunk, asked, strict=True):
                if error is None:
                    file.answer(number, question, prompt, prediction)
                else:
                    file.error(number, question, error)
                progress.add(question, prediction)
    finally:
        bar.close()
        file.close()


class _Progress:
    """A bar with the images and the tokens of answers per second."""

    def __init__(self, bar: Any, model: Model):
        self._bar, self._model = bar, model
        self._images = self._tokens = 0

    def add(self, question: Question, prediction: str) -> None:
        self._images += len(question.images)
        self._tokens += len(self._model.tokenizer.encode(prediction, add_special_tokens=False)) + 1 if prediction else 0
        self._bar.update(1)
        seconds = max(self._bar.format_dict["elapsed"], 1e-9)
        rates = f"{self._images / seconds:.1f} images/s, {self._tokens / seconds:.1f} tokens/s"
        self._bar.set_postfix_str(rates, refresh=False)


Result = tuple[str, str, str | None]
"""Prompt, prediction, and why there is none."""


def _ask(
    model: Model,
    benchmark: Benchmark,
    chunk: Sequence[tuple[int, Question]],
    asking: Asking,
    tokens: int,
    proven: bool,
) -> list[Result]:
    """Results of questions. `proven`: the model has answered before, so that what fails now is a question's fault."""
    make = benchmark.prompt if asking.prompts == "reference" else prompts.bare
    texts = [make(question) for _, question in chunk]
    results: list[Result] = [(text, "", None) for text in texts]
    requests: dict[int, Request] = {}
    for i, (_, question) in enumerate(chunk):
        try:
            images = [decode(image.read(), image.name) for image in question.images]
            requests[i] = Request(images, texts[i], max_new_tokens=tokens)
        except (UserError, OSError) as error:
            results[i] = (texts[i], "", str(error))
    try:
        answers = model.ask_many(list(requests.values()), asking.rows)
        for i, answer in zip(requests, answers, strict=True):
            results[i] = (texts[i], answer, None)
    except UserError:
        reasons = {}
        for i, request in requests.items():
            try:
                results[i] = (texts[i], model.ask_many([request], asking.rows)[0], None)
            except UserError as error:
                reasons[i], results[i] = error, (texts[i], "", str(error))
        if not proven and len(reasons) == len(requests) and len({str(error) for error in reasons.values()}) == 1:
            raise
    return results


def collect(model: Model, name: str, found: Questions, asking: Asking) -> list[Answered]:
    """Answers to the questions, without a file. Those that cannot be asked are left out."""
    benchmark, size = find_benchmark(name), asking.rows * _CHUNK
    tokens = asking.max_new_tokens or benchmark.max_new_tokens
    numbered = list(enumerate(found.questions[: asking.limit]))
    answers = []
    for first in range(0, len(numbered), size):
        chunk = numbered[first : first + size]
        asked = _ask(model, benchmark, chunk, asking, tokens, proven=bool(first))
        for (_, each), (prompt, text, error) in zip(chunk, asked, strict=True):
            if error is None:
                answers.append(Answered(each.index, prompt, text, each.answers, each.choices, each.fields))
    return answers
