"""Scores of a benchmark from its answers: shares in percent, by the rules of `matching`.

    SCORERS["yes_no"]([Answered(prediction="Yes.", answers=("Yes",), ...), ...])
      └─► {"accuracy": 100.0, "f1": 100.0, "yes_ratio": 100.0, ..., "category/random/accuracy": 100.0}

A name that ends in `_vlmeval` or `_lmms` follows that harness where it differs from what the paper was scored with.
"""

import dataclasses
import string
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ross_jax.evaluation import matching


@dataclasses.dataclass(frozen=True)
class Answered:
    """A question with the model's answer. Fields are those of `Question`."""

    index: str
    prompt: str
    prediction: str
    answers: tuple[str, ...]
    choices: dict[str, str] = dataclasses.field(default_factory=dict)
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)


Scores = dict[str, float]
Scorer = Callable[[Sequence[Answered]], Scores]
_RULES: tuple[tuple[str, matching.Rule], ...] = (("accuracy", "paper"), ("accuracy_vlmeval", "vlmeval"))
FORMULAS = "Handwritten Mathematical Expression Recognition"
_CIRCLE = 10**6
"""MMBench asks a question with rotated options under the index plus a multiple of this."""


def percent(values: Iterable[Any]) -> float:
    """Mean of numbers or truth values, in percent; NaN if there are none."""
    found = np.array([float(value) for value in values])
    return 100 * float(found.mean()) if found.size else float("nan")


def _by(records: Sequence[Answered], name: str) -> dict[str, list[Answered]]:
    """Records by the values of a field; empty if no record has it."""
    groups: dict[str, list[Answered]] = {}
    for record in records:
        if name in record.fields:
            groups.setdefault(str(record.fields[name]), []).append(record)
    return dict(sorted(groups.items()))


def _with_groups(records: Sequence[Answered], measure: Scorer, names: Sequence[str]) -> Scores:
    """Scores of all records, and of each value of the fields, as `split/test/accuracy`."""
    scores = measure(records)
    for name in names:
        for value, group in _by(records, name).items():
            scores |= {f"{name}/{value}/{metric}": score for metric, score in measure(group).items()}
    return scores


def yes_no(records: Sequence[Answered]) -> Scores:
    """POPE. A record whose category is `random,popular` counts once in each, as in VLMEvalKit."""
    spread = [
        dataclasses.replace(record, fields=record.fields | {"category": category})
        for record in records
        for category in str(record.fields.get("category", "")).split(",")
    ]
    if not any("category" in record.fields for record in records):
        return _yes_no(records)
    return _with_groups(spread, _yes_no, ("category",))


def _yes_no(records: Sequence[Answered]) -> Scores:
    truth = np.array([record.answers[0].strip().lower() == "yes" for record in records])
    read = [matching.read_yes_no(record.prediction) for record in records]
    exact = [record.prediction.strip().lower() for record in records]
    right = [answer == ("Yes" if true else "No") for answer, true in zip(read, truth, strict=True)]
    right_exactly = [answer == ("yes" if true else "no") for answer, true in zip(exact, truth, strict=True)]
    said_yes = np.array([answer == "Yes" for answer in read])
    said_exactly, said_no_exactly = (np.array([answer == word for answer in exact]) for word in ("yes", "no"))
    return {
        "accuracy": percent(right),
        **_f1(truth, said_yes, ~said_yes, ""),
        "yes_ratio": percent(said_yes),
        "unknown": percent(answer == "Unknown" for answer in read),
        "accuracy_lmms": percent(right_exactly),
        **_f1(truth, said_exactly, said_no_exactly, "_lmms"),
        "yes_ratio_lmms": percent(truth),
    }


def _f1(truth: np.ndarray, yes: np.ndarray, no: np.ndarray, suffix: str) -> Scores:
    hits = int((truth & yes).sum())
    precision = hits / found if (found := hits + int((~truth & yes).sum())) else 0.0
    recall = hits / there if (there := hits + int((truth & no).sum())) else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    values = {"f1": f1, "precision": precision, "recall": recall}
    return {f"{name}{suffix}": 100 * value for name, value in values.items()}


def hallusion(records: Sequence[Answered]) -> Scores:
    """HallusionBench: share of right answers, of figures and of questions of which all answers are right."""
    return _with_groups(records, _hallusion, ("category", "l2-category"))


def _hallusion(records: Sequence[Answered]) -> Scores:
    right = [matching.read_yes_no(record.prediction) == record.answers[0].strip().title() for record in records]
    scores = {"aAcc": percent(right)}
    for name, part in (("fAcc", "figure"), ("qAcc", "question")):
        groups: dict[Hashable, list[bool]] = {}
        for record, hit in zip(records, right, strict=True):
            groups.setdefault(hallusion_group(record.index, record.fields, part), []).append(hit)
        scores[name] = percent(map(all, groups.values()))
    return scores


def hallusion_group(index: str, fields: Mapping[str, Any], part: str) -> Hashable:
    """Category, set, and figure or question of a record, from `VS_chart_..._SET_FIGURE_QUESTION`."""
    names = index.split("_")
    if len(names) < 6:
        return index
    return str(fields.get("l2-category")), names[3], names[4 if part == "figure" else 5]


