"""The tiny autoencoder equals diffusers' `AutoencoderTiny`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parity.helpers import assert_bfloat16, assert_close, channels_last, imported, numpy, randomise, torch
from ross_jax.convert.exporting import export
from ross_jax.convert.importing import plan_import, write
from ross_jax.models.tiny_autoencoder import TinyAutoencoder

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity


def layout(latent: int, encoder: tuple[int, ...], decoder: tuple[int, ...], widths=(8, 8), **settings) -> dict:
    return {
        "latent_channels": latent,
        "num_encoder_blocks": encoder,
        "num_decoder_blocks": decoder,
        "encoder_block_out_channels": (widths[0],) * len(encoder),
        "decoder_block_out_channels": (widths[1],) * len(decoder),
        **settings,
    }


LAYOUTS = {
    "taesd": {},  # the published layout, all defaults
    "taef1": layout(16, (1, 3, 3, 3), (3, 3, 3, 1), (12, 8)),
    "32_channels": layout(32, (2, 1, 3), (3, 1, 2), (8, 12), scaling_factor=0.4, shift_factor=0.2),
    "two_levels": layout(3, (1, 2), (2, 1), (5, 7), shift_factor=-0.3),
    "five_levels": layout(16, (1, 1, 2, 1, 1), (1, 2, 1, 1, 1), scaling_factor=2.0),
    "one_level": layout(2, (2,), (1,)),
    "other_bytes": layout(4, (1, 1), (1, 1), latent_magnitude=5, latent_shift=0.1),
}


def build(name: str):
    return randomise(diffusers.AutoencoderTiny(**LAYOUTS[name]))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Function: name -> (torch module, folder that it was saved to)."""

    @functools.cache
    def save(name: str):
        folder, module = tmp_path_factory.mktemp(name), build(name)
        module.save_pretrained(folder)
        return module, folder

    return save


def random_images(config, rows: int = 2, columns: int = 3) -> np.ndarray:
    """Random images whose latents have the given rows and columns."""
    scale = config.downsampling
    return np.random.default_rng(1).uniform(-1, 1, (2, rows * scale, columns * scale, 3)).astype(np.float32)


def latents_of(config, rows: int = 3, columns: int = 2) -> np.ndarray:
    """Random latents, large enough for the clamp to matter."""
    return np.random.default_rng(2).normal(0, 3, (2, rows, columns, config.latent_channels)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(config, dtype, params, images, latents):
    """Raw latents of images, the same latents normalised, and the decoded `latents`."""
    module, tree = TinyAutoencoder(config, dtype), {"params": params}
    mean = module.apply(tree, images, method="encode").mean
    return mean, module.normalise(mean), module.apply(tree, latents, method="decode")


def run_torch(module, images, latents):
    dtype, settings = module.dtype, module.config
    with torch.no_grad():
        mean = module.encode(torch.tensor(images).movedim(-1, 1).to(dtype)).latents
        decoded = module.decode(torch.tensor(latents).movedim(-1, 1).to(dtype)).sample
    scaled = (mean - settings.shift_factor) * settings.scaling_factor
    return [channels_last(x) for x in (mean, scaled, decoded)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_encode_and_decode(saved, name):
    module, folder = saved(name)
    config, params = imported(folder)
    assert config.downsampling == 2 ** (len(module.config.num_encoder_blocks) - 1)
    images, latents = random_images(config), latents_of(config)
    ours, theirs = run(config, jnp.float32, params, images, latents), run_torch(module, images, latents)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == jnp.float32
        assert_close(mine, other)
    assert ours[2].shape == (2, 3 * config.downsampling, 2 * config.downsampling, 3)


@pytest.mark.parametrize("name", ["taesd", "32_channels"])
def test_gradient_of_an_image_with_respect_to_its_latents(saved, name):
    module, folder = saved(name)
    config, params = imported(folder)
    latents = latents_of(config)
    side = config.downsampling
    weights = np.random.default_rng(3).normal(size=(2, 3 * side, 2 * side, 3)).astype(np.float32)

    def score(x):
        return jnp.sum(weights * TinyAutoencoder(config).apply({"params": params}, x, method="decode"))

    theirs = torch.tensor(latents).requires_grad_()
    decoded = module.decode(theirs.movedim(-1, 1)).sample.movedim(1, -1)
    (decoded * torch.tensor(weights)).sum().backward()
    assert_close(jax.jit(jax.grad(score))(latents), numpy(theirs.grad))


@pytest.mark.parametrize("name", ["taesd", "32_channels"])
def test_bfloat16(name, tmp_path):
    """With bfloat16 weights, float32 results equal torch's, and bfloat16 results are as close to float32 as torch's."""
    module = build(name).bfloat16()
    module.save_pretrained(tmp_path)
    config, params = imported(tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    images, latents = random_images(config, 4, 4), latents_of(config, 4, 4)
    rounded, exact = run_torch(module, images, latents), run_torch(module.float(), images, latents)
    for mine, other in zip(run(config, jnp.float32, params, images, latents), exact, strict=True):
        assert_close(mine, other)
    ours = run(config, jnp.bfloat16, params, images, latents)
    for index in (0, 2):
        assert ours[index].dtype == jnp.float32
        assert_bfloat16(ours[index], rounded[index], exact[index])


def test_diffusers_loads_what_was_exported(saved, tmp_path):
    module, folder = saved("32_channels")
    plan = plan_import([str(folder)])
    write(plan, tmp_path / "model")
    plan.close()
    export(tmp_path / "model", tmp_path / "out", "components")
    found = diffusers.AutoencoderTiny.from_pretrained(tmp_path / "out" / "vae")
    for name in LAYOUTS["32_channels"]:
        np.testing.assert_array_equal(found.config[name], module.config[name])
    theirs, ours = module.state_dict(), found.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
