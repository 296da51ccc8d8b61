"""The reconstruction objective on the latents of a tiny autoencoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ross_jax.models.denoiser import Denoiser, DenoiserConfig, normalise_condition
from ross_jax.models.language import FINAL
from ross_jax.models.ross import RossConfig, abstract_params, normalise
from ross_jax.models.tiny_autoencoder import TinyAutoencoder, TinyAutoencoderConfig
from ross_jax.models.vision import VisionConfig
from ross_jax.objectives.denoise import DenoiseObjective
from ross_jax.objectives.diffusion import make_diffusion
from ross_jax.objectives.targets import target_pixels

WIDTH, GRID, CHANNELS = 20, 3, 5
CONFIG = RossConfig(
    vision=VisionConfig("siglip", 44, 14, 8, 8, 1, 1, "gelu", 1e-6, -1),
    denoiser=DenoiserConfig(WIDTH, 4 * CHANNELS, GRID, 32, 2, 4),
    autoencoder=TinyAutoencoderConfig(8, 6, (1, 1, 2, 1), (1, 2, 1, 1), CHANNELS, 0.7, 0.2),
    image_mean=(0.48, 0.46, 0.41),
    image_std=(0.27, 0.26, 0.28),
)


def test_loss_is_the_formula():
    """The loss is finite and the squared error of the noise on the autoencoder's own latents, without sampling them."""
    rng = np.random.default_rng(0)
    shapes = abstract_params(dataclasses.replace(CONFIG, vision=None))
    params = jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32), shapes)
    objective = DenoiseObjective(CONFIG, draws=2)
    pixels = jax.random.randint(jax.random.key(0), (2, 1, 44, 44, 3), 0, 256).astype(jnp.uint8)
    images, places = normalise(CONFIG, pixels[:, 0]), jnp.zeros((2, 1), jnp.int32)
    outputs = jax.random.normal(jax.random.key(1), (2, 1, GRID**2, WIDTH))
    keys = jax.random.split(jax.random.key(2), (2, 1))
    targets = jax.jit(objective.targets)(params, {"images": pixels, "image_start": places, "tokens": places})
    found = jax.jit(objective.loss)(params, {}, {FINAL: outputs}, targets, keys)
    assert found.shape == (2, 1) and np.isfinite(found).all()

    module, tree = TinyAutoencoder(CONFIG.autoencoder), {"params": params["autoencoder"]}
    raw = np.float64(module.apply(tree, target_pixels(CONFIG, images), method="encode").mean)
    assert raw.shape == (2, 6, 6, CHANNELS)
    scaled = (raw - 0.2) * 0.7
    signal = np.cumprod(1 - make_diffusion().betas)
    predict = jax.jit(Denoiser(CONFIG.denoiser).apply)
    for item in range(2):
        # Tokens are windows of 2 x 2 latents, row by row. Inside a token, channels come first.
        tokens = scaled[item].reshape(GRID, 2, GRID, 2, CHANNELS).transpose(0, 2, 4, 1, 3).reshape(GRID**2, -1)
        draw, errors = objective.draw(keys[item, 0]), []
        for t, noise in zip(np.asarray(draw.timesteps), np.float64(draw.noise), strict=True):
            noised = jnp.asarray(np.sqrt(signal[t]) * tokens + np.sqrt(1 - signal[t]) * noise, jnp.float32)
            condition = normalise_condition(outputs[item])
            predicted = predict({"params": params["denoiser"]}, noised[None], t[None], condition)[0]
            errors.append(np.mean((noise - np.float64(predicted)) ** 2))
        np.testing.assert_allclose(found[item, 0], np.mean(errors), rtol=1e-5)
