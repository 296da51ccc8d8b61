"""Metrics on Weights & Biases, offline: the files that it writes are read back."""

import importlib.util
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ross_jax.config import ConfigError
from ross_jax.training import wandb as ours
from ross_jax.training.metrics import Writer

needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb: pip install wandb")


def records(path: Path):
    """Yields the records of an offline file, which is a log of LevelDB: blocks of 32 KiB with pieces of records."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 2**15 - place % 2**15 < 7:
            place += 2**15 - place % 2**15  # the rest of a block is too short for a piece
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # the whole record, or its last piece
            yield Record.FromString(parts)
            parts = b""


@needs_wandb
def test_offline_files_and_later_starts(tmp_path, monkeypatch):
    """Lines, an image and the config are there; a later start goes on with the same W&B run."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "ross-7b"
    folder.mkdir()
    for start in (0, 2):
        wandb = ours.WandbRun(folder, "team/project", {"optimizer.learning_rate": 2e-5})
        writer = Writer(folder, start, wandb=wandb)
        for step in (start + 1, start + 2):
            writer.write(step, {"text_loss": 1.0 / step, "learning_rate/rest": 0.5})
        writer.image("evaluation", start + 2, np.zeros((4, 4, 3), np.uint8))
        writer.close()
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    deadline = time.monotonic() + 60  # wandb's own process may still be writing
    while not all(any(each.HasField("exit") for each in records(file)) for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    found, runs = [], []
    for file in files:
        for record in records(file):
            if record.HasField("run"):
                runs.append(record.run)
            if record.HasField("history"):
                items = record.history.item
                found.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    lines = [line for line in found if "text_loss" in line]
    assert [(line["step"], line["text_loss"]) for line in lines] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]
    assert [line["step"] for line in found if any(key.startswith("evaluation") for key in line)] == [2, 4]
    assert list(folder.glob("wandb/offline-run-*/files/media/images/*.png"))
    identity = (folder / "wandb_id").read_text().strip()
    assert {(run.run_id, run.project, run.entity, run.display_name) for run in runs} == {
        (identity, "project", "team", "ross-7b")
    }
    config = {update.key: json.loads(update.value_json) for run in runs for update in run.config.update}
    assert config["optimizer.learning_rate"] == 2e-5


def test_without_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"config\.loop\.wandb: wandb is not installed; pip install -e '\.\[wandb\]'"):
        ours.WandbRun(tmp_path, "project", {})
