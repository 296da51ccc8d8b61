"""An objective of 25 lines outside the package trains on a mesh and through a recipe."""

import dataclasses
import os
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from launcher import RECIPE, losses, train, write_recipe
from objectives.encoder_features import EncoderFeatures
from ross_jax.config import to_dict
from ross_jax.models.regressor import Regressor
from ross_jax.models.ross import Ross, normalise
from ross_jax.models.vision import VisionEncoder
from ross_jax.objectives.reconstruction import ReconstructionConfig, add_heads, kinds, make_objective, register
from ross_jax.sharding import MeshConfig
from ross_jax.tree import merge
from tiny import CONFIG, Run, make_batch

MODEL = add_heads(dataclasses.replace(CONFIG, denoiser=None, autoencoder=None), EncoderFeatures.kind, {}, {"width": 48})
SETTINGS = ReconstructionConfig(EncoderFeatures.kind, options=(("layer", 1),))


def test_three_steps_on_a_mesh():
    """The first loss is the formula on the model's hidden states; a mesh gives equal losses; training lowers them."""
    options = {"config": MODEL, "reconstruction": SETTINGS, "learning_rate": 1e-2}
    one, mesh, batch = Run(**options), Run(MeshConfig(2, 2, 2), devices=8, **options), make_batch()
    params = merge(one.state.params, one.state.frozen)
    images = normalise(MODEL, jnp.asarray(batch["images"]))
    text = [jnp.asarray(batch[name]) for name in ("tokens", "positions", "segments")]
    output = Ross(MODEL).apply({"params": params}, *text, images, jnp.asarray(batch["image_start"]), internals=True)
    features = VisionEncoder(MODEL.vision).apply({"params": params["vision"]}, images.reshape(-1, *images.shape[2:]))
    found = []
    for row, slot in zip(*np.nonzero(batch["image_start"] < batch["tokens"].shape[1]), strict=True):
        start = batch["image_start"][row, slot]
        states = output.internals["hidden_states"][1, row, start : start + MODEL.vision.num_tokens]
        said = np.float64(Regressor(MODEL.regressor).apply({"params": params["regressor"]}, states[None])[0])
        truth = np.float64(features[2 * row + slot])
        lengths = np.linalg.norm(said, axis=-1) * np.linalg.norm(truth, axis=-1)
        found.append(np.mean(1 - (said * truth).sum(-1) / lengths))
    for step in range(3):  # warm-up makes the first update zero
        expected, there = one.run(batch), mesh.run(batch)
        if step == 0:
            assert expected["reconstruction_loss"] == pytest.approx(np.mean(found), rel=1e-5)
        for name in ("text_loss", "reconstruction_loss", "gradient_norm"):
            assert there[name] == pytest.approx(expected[name], rel=1e-4), (step, name)
    assert expected["reconstruction_loss"] < np.mean(found)


@pytest.mark.slow
def test_through_a_recipe(tmp_path, monkeypatch):
    """A recipe that imports the objective's module trains two steps on a mesh of 2 x 2 x 2."""
    recipe = write_recipe(tmp_path)
    model = dataclasses.replace(MODEL, language=dataclasses.replace(MODEL.language, vocab_size=320))
    text = RECIPE.format(model=to_dict(model), data=str(tmp_path)).replace('"denoiser/.*"]', '"regressor/.*"]')
    chosen = f'"reconstruction": {{"kind": {EncoderFeatures.kind!r}, "options": (("layer", 1),)}}, "step":'
    assert text.count('"step":') == text.count('"regressor/.*"]') == 1
    recipe.write_text("import encoder_features\n" + text.replace('"step":', chosen))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    mesh = [f"--config.mesh.{axis}=2" for axis in ("data", "fsdp", "tensor")]
    done = train(recipe, tmp_path / "run", *mesh, "--config.data.epochs=1", "--config.data.batch=12", devices=8)
    assert done.returncode == 0, done.stderr
    assert re.search(r"2 of 2 steps", done.stdout), done.stdout
    first, last = losses(tmp_path / "run")
    assert np.isfinite([first, last]).all() and 0 < last[2] < 2


def test_registry():
    """A kind belongs to one class; options set its fields; a tap that the model lacks is refused."""
    assert kinds()[-2:] == (EncoderFeatures.kind, "none")
    assert make_objective(MODEL, SETTINGS).taps == (1,)
    with pytest.raises(ValueError, match="kind 'encoder_features' is taken"):
        register(type("Other", (EncoderFeatures,), {}))
    with pytest.raises(ValueError, match="tap 3: a language model of 2 layers has -3 to 2"):
        dataclasses.replace(SETTINGS, options=(("layer", 3),)).check(MODEL)
