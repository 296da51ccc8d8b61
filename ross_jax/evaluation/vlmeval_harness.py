"""Scores predictions with the stock code of ms-vlmeval, which is installed in another environment than ross_jax.

python -P vlmeval_harness.py FOLDER      reads FOLDER/job.json, writes FOLDER/scores.json

Nothing of ross_jax is imported. Connections to other machines are refused, so data is never downloaded.
"""

import importlib
import json
import os
import shutil
import socket
import sys
import types
from importlib.util import find_spec
from pathlib import Path

_IMAGE = "A" * 100  # VLMEvalKit wants an image in its table, and never opens it while it scores
_BARE = ("", ".dataset", ".api")


def import_dataset(name):
    """A class such as `image_mcq.ImageMCQDataset`.

    The package's own `__init__` files import 190 data sets and switch the verification of certificates off. Empty
    modules stand in for them.
    """
    if "vlmeval" not in sys.modules:
        root = Path(find_spec("vlmeval").submodule_search_locations[0])
        for part in _BARE:
            module = types.ModuleType(f"vlmeval{part}")
            module.__path__ = [str(root / part.lstrip("."))]
            sys.modules[module.__name__] = module
    module, _, kind = name.partition(".")
    return getattr(importlib.import_module(f"vlmeval.dataset.{module}"), kind)


def refuse(*args, **kwargs):
    raise OSError("the harness works offline")


def score(folder, task):
    """Metrics that VLMEvalKit gives rows with predictions, in percent: {"Overall": 71.3, ...}."""
    import pandas

    name = task["dataset"]
    work = folder / name
    shutil.rmtree(work, ignore_errors=True)  # results of other predictions would be taken for those of these
    work.mkdir()
    os.environ["LMUData"] = str(work)  # noqa: SIM112
    table = pandas.DataFrame(task["rows"])
    if table["index"].map(str.isdigit).all():
        table["index"] = table["index"].map(int)
    if task["class"] == "image_mcq.MMMUDataset" or name == "MMVP":
        table = table.assign(**{letter: None for letter in "AB" if letter not in table})
    table.drop(columns="prediction").assign(image=_IMAGE).to_csv(work / f"{name}.tsv", sep="\t", index=False)
    kind = import_dataset(task["class"])
    kind.DATASET_MD5 = {}
    dataset = kind(name)
    predictions = work / f"ross_jax_{name}.pkl"  # a spreadsheet turns an empty answer into nan, and 007 into 7
    table.to_pickle(predictions)
    found = dataset.evaluate(str(predictions), model="exact_matching", nproc=1)
    scale = 100 if task["class"].startswith("image_mcq") else 1  # only these are shares
    return {key: scale * value for key, value in flatten(found).items()}


def flatten(found):
    if isinstance(found, dict):
        return {key: float(value) for key, value in found.items()}
    rows = found.to_dict("records")
    metrics = {}
    for row in rows:
        split = row.pop("split", None)
        prefix = f"{split} " if split != "Overall" and len(rows) > 1 else ""
        metrics |= {f"{prefix}{key}": float(value) for key, value in row.items() if value is not None}
    return metrics


def main(folder):
    socket.socket.connect = refuse
    socket.create_connection = refuse
    tasks = json.loads((folder / "job.json").read_text())
    scores = {}
    for name, task in tasks.items():
        try:
            scores[name] = score(folder, task)
        except Exception as error:
            scores[name] = {"error": f"{type(error).__name__}: {error}"}
    (folder / "scores.json").write_text(json.dumps(scores, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