def _hits(records: Sequence[Answered], rule: matching.Rule) -> list[bool]:
    return [matching.read_choice(r.prediction, r.choices, rule) == r.answers[0] for r in records]


def _choice(records: Sequence[Answered]) -> Scores:
    return {name: percent(_hits(records, rule)) for name, rule in _RULES}


def choice(records: Sequence[Answered]) -> Scores:
    """Multiple choice."""
    return _with_groups(records, _choice, ("split", "l2-category", "category"))


def mmmu(records: Sequence[Answered]) -> Scores:
    """MMMU. An open question becomes a choice between its answer and `Other Answers`, as in VLMEvalKit."""

    def closed(record: Answered) -> Answered:
        answer = record.answers[0] if len(record.answers) == 1 else str(list(record.answers))
        truth = answer if len(answer) == 1 and answer in string.ascii_uppercase else "A"
        choices = record.choices if "A" in record.choices else record.choices | {"A": answer, "B": "Other Answers"}
        return dataclasses.replace(record, answers=(truth,), choices=dict(sorted(choices.items())))

    return choice([closed(record) for record in records])


def circular_group(index: str, fields: Mapping[str, Any]) -> int:
    """Index of the question whose options a record of MMBench rotates: 1000007 belongs to 7."""
    return int(float(fields["g_index"])) if "g_index" in fields else int(index) % _CIRCLE


def circular(records: Sequence[Answered]) -> Scores:
    """MMBench: a question counts as right if all rotations of its options are answered rightly."""
    members: dict[int, list[Answered]] = {}
    for record in records:
        members.setdefault(circular_group(record.index, record.fields), []).append(record)
    first = [record for record in records if circular_group(record.index, record.fields) == int(record.index)]

    def measure(part: Sequence[Answered]) -> Scores:
        groups = [members[circular_group(record.index, record.fields)] for record in part]
        scores = {name: percent(all(_hits(group, rule)) for group in groups) for name, rule in _RULES}
        return scores | {"accuracy_first": percent(_hits(part, "paper"))}

    return _with_groups(first, measure, ("split", "l2-category", "category"))


def mmvp(records: Sequence[Answered]) -> Scores:
    """MMVP: share of pairs, told by the field `pair`, of which both answers are right, and of right answers."""
    right = [
        matching.is_mmvp_choice(record.prediction, record.answers[0], record.choices.get(record.answers[0], ""))
        for record in records
    ]
    scores = {}
    for suffix, hits in (("", right), ("_vlmeval", _hits(records, "vlmeval"))):
        pairs: dict[Any, list[bool]] = {}
        for record, hit in zip(records, hits, strict=True):
            pairs.setdefault(record.fields["pair"], []).append(hit)
        scores |= {f"pairs{suffix}": percent(map(all, pairs.values())), f"accuracy{suffix}": percent(hits)}
    return scores


def gqa(records: Sequence[Answered]) -> Scores:
    """GQA: the answer is the expected text, case and punctuation ignored."""
    return {
        "accuracy": percent(matching.same_text(r.prediction, r.answers[0], "paper") for r in records),
        "accuracy_vlmeval": percent(
            any(matching.same_text(r.prediction, a, "vlmeval") for a in r.answers) for r in records
        ),
    }


def chart(records: Sequence[Answered]) -> Scores:
    """ChartQA: relaxed accuracy."""

    def measure(part: Sequence[Answered]) -> Scores:
        return {"accuracy": percent(any(matching.relaxed(r.prediction, a) for a in r.answers) for r in part)}

    return _with_groups(records, measure, ("split", "type"))


def text(records: Sequence[Answered]) -> Scores:
    """TextVQA: agreement with ten people."""
    return {
        "accuracy": percent(matching.vqa_accuracy(r.prediction, r.answers, "paper") for r in records),
        "accuracy_vlmeval": percent(matching.vqa_accuracy(r.prediction, r.answers, "vlmeval") for r in records),
    }


def document(records: Sequence[Answered]) -> Scores:
    """DocVQA and InfoVQA: ANLS."""
    return {"anls": percent(matching.anls(r.prediction, r.answers) for r in records)}


def ocr(records: Sequence[Answered]) -> Scores:
    """OCRBench: the number of right answers, which is of 1000 if the file is whole."""

    def measure(part: Sequence[Answered]) -> Scores:
        right = [
            matching.contains(r.prediction, r.answers, FORMULAS in (r.fields.get("category"), r.fields.get("type")))
            for r in part
        ]
        return {"score": float(sum(right)), "accuracy": percent(right)}

    return _with_groups(records, measure, ("category",))


def exact(records: Sequence[Answered]) -> Scores:
    """Own questions: the answer is one of the expected texts, surrounding space ignored."""

    def measure(part: Sequence[Answered]) -> Scores:
        return {"accuracy": percent(r.prediction.strip() in [a.strip() for a in r.answers] for r in part)}

    return _with_groups(records, measure, ("type", "category", "split"))
