"""Accuracy of the demo's answers, by question type."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from ross_jax.config import UserError
from ross_jax.demo.questions import ANSWERS


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Accuracy on one type of question.

    Attributes:
      type: the question type, a key of `ANSWERS`.
      count: number of questions.
      accuracy: share of questions answered correctly, 0 to 1.
      standard_error: standard error of `accuracy`.
      chance: accuracy of guessing among the type's possible answers.
      most_frequent: accuracy of always giving the most frequent answer among these questions.
      z: (accuracy - most_frequent) divided by the standard error of that difference, paired by question; 0 if both
        accuracies are equal.
    """

    type: str
    count: int
    accuracy: float
    standard_error: float
    chance: float
    most_frequent: float
    z: float


def score_answers(
    types: Sequence[str],
    answers: Sequence[str],
    predictions: Sequence[str],
    choices: Mapping[str, Sequence[str]] = ANSWERS,
) -> list[Accuracy]:
    """Accuracy of each question type, in the order of `choices`.

    A prediction is correct if it equals the answer, leading and trailing spaces ignored.

    Args:
      types: type of each question.
      answers: correct answer of each question.
      predictions: the model's answer to each question.
      choices: question type -> possible answers.

    Raises:
      UserError: lengths differ, or a type or an answer is not in `choices`.
    """
    if not len(types) == len(answers) == len(predictions):
        raise UserError(f"{len(types)} types, {len(answers)} answers and {len(predictions)} predictions do not match")
    for kind, answer in set(zip(types, answers, strict=True)):
        if answer not in choices.get(kind, ()):
            raise UserError(f"question type {kind!r} with answer {answer!r} is not known; known are {dict(choices)}")
    results = []
    for kind, possible in choices.items():
        rows = [i for i, other in enumerate(types) if other == kind]
        if not rows:
            continue
        usual = Counter(answers[i] for i in rows).most_common(1)[0][0]
        right = np.array([predictions[i].strip() == answers[i] for i in rows], float)
        baseline = np.array([answers[i] == usual for i in rows], float)
        results.append(
            Accuracy(
                type=kind,
                count=len(rows),
                accuracy=float(right.mean()),
                standard_error=standard_error(right),
                chance=1 / len(possible),
                most_frequent=float(baseline.mean()),
                z=_z(right - baseline),
            )
        )
    return results


def standard_error(values: Float[np.ndarray, " items"]) -> float:
    """Standard error of the mean: population standard deviation divided by the root of the number of values."""
    return float(values.std() / math.sqrt(len(values)))


def _z(differences: Float[np.ndarray, " items"]) -> float:
    mean, error = float(differences.mean()), standard_error(differences)
    return mean / error if error else math.copysign(math.inf, mean) if mean else 0.0


def format_accuracies(results: Mapping[str, Sequence[Accuracy]]) -> str:
    """A table with one line per question type and a last line with the mean over types.

    Args:
      results: model name -> accuracies. All models have the same types in the same order.
    """
    header = f"{'question':15}{'count':>6}{'chance':>8}{'frequent':>9}"
    lines = [header + "".join(f"{name:>20}{'z':>7}" for name in results)]
    for row in zip(*results.values(), strict=True):
        first = row[0]
        cells = "".join(f"{r.accuracy:>12.3f} ± {r.standard_error:.3f}{r.z:>7.1f}" for r in row)
        lines.append(f"{first.type:15}{first.count:>6}{first.chance:>8.3f}{first.most_frequent:>9.3f}{cells}")
    means = "".join(f"{np.mean([r.accuracy for r in rows]):>12.3f}{'':15}" for rows in results.values())
    one = next(iter(results.values()))
    chance, frequent = np.mean([r.chance for r in one]), np.mean([r.most_frequent for r in one])
    lines.append(f"{'mean':15}{sum(r.count for r in one):>6}{chance:>8.3f}{frequent:>9.3f}{means}".rstrip())
    return "\n".join(lines)
