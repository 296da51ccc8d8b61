"""What foreign layouts cannot hold is refused, not dropped."""

import json

import pytest

from ross_jax import checkpoints
from ross_jax.config import UserError
from ross_jax.convert.exporting import export
from tiny_model import write_model


def test_another_prediction_than_the_references(tmp_path):
    (tmp_path / "model").mkdir()
    folder = write_model(tmp_path / "model")
    manifest = checkpoints.read_manifest(folder)
    config = json.loads(json.dumps(manifest["config"]))
    config["denoiser"]["prediction"] = "v"
    checkpoints.write_manifest(folder, {**manifest, "config": config})
    for layout in ("ross", "components"):
        with pytest.raises(UserError, match=r"denoiser predicts v; .* know only epsilon .* --without denoiser"):
            export(folder, tmp_path / "out", layout)
    assert not (tmp_path / "out").exists()
