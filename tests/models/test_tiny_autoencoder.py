"""The tiny autoencoder: deterministic samples, sizes, sharding and dtype."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from ross_jax.config import from_dict, to_dict
from ross_jax.models.autoencoder import Autoencoder
from ross_jax.models.ross import RossConfig, abstract_params, build_autoencoder, components
from ross_jax.models.tiny_autoencoder import TinyAutoencoder, TinyAutoencoderConfig
from ross_jax.sharding import AXES, MeshConfig, make_mesh, parameter_shardings
from ross_jax.training.recipe import complete
from ross_jax.training.state import FreezeConfig, abstract_tree, split
from ross_jax.tree import flatten
from tiny import CONFIG as KL

CONFIG = TinyAutoencoderConfig(8, 12, (1, 2, 1), (2, 1, 1), 4, 0.5, 0.1)


@pytest.fixture(scope="module")
def module():
    module = TinyAutoencoder(CONFIG)
    return module.bind(jax.jit(module.init)(jax.random.key(0), *(jnp.zeros(s.shape) for s in module.input_spec())))


def test_every_sample_is_the_mean(module):
    """Samples equal the mean bit for bit, whatever the noise; gradients reach the mean unchanged."""
    posterior = module.encode(jax.random.uniform(jax.random.key(1), (2, 8, 12, 3), minval=-1))
    assert posterior.mean.shape == (2, 2, 3, 4) and posterior.mean.std() > 0.01
    noise = 1e6 * jax.random.normal(jax.random.key(2), posterior.mean.shape)
    for sample in (posterior.sample(noise), jax.jit(lambda p, n: p.sample(n))(posterior, noise)):
        np.testing.assert_array_equal(sample, posterior.mean)
    assert np.isfinite(posterior.logvar).all()
    gradient = jax.grad(lambda p: jnp.sum(p.sample(noise) * noise))(posterior)
    np.testing.assert_array_equal(gradient.mean, noise)
    np.testing.assert_array_equal(gradient.logvar, 0.0)


def test_scale_of_the_denoiser(module):
    latents = jnp.asarray([[[[1.1, -0.9, 0.1, 0.6]]]])
    np.testing.assert_allclose(module.normalise(latents), [[[[0.5, -0.5, 0.0, 0.25]]]], atol=1e-7)
    np.testing.assert_allclose(module.denormalise(module.normalise(latents)), latents, atol=1e-7)


def test_sides_must_fit(module):
    with pytest.raises(ValueError, match="multiples of 4"):
        module.encode(jnp.zeros((1, 8, 10, 3)))


@pytest.mark.parametrize(("encoder", "decoder"), [((), ()), ((1, 1), (1,))])
def test_halves_have_the_same_levels(encoder, decoder):
    with pytest.raises(ValueError, match=f"{len(encoder)} levels, decoder_blocks {len(decoder)}"):
        TinyAutoencoderConfig(8, 8, encoder, decoder, 4)


def test_the_config_chooses_the_module():
    assert type(build_autoencoder(CONFIG)) is TinyAutoencoder and type(build_autoencoder(KL.autoencoder)) is Autoencoder
    ross = RossConfig(autoencoder=CONFIG)
    assert type(components(ross)["autoencoder"]) is TinyAutoencoder
    # A manifest without `kind` means the KL autoencoder.
    plain = to_dict(KL)
    assert plain["autoencoder"].pop("kind") == "kl" and from_dict(RossConfig, plain) == KL


def test_lives_where_the_kl_autoencoder_does():
    """Parameters are replicated on every device, frozen, and have a dtype of their own."""
    ross = dataclasses.replace(KL, autoencoder=CONFIG)
    published = TinyAutoencoderConfig(64, 64, (1, 3, 3, 3), (3, 3, 3, 1), 16)
    mesh = AbstractMesh((2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)
    leaves = flatten({"autoencoder": abstract_params(RossConfig(autoencoder=published))["autoencoder"]})
    assert leaves and not any(any(at.spec) for at in parameter_shardings(leaves, mesh).values())
    frozen = FreezeConfig((r"(?!autoencoder/).*",), dtype="float32", autoencoder_dtype="bfloat16")
    params, rest = split(abstract_tree(ross, frozen, make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])), frozen)
    assert "autoencoder" not in params
    assert {leaf.dtype for leaf in jax.tree.leaves(rest["autoencoder"])} == {jnp.dtype(jnp.bfloat16)}


def test_recipes_can_name_it():
    model = dataclasses.replace(KL, autoencoder=CONFIG)
    values = {
        "model": to_dict(model),
        "text": {"template": "plain", "tokenizer": "x"},
        "data": {"sources": [{"path": "x"}], "packing": {"length": 64, "images": 1}, "batch": 2},
        "freeze": {"trainable": [".*"]},
        "optimizer": {"learning_rate": 1e-3},
    }
    recipe = complete(values)
    assert recipe.model.autoencoder.encoder_blocks == (1, 2, 1)
    assert from_dict(RossConfig, recipe.to_dict()["model"]) == model
