"""Results of benchmarks as JSON, and as a Markdown table beside the numbers that the paper reports."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ross_jax.config import UserError
from ross_jax.evaluation.benchmarks import MODELS, Result, find_benchmark, score
from ross_jax.evaluation.predictions import Predictions, prediction_files, read_predictions

_LISTED = 20  # broken records in the Markdown report; the JSON has all


@dataclasses.dataclass(frozen=True)
class Scored:
    """A benchmark with its predictions, scores and, if it was asked, those of a public harness."""

    name: str
    predictions: Predictions
    result: Result
    harness: Mapping[str, Any] | None = None


def score_folder(folder: Path, names: Sequence[str] = ()) -> list[Scored]:
    """Scores files of predictions, by default all in a folder.

    Raises:
      UserError: there are none, or one cannot be read.
    """
    files = prediction_files(folder)
    absent = [name for name in names if name not in files]
    if absent or not files:
        raise UserError(f"{folder}: no predictions{' of ' + ', '.join(absent) if absent else ''} in it")
    scored = []
    for name in names or files:
        predictions = read_predictions(files[name])
        skipped = predictions.header.get("skipped", 0)
        result = score(find_benchmark(name), predictions.answers, predictions.broken, skipped)
        scored.append(Scored(name, predictions, result))
    return scored


def write_reports(folder: Path, scored: Sequence[Scored]) -> str:
    """Writes `results.json` and `results.md`, and returns the latter."""
    text = markdown(scored)
    content = json.dumps({each.name: to_json(each) for each in scored}, indent=1, ensure_ascii=False)
    try:
        (folder / "results.json").write_text(content + "\n")
        (folder / "results.md").write_text(text)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from error
    return text


def to_json(scored: Scored) -> dict[str, Any]:
    """Everything known of a benchmark's result. Scores that do not exist are null."""
    benchmark, result = find_benchmark(scored.name), scored.result
    scores = {name: None if math.isnan(value) else value for name, value in result.scores.items()}
    return {
        "title": benchmark.title,
        "metric": benchmark.metric,
        "rule": benchmark.rule,
        "score": scores.get(benchmark.metric),
        "scores": scores,
        "answered": len(result.kept),
        "missing": scored.predictions.missing,
        "left_out": result.left_out,
        "skipped": result.skipped,
        "broken": [{"place": each.place, "reason": each.reason} for each in result.broken],
        "settings": {k: v for k, v in scored.predictions.header.items() if k not in ("broken", "skipped")},
        "paper": dict(zip(MODELS, benchmark.paper, strict=False)),
        **({"vlmeval": scored.harness} if scored.harness is not None else {}),
    }


def markdown(scored: Sequence[Scored]) -> str:
    """A table of main scores beside the paper's, then every score of each benchmark, then broken records."""
    harness = any(each.harness is not None for each in scored)
    columns = ["benchmark", "score", "this run", "rule", *(["VLMEvalKit's own code"] if harness else [])]
    columns += [f"{model} (paper)" for model in MODELS]
    lines = ["# Benchmarks", "", _row(columns), _row(["---"] * len(columns))]
    for each in scored:
        benchmark, scores = find_benchmark(each.name), each.result.scores
        cells = [benchmark.title, benchmark.metric, _number(scores.get(benchmark.metric)), benchmark.rule]
        cells += [_harness(each.harness)] if harness else []
        cells += [f"{value:g}" for value in benchmark.paper] + ["-"] * (len(MODELS) - len(benchmark.paper))
        lines.append(_row(cells))
    lines += ["", "Columns marked (paper) are the paper's numbers. All others are of this run, in percent."]
    for each in scored:
        lines += ["", f"## {find_benchmark(each.name).title}", "", _counts(each), ""]
        lines += [_row(["score", "value"]), _row(["---", "---"])]
        lines += [_row([name, _number(value)]) for name, value in each.result.scores.items()]
        if each.result.broken:
            lines += ["", *(f"- {broken.place}: {broken.reason}" for broken in each.result.broken[:_LISTED])]
            more = len(each.result.broken) - _LISTED
            lines += [f"- and {more} more, all listed in results.json"] if more > 0 else []
    return "\n".join(lines) + "\n"


def _counts(scored: Scored) -> str:
    result = scored.result
    counts = {
        "broken, not scored": len(result.broken),
        "left out, because their group is broken": result.left_out,
        "rows without an image, skipped": result.skipped,
        "not answered yet": scored.predictions.missing,
    }
    return "; ".join([f"{len(result.kept)} answers scored", *(f"{n} {what}" for what, n in counts.items() if n)]) + "."


def _harness(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    return found.get("error") or ", ".join(f"{name} {_number(value)}" for name, value in list(found.items())[:3])


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.2f}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
