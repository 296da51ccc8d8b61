"""`import ross_jax` is quick, complete and lazy; it gives training, import and export."""

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ross_jax
from ross_jax import checkpoints
from ross_jax.inference import model

GOLDEN = Path(__file__).parent / "golden" / "siglip_qwen2"
IMPORTED = """
import json, sys
import ross_jax
heavy = [name for name in ("jax", "flax", "transformers", "numpy") if name in sys.modules]
resolved = {name: getattr(ross_jax, name).__module__ for name in ross_jax.__all__}
print(json.dumps([heavy, resolved]))
"""


def test_names_are_imported_when_used():
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True)
    heavy, resolved = json.loads(done.stdout)
    assert heavy == []
    assert {"Model", "RossConfig", "RunConfig", "load", "train", "import_model", "export_model"} <= set(resolved)
    assert set(ross_jax.__all__) <= set(dir(ross_jax))
    assert ross_jax.load is model.load
    with pytest.raises(AttributeError, match="module 'ross_jax' has no attribute 'lode'"):
        ross_jax.lode  # noqa: B018


def test_type_checkers_see_every_name():
    """The imports for type checkers bind the same objects as `__getattr__`, under the same names."""
    tree = ast.parse(inspect.getsource(ross_jax))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    found = {alias.asname: (node.module, alias.name) for node in block.body for alias in node.names}
    assert sorted(found) == ross_jax.__all__
    for name, (module, original) in found.items():
        assert getattr(ross_jax, name) is getattr(sys.modules[module], original), name


def test_import_and_export(tmp_path):
    """A checkpoint of the reference is imported to a model directory and exported again."""
    folder = ross_jax.import_model(
        GOLDEN / "checkpoint",
        tmp_path / "model",
        vision_tower=GOLDEN / "vision_tower",
        autoencoder=str(GOLDEN / "vae"),
    )
    assert checkpoints.read_manifest(folder)["config"]["vision"]["kind"] == "siglip"
    exported = ross_jax.export_model(str(folder), tmp_path / "exported")
    assert (exported / "model.safetensors").is_file() and (exported / "config.json").is_file()
    for settings, message in (
        ({"layout": "ros"}, r"^layout 'ros': one of \['ross', 'components', 'llava', .*\]$"),
        ({"dtype": "float64"}, r"^dtype 'float64': one of .*'bfloat16'"),
    ):
        with pytest.raises(ross_jax.UserError, match=message):
            ross_jax.export_model(folder, tmp_path / "other", **settings)
    with pytest.raises(ross_jax.UserError, match="neither sources nor a teacher"):
        ross_jax.import_model([], tmp_path / "other")


@pytest.mark.slow
def test_train_and_ask(tmp_path):
    """A run's directory is a model; training a finished run again changes nothing."""
    from launcher import write_recipe

    config = ross_jax.load_recipe(str(write_recipe(tmp_path)), ["--config.data.epochs=1"])
    run = ross_jax.train(config, tmp_path / "run")
    assert run.step == run.steps == 3
    trained = ross_jax.load(tmp_path / "run")
    assert isinstance(trained.ask(np.zeros((28, 28, 3), np.uint8), "What?", max_new_tokens=2), str)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert ross_jax.train(config, str(tmp_path / "run")).step == 3
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
