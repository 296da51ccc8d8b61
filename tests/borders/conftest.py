"""Scripts of launch/ as users call them, and a run that is quick to start."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import REPOSITORY, load_script, write_recipe
from tiny_model import write_model

GOLDEN = REPOSITORY / "tests" / "golden"

RECIPE = """
import json
import sys
from pathlib import Path
from ml_collections import ConfigDict
sys.path.insert(0, {folder!r})
from recipe import get_config as full

def get_config():
    config = full()
    model = json.loads(Path({folder!r}, "model", "ross_jax.json").read_text())["config"]
    model["projector"] = {{"kind": "mlp", "in_size": 40, "out_size": 72, "depth": 2}}
    config.model = ConfigDict(model)
    config.init = ({folder!r} + "/model",)
    config.freeze.trainable = ("language/.*", "projector/.*")
    config.reconstruction.kind = "none"
    config.data.epochs = 1
    config.loop.save = 1000
    return config
"""


@pytest.fixture(scope="session")
def recipe(tmp_path_factory) -> Path:
    """A recipe of LLaVA on an imported language model and vision tower: 6 steps on 24 questions about `0.png`.

    Data, tokenizer and model lie beside it.
    """
    folder = tmp_path_factory.mktemp("recipe")
    write_recipe(folder)
    origins = [f"--from={GOLDEN}/siglip_qwen2/{name}" for name in ("llm", "vision_tower")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", sys.unraisablehook)  # convert.py replaces it
        if load_script("convert").main(["import", *origins, f"--output={folder}/model"]):
            pytest.fail("the model cannot be imported")
    path = folder / "llava.py"
    path.write_text(RECIPE.format(folder=str(folder)))
    return path


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A tiny model directory."""
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def call(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Function: (script of launch/, arguments) -> exit status, stdout, stderr. The script runs in this process."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # convert.py replaces it

    def run(script: str, *arguments: Any) -> tuple[int, str, str]:
        status = load_script(script).main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run
