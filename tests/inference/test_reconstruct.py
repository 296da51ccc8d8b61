"""Images from visual outputs, and drawings of them."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ross_jax.inference.model import load
from ross_jax.inference.reconstruct import (
    ImageDrawer,
    autoencode,
    target_images,
    visual_outputs,
)
from ross_jax.models.autoencoder import Autoencoder
from ross_jax.models.denoiser import Denoiser, normalise_condition
from ross_jax.models.ross import Ross, normalise
from ross_jax.objectives.denoise import DenoiseObjective
from ross_jax.objectives.diffusion import make_diffusion, sample_ancestral
from ross_jax.objectives.objective import Sampling
from ross_jax.objectives.targets import ungroup_latents
from ross_jax.sharding import MeshConfig, batch_sharding, make_mesh


@pytest.fixture(scope="module")
def model(model_folder):
    return load(model_folder)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(2)
    rows = {name: np.tile(np.arange(12), (2, 1)) for name in ("tokens", "positions")}
    images = rng.integers(0, 256, (2, 2, 28, 28, 3), dtype=np.uint8)
    batch = {**rows, "segments": np.ones((2, 12), int), "images": images, "image_start": np.array([[1, 6], [3, 12]])}
    return jax.tree.map(jnp.asarray, batch)


def test_visual_outputs_are_hidden_states_at_the_images(model, batch):
    outputs = jax.jit(partial(visual_outputs, model.config))(model.params, batch)
    images = normalise(model.config, batch["images"])
    arguments = (batch["tokens"], batch["positions"], batch["segments"], images, batch["image_start"])
    hidden = jax.jit(lambda params, *given: Ross(model.config).apply(params, *given).hidden)(
        {"params": model.params}, *arguments
    )
    for row, slot, start in ((0, 0, 1), (0, 1, 6), (1, 0, 3)):
        np.testing.assert_allclose(outputs[row, slot], hidden[row, start : start + 4], rtol=1e-6)
    np.testing.assert_array_equal(outputs[1, 1], 0.0)


@pytest.mark.slow
def test_sampling_is_the_tested_process_under_this_condition(model, batch):
    """Reconstruction equals the composition of its parts: condition, sampling, ungrouping and decoding."""
    config, process = model.config, make_diffusion(respacing="7")
    outputs = visual_outputs(config, model.params, batch)[:, 0]
    keys, sampling = jax.random.split(jax.random.key(5), 2), Sampling("ddpm", 7, temperature=0.5)
    reconstruct = partial(DenoiseObjective(config).reconstruct, model.params, model.params)
    pixels, latents = reconstruct(outputs, keys, sampling)
    assert pixels.shape == (2, config.target_size, config.target_size, 3) and jnp.abs(pixels).max() <= 1.0
    shape = (config.denoiser.num_tokens, config.denoiser.latent_size)

    def predict(noised, timesteps):
        condition = normalise_condition(outputs)
        return Denoiser(config.denoiser).apply({"params": model.params["denoiser"]}, noised, timesteps, condition)

    pairs = [jax.random.split(key) for key in keys]
    noise = jnp.stack([jax.random.normal(rest, (7, *shape)) for _, rest in pairs], axis=1)
    initial = jnp.stack([jax.random.normal(first, shape) for first, _ in pairs])
    tokens = sample_ancestral(process, predict, initial, noise, 0.5)[-1]
    expected = ungroup_latents(tokens, config.latent_window)
    scale = float(jnp.abs(expected).max())  # samples of a random denoiser are large
    np.testing.assert_allclose(latents, expected, atol=1e-4 * scale)
    decoded = Autoencoder(config.autoencoder).apply(
        {"params": model.params["autoencoder"]},
        latents / config.autoencoder.scaling_factor + config.autoencoder.shift_factor,
        method="decode",
    )
    np.testing.assert_allclose(pixels, jnp.clip(decoded, -1.0, 1.0), atol=1e-4)
    other = reconstruct(outputs[::-1], keys, sampling).pixels
    assert jnp.abs(pixels - other).max() > 1e-3  # the condition matters
    alone = reconstruct(outputs[1:], keys[1:], sampling).latents
    np.testing.assert_allclose(alone, latents[1:], atol=1e-4 * scale)  # neighbours do not


def test_the_ceiling_is_the_autoencoder_itself(model, batch):
    images = batch["images"][:, 0]
    pixels, made = target_images(model.config, images), autoencode(model.config, model.params, images)
    side = model.config.target_size
    assert pixels.shape == made.shape == (2, side, side, 3)
    whole = Autoencoder(model.config.autoencoder).apply({"params": model.params["autoencoder"]}, pixels)
    np.testing.assert_allclose(made, jnp.clip(whole, -1.0, 1.0), atol=1e-5)
    assert jnp.abs(pixels).max() <= 1.0 and pixels.min() < -0.5 < 0.5 < pixels.max()


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_images_of_a_batch_for_tensorboard(model, batch, devices):
    """The first images that exist are drawn, whatever the mesh and the empty slots."""
    rows = 4 * (devices // 8) + 4
    wide = {name: np.tile(values, (rows // 2, *[1] * (values.ndim - 1))) for name, values in batch.items()}
    wide["image_start"] = np.full_like(wide["image_start"], 12)
    wide["image_start"][1] = [12, 6]
    wide["image_start"][3] = [2, 12]
    mesh = make_mesh(MeshConfig(devices, 1, 1), jax.devices()[:devices])
    placed = jax.device_put(jax.tree.map(np.asarray, wide), batch_sharding(mesh))
    names = ("language", "projector")
    state = SimpleNamespace(
        params={name: model.params[name] for name in names},
        frozen={name: part for name, part in model.params.items() if name not in names},
    )
    state = jax.device_put(vars(state), NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        grid = ImageDrawer(model.config, mesh, count=2).images(7, SimpleNamespace(**state), placed)
    side = model.config.target_size
    assert grid.shape == (2 * side, 3 * side, 3)
    first, second = wide["images"][1, 1], wide["images"][3, 0]
    images = jnp.stack([first, second])
    originals, ceilings = target_images(model.config, images), autoencode(model.config, model.params, images)
    for row, (original, ceiling) in enumerate(zip(originals, ceilings, strict=True)):
        cells = grid[row * side : (row + 1) * side].reshape(side, 3, side, 3).swapaxes(0, 1).astype(int)
        for cell, expected in ((cells[0], original), (cells[2], ceiling)):
            assert np.abs(cell - (np.asarray(expected) + 1) * 127.5).max() <= 1
        assert np.abs(cells[1] - cells[0]).max() > 20
