"""What foreign layouts cannot hold is refused, not dropped."""

import json

import pytest

from ross_jax import checkpoints
from ross_jax.config import UserError
from ross_jax.convert.exporting import export
from tiny_model import write_model


@pytest.mark.parametrize(("field", "value"), [("prediction", "v"), ("schedule", "sigmoid"), ("block", "vit")])
def test_another_denoiser_than_the_references(field, value, tmp_path):
    (tmp_path / "model").mkdir()
    folder = write_model(tmp_path / "model")
    manifest = checkpoints.read_manifest(folder)
    config = json.loads(json.dumps(manifest["config"]))
    config["denoiser"][field] = value
    checkpoints.write_manifest(folder, {**manifest, "config": config})
    for layout in ("ross", "components"):
        with pytest.raises(UserError, match=rf"denoiser has {field} '{value}', .* know only .* --without denoiser"):
            export(folder, tmp_path / "out", layout)
    assert not (tmp_path / "out").exists()
