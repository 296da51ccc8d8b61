"""Restoring a model directory for inference."""

import jax.numpy as jnp
import numpy as np
import pytest

from ross_jax import checkpoints
from ross_jax.config import UserError
from ross_jax.inference.model import load_model
from ross_jax.tree import flatten


def test_what_was_asked_for(model_folder):
    model = load_model(model_folder, ("language", "projector"), dtype="bfloat16")
    assert set(model.params) == {"language", "projector"} and model.template == "qwen_2"
    assert {leaf.dtype for leaf in flatten(model.params).values()} == {jnp.dtype(jnp.bfloat16)}
    assert (model.images.size, model.images.mode, model.images.shortest_edge) == (28, "square", None)
    whole = flatten(load_model(model_folder, ("language",)).params)
    for path, leaf in flatten({"language": model.params["language"]}).items():
        np.testing.assert_array_equal(leaf, whole[path].astype(jnp.bfloat16))


def test_errors_say_what_is_missing(model_folder, tmp_path):
    manifest = checkpoints.read_manifest(model_folder)
    config = {**manifest["config"], "denoiser": None, "autoencoder": None}
    checkpoints.write_manifest(tmp_path, {**manifest, "config": config})
    with pytest.raises(UserError, match="this model has no denoiser"):
        load_model(tmp_path, ("vision", "denoiser"))
    with pytest.raises(UserError, match="holds no parameters"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="no such directory"):
        load_model(tmp_path / "nowhere")
