"""Loaded model directories: visual outputs and reconstructions of images."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ross_jax import checkpoints
from ross_jax.config import UserError
from ross_jax.data.encoders import build_prompt_encoder
from ross_jax.evaluation.images import to_uint8
from ross_jax.inference.model import TEXT_COMPONENTS, load
from ross_jax.models.ross import Ross, normalise
from ross_jax.objectives.denoise import DenoiseObjective
from ross_jax.objectives.objective import Sampling
from ross_jax.tree import flatten

SAMPLING = Sampling("dpm", 3)


@pytest.fixture(scope="module")
def model(model_folder):
    return load(model_folder)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(3)
    return [rng.integers(0, 256, (28, 28, 3), dtype=np.uint8) for _ in range(3)]


def test_what_is_loaded(model, model_folder):
    assert set(model.params) == {*TEXT_COMPONENTS, "denoiser", "autoencoder"} and model.template == "qwen_2"
    assert (model.image_config.size, model.image_config.mode, model.image_config.shortest_edge) == (28, "square", None)
    half = load(str(model_folder), ("language", "projector"), "v1", "bfloat16")
    assert set(half.params) == {"language", "projector"} and half.template == "v1"
    for path, leaf in flatten(half.params).items():
        np.testing.assert_array_equal(leaf, flatten(model.params)[path].astype(jnp.bfloat16))


def test_errors_say_what_is_missing(model_folder, tmp_path):
    manifest = checkpoints.read_manifest(model_folder)
    config = {**manifest["config"], "denoiser": None, "autoencoder": None}
    checkpoints.write_manifest(tmp_path, {**manifest, "config": config})
    with pytest.raises(UserError, match="this model has no denoiser"):
        load(tmp_path, ("vision", "denoiser"))
    with pytest.raises(UserError, match="holds no parameters"):
        load(tmp_path)
    with pytest.raises(UserError, match="no such directory"):
        load(tmp_path / "nowhere")


def test_visual_outputs(model, images):
    """Visual outputs are the hidden states at an image's positions, whatever text follows."""
    found = model.visual_outputs(images, rows=2)
    ids = build_prompt_encoder("qwen_2", model.tokenizer)(
        {"id": "x", "image": "x", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}]}
    )
    count, start = model.config.vision.num_tokens, int(np.flatnonzero(ids < 0)[0])
    row = np.concatenate([ids[:start], np.zeros(count, np.int32), ids[start + 1 :]])[None]
    forward = jax.jit(lambda *batch: Ross(model.config).apply({"params": model.params}, *batch).hidden)
    for image, outputs in zip(images, found, strict=True):
        pixels = normalise(model.config, jnp.asarray(image)[None, None])
        hidden = forward(row, np.arange(row.size)[None], np.ones_like(row), pixels, np.array([[start]]))
        np.testing.assert_allclose(outputs, hidden[0, start : start + count], atol=2e-5)


def test_reconstruct(model, images, tmp_path):
    """`reconstruct` gives the objective's reconstructions as PIL images, for arrays and files, in batches."""
    found = model.reconstruct(images, SAMPLING, seed=1, rows=2)
    keys = jnp.stack([jax.random.fold_in(jax.random.key(1), i) for i in range(3)])
    outputs = jnp.asarray(model.visual_outputs(images, rows=2))
    run = jax.jit(lambda params, *given: DenoiseObjective(model.config).reconstruct(params, params, *given, SAMPLING))
    expected = run(model.params, outputs, keys).pixels
    side = model.config.target_size
    for image, pixels in zip(found, to_uint8(expected), strict=True):
        assert isinstance(image, Image.Image) and image.size == (side, side)
        assert np.abs(np.asarray(image).astype(int) - pixels).max() <= 1
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    from_file, _ = model.reconstruct([tmp_path / "a.png", images[1]], SAMPLING, seed=1, rows=2)
    np.testing.assert_array_equal(from_file, found[0])


def test_what_cannot_be_reconstructed(model, images):
    without = dataclasses.replace(model, config=dataclasses.replace(model.config, denoiser=None))
    with pytest.raises(UserError, match="this model makes no images"):
        without.reconstruct(images)
    with pytest.raises(UserError, match="images: there is none"):
        model.reconstruct([])
