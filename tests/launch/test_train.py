"""The training launcher, on a recipe of a few lines: starts, continues after a kill, and says what is wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizer_fixtures import byte_level_tokenizer

from ross_jax.checkpoints import RunCheckpoints

REPOSITORY = Path(__file__).parents[2]

RECIPE = """
import sys
sys.path[:0] = [{repository!r}, {tests!r}]
import dataclasses
from ross_jax.config import thaw
from ross_jax.training.recipe import complete
from tiny import CONFIG

def get_config():
    model = dataclasses.replace(CONFIG, language=dataclasses.replace(CONFIG.language, vocab_size=320))
    return complete({{
        "model": thaw(model),
        "text": {{"template": "qwen_2", "tokenizer": {data!r} + "/tokenizer"}},
        "data": {{
            "sources": [{{"path": {data!r} + "/data.json", "images": [{data!r}]}}],
            "packing": {{"length": 256, "images": 2}}, "batch": 4, "epochs": 4,
        }},
        "freeze": {{"trainable": ["language/.*", "projector/.*", "denoiser/.*"]}},
        "optimizer": {{"learning_rate": 1e-3}},
        "step": {{"dtype": "float32", "remat": "none", "text_chunk": 128}},
        "loop": {{"log": 1, "save": 2}},
    }})
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(data / "0.png")
    records = [
        {
            "id": str(i),
            "image": "0.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat?"},
                {"from": "gpt", "value": "a" * (i % 4 + 1)},
            ],
        }
        for i in range(24)
    ]
    (data / "data.json").write_text(json.dumps(records))
    byte_level_tokenizer().save_pretrained(data / "tokenizer")
    path = data / "recipe.py"
    path.write_text(RECIPE.format(repository=str(REPOSITORY), tests=str(REPOSITORY / "tests"), data=str(data)))
    return path


def command(recipe: Path, workdir: Path, *more: str) -> list[str]:
    script = str(REPOSITORY / "launch" / "train.py")
    return [sys.executable, script, f"--config={recipe}", f"--workdir={workdir}", *more]


ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}


def train(*args) -> subprocess.CompletedProcess:
    return subprocess.run(command(*args), capture_output=True, text=True, env=ENVIRONMENT, check=False)


def step_lines(workdir: Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


@pytest.mark.slow
def test_a_killed_run_continues(recipe, tmp_path):
    """SIGTERM saves and exits cleanly; SIGKILL loses what came after the last save; the end is that of a whole run."""
    assert train(recipe, tmp_path / "whole").returncode == 0
    whole = step_lines(tmp_path / "whole")
    for number, at in ((signal.SIGTERM, 2), (signal.SIGKILL, 4)):
        process = subprocess.Popen(command(recipe, tmp_path / "cut"), stderr=subprocess.DEVNULL, env=ENVIRONMENT)
        while process.poll() is None and len(step_lines(tmp_path / "cut")) < at:
            time.sleep(0.01)
        process.send_signal(number)
        code = process.wait()
        if number == signal.SIGTERM:
            assert code == 0
            assert RunCheckpoints(tmp_path / "cut", 2).latest() == len(step_lines(tmp_path / "cut"))
    done = train(recipe, tmp_path / "cut")
    assert done.returncode == 0, done.stderr
    cut = step_lines(tmp_path / "cut")
    assert [line["step"] for line in cut] == [line["step"] for line in whole]
    for name in ("text_loss", "reconstruction_loss", "gradient_norm"):
        assert [line[name] for line in cut] == [line[name] for line in whole], name


@pytest.mark.slow
def test_errors_are_clear(recipe, tmp_path):
    table = {
        "--config.optimizer.learning_rat=1": "learning_rate",
        "--config.data.batch=0": "error: config.data: batch is 0",
        "--config.mesh.data=3": "error: mesh data=3",
        f"--config.text.tokenizer={tmp_path}/absent": "absent",
        f"--config.init=('{tmp_path}/absent',)": "error: .*absent: no such directory",
    }
    for flag, message in table.items():
        done = train(recipe, tmp_path / "run", flag)
        assert done.returncode == 1 and re.search(message, done.stderr), (flag, done.stderr)
        assert "Traceback" not in done.stderr, (flag, done.stderr)
    part = subprocess.run(
        command(REPOSITORY / "configs" / "ross.py:encoder=siglp", tmp_path / "run"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert part.returncode == 1 and "siglip" in part.stderr and "Traceback" not in part.stderr
