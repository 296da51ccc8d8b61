"""Initial parameters of the denoiser: it predicts zeros, and its blocks are the identity."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ross_jax.models.denoiser import Denoiser, DenoiserConfig, position_table

CONFIG = DenoiserConfig(condition_size=40, latent_size=12, grid=3, width=64, depth=3, num_heads=4)


@pytest.fixture(scope="module")
def started():
    keys = jax.random.split(jax.random.key(0), 3)
    noised, context = jax.random.normal(keys[0], (2, 9, 12)), jax.random.normal(keys[1], (2, 9, 40))
    module = Denoiser(CONFIG)

    @jax.jit
    def start(key):
        params = module.init(key, noised, jnp.array([3, 999]), context)["params"]
        return params, module.apply({"params": params}, noised, jnp.array([3, 999]), context, internals=True)

    params, (predicted, internals) = start(keys[2])
    return jax.tree.map(np.asarray, params), np.asarray(predicted), internals


def test_predicts_exactly_nothing(started):
    _, predicted, _ = started
    assert predicted.shape == (2, 9, 12)
    assert not predicted.any()


def test_blocks_are_the_identity(started):
    params, _, internals = started
    entering = internals["latent_embedding"] + params["position_embedding"]
    assert np.abs(internals["attention"]).max() > 1e-3
    for block in internals["blocks"]:
        np.testing.assert_array_equal(block, entering)


def test_initial_values(started):
    """Modulations, output and biases are zero, other kernels Xavier per layer; the position table is a parameter."""
    params, *_ = started
    for name in ("final", "final_modulation"):
        assert not params[name]["kernel"].any()
    assert not params["blocks"]["modulation"]["kernel"].any()
    assert not any(leaf.any() for path, leaf in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == "bias")
    np.testing.assert_array_equal(params["position_embedding"], np.float32(position_table(64, 3)))
    blocks = params["blocks"]
    kernels = {
        "latent_embedding": params["latent_embedding"]["kernel"],
        "condition_embedding": params["condition_embedding"]["kernel"],
        "qkv": blocks["attention"]["qkv"]["kernel"],
        "out": blocks["attention"]["out"]["kernel"],
        "up": blocks["mlp"]["up"]["kernel"],
        "down": blocks["mlp"]["down"]["kernel"],
    }
    for name, kernel in kernels.items():
        limit = math.sqrt(6 / sum(kernel.shape[-2:]))
        assert 0.95 * limit < np.abs(kernel).max() <= limit, name
        assert np.std(kernel) == pytest.approx(limit / math.sqrt(3), rel=0.1), name
    assert np.abs(kernels["qkv"][0] - kernels["qkv"][1]).max() > 0
    for name in ("timestep_in", "timestep_out"):
        assert np.std(params[name]["kernel"]) == pytest.approx(0.02, rel=0.1)
