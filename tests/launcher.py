"""Helpers that load scripts of launch/ as modules and run launch/train.py on a tiny model and one image."""

import contextlib
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ross_jax import checkpoints
from ross_jax.config import to_dict
from ross_jax.tree import flatten
from tiny_model import SIZED
from tokenizer_fixtures import byte_level_tokenizer

REPOSITORY = Path(__file__).parents[1]

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: bash launch/setup.sh tpu"
)
needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs the CUDA plugin: bash launch/setup.sh cuda"
)

RECIPE = """
from ross_jax.training.recipe import complete

def get_config():
    return complete({{
        "model": {model!r},
        "init_random": ["vision", "projector", "language", "autoencoder"],
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


SHORT = ("--config.data.epochs=2",)
"""12 steps."""
SPREAD = (*SHORT, "--config.mesh.data=2", "--config.mesh.fsdp=2")
"""A mesh of which two processes hold different rows, for 12 steps."""


def load_script(name: str) -> ModuleType:
    """Loads `launch/NAME.py` as a module, for its `main`."""
    spec = importlib.util.spec_from_file_location(f"launch_{name}", REPOSITORY / "launch" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_records(count: int = 24) -> list[dict[str, Any]]:
    """Conversations about one image."""
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": ""}]
    return [
        {"id": str(i), "image": "0.png", "conversations": [turns[0], turns[1] | {"value": "a" * (i % 4 + 1)}]}
        for i in range(count)
    ]


def write_recipe(folder: Path) -> Path:
    """Writes data, tokenizer and a recipe of 24 steps."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(folder / "0.png")
    (folder / "data.json").write_text(json.dumps(make_records()))
    byte_level_tokenizer().save_pretrained(folder / "tokenizer")
    path = folder / "recipe.py"
    path.write_text(RECIPE.format(model=to_dict(SIZED), data=str(folder)))
    return path


def command(recipe: Path | str, workdir: Path, *more: str) -> list[str]:
    """The command line of launch/train.py."""
    script = str(REPOSITORY / "launch" / "train.py")
    return [sys.executable, script, f"--config={recipe}", f"--workdir={workdir}", *more]


def environment(devices: int = 1) -> dict[str, str]:
    """Environment of a run on the given number of virtual CPU devices. The compilation cache is shared."""
    flags = re.sub(r"(?<=device_count=)\d+", str(devices), os.environ["XLA_FLAGS"])
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def train(*args: Any, devices: int = 1) -> subprocess.CompletedProcess:
    """Runs `command(*args)` until it exits."""
    environ = environment(devices)
    return subprocess.run(command(*args), capture_output=True, text=True, env=environ, check=False, timeout=600)


@contextlib.contextmanager
def two_processes(recipe, workdir, *flags, folders=(None, None), logs=None):
    """Two processes of two devices each, and their output files. Kills both at the end."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    cluster = ("--distributed", f"--coordinator=localhost:{port}", "--processes=2")
    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(((logs or workdir.parent) / f"{workdir.name}.{i}.log").open("w+")) for i in range(2)
        ]
        processes = [
            subprocess.Popen(
                command(recipe, workdir, *flags, *cluster, f"--process={i}"),
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment(devices=2),
                cwd=folders[i],
            )
            for i, file in enumerate(files)
        ]
        try:
            yield processes, files
        finally:
            for process in processes:
                process.kill()
                process.wait()


def step_lines(workdir: Path) -> list[dict[str, Any]]:
    """Lines of metrics that a run has completed."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def losses(workdir: Path) -> np.ndarray:
    """float64 [steps, 4]: step number, text loss, reconstruction loss, gradient norm."""
    names = ("step", "text_loss", "reconstruction_loss", "gradient_norm")
    return np.array([[line[name] for name in names] for line in step_lines(workdir)])


def parameters(workdir: Path) -> dict[str, np.ndarray]:
    """Path -> parameter of a run."""
    return flatten(checkpoints.restore_model(workdir, checkpoints.model_abstract(workdir)))


def data_workers(run: int) -> list[int]:
    """Process ids of the data workers of a run, from its own."""
    children = [int(text) for file in Path(f"/proc/{run}/task").glob("*/children") for text in file.read_text().split()]
    return [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
