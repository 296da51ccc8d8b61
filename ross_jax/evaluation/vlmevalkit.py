"""Scores of VLMEvalKit's own code, run offline in an environment of its own.

bash launch/setup.sh --env harness        makes .venv-harness
Scored ─► OUTPUT/vlmeval/job.json ─► .venv-harness/bin/python vlmeval_harness.py ─► OUTPUT/vlmeval/scores.json
"""

import dataclasses
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ross_jax.config import UserError, shortened
from ross_jax.evaluation.benchmarks import find_benchmark
from ross_jax.evaluation.report import Scored
from ross_jax.evaluation.scores import Answered

PYTHON = Path(__file__).parents[2] / ".venv-harness" / "bin" / "python"
_SCRIPT = Path(__file__).with_name("vlmeval_harness.py")
_FIELDS = ("category", "l2-category", "split", "g_index")
_LISTS = ("image_vqa.ImageVQADataset", "image_vqa.OCRBench")
"""Classes that read a list of accepted answers."""


def add_scores(scored: Sequence[Scored], folder: Path) -> list[Scored]:
    """Lets VLMEvalKit score the answers, too, as it would score a spreadsheet of predictions.

    Args:
      folder: where predictions in VLMEvalKit's layout and its own results go.

    Raises:
      UserError: the environment is missing, or VLMEvalKit's code does not run.
    """
    if not PYTHON.is_file():
        raise UserError(f"{PYTHON}: not there; make it with `bash launch/setup.sh --env harness`")
    folder.mkdir(parents=True, exist_ok=True)
    job = {each.name: _task(each) for each in scored if find_benchmark(each.name).vlmeval and each.result.kept}
    (folder / "job.json").write_text(json.dumps(job, ensure_ascii=False))
    command = [str(PYTHON), "-P", str(_SCRIPT), str(folder.resolve())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"VLMEvalKit failed: {shortened(done.stderr.strip() or done.stdout.strip())}")
    found = json.loads((folder / "scores.json").read_text())
    return [dataclasses.replace(each, harness=found.get(each.name)) for each in scored]


def _task(scored: Scored) -> dict[str, Any]:
    benchmark = find_benchmark(scored.name)
    assert benchmark.vlmeval is not None
    kind, dataset = benchmark.vlmeval
    return {"class": kind, "dataset": dataset, "rows": [_row(kind, answer) for answer in scored.result.kept]}


def _row(kind: str, answer: Answered) -> dict[str, Any]:
    """A row of VLMEvalKit's table. Yes and no are spelt as it compares them."""
    text = answer.answers[0] if len(answer.answers) == 1 else str(list(answer.answers))
    if kind in _LISTS:
        text = str(list(answer.answers))
    elif kind.startswith("image_yorn"):
        text = text.strip().title()
    fields = {name: answer.fields[name] for name in _FIELDS if name in answer.fields}
    return {
        "index": answer.index,
        "question": answer.prompt.split("\n")[0] or answer.index,
        **answer.choices,
        "answer": text,
        **fields,
        "prediction": answer.prediction,
    }
