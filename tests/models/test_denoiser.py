"""Rematerialisation of the denoiser: which products the backward pass computes again."""

from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr

from ross_jax.models.denoiser import Denoiser, DenoiserConfig

CONFIG = DenoiserConfig(condition_size=40, latent_size=12, grid=3, width=64, depth=2, num_heads=4, mlp_ratio=3.0)
KERNELS = {"modulation": (64, 384), "qkv and out": (64, 64), "up": (64, 192), "down": (192, 64)}


@pytest.mark.parametrize(
    ("remat", "again"),
    [
        ("none", {}),
        ("full", {"modulation": 1, "qkv and out": 4, "up": 1, "down": 1}),
        ("attention", {"modulation": 1, "qkv and out": 3, "up": 1}),
        ("gate", {"modulation": 1, "qkv and out": 3}),
    ],
)
def test_what_the_backward_pass_computes_again(remat, again):
    """Each `remat` repeats the expected products of a block; `attention` saves the outputs of `out` and `down`."""
    module = Denoiser(CONFIG, jnp.float32, remat)
    inputs = module.input_spec(2)
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    traced = jax.make_jaxpr(jax.grad(lambda *x: jnp.sum(jnp.sin(module.apply(*x)))))(params, *inputs).jaxpr
    found = Counter(forward_products(dce_jaxpr(traced, [True] * len(traced.outvars))[0]))
    found[64, 64] -= 1  # the product of the timestep embedding
    for name, shape in KERNELS.items():
        once = 4 if name == "qkv and out" else 1
        assert found[shape] == once + again.get(name, 0), name


def forward_products(jaxpr):
    """Yields kernel shapes of products x @ kernel, at any depth. A loop counts once, a transposed kernel never."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general" and equation.params["dimension_numbers"][0][1] == (0,):
            yield equation.invars[1].aval.shape
        for inner in jaxprs_in_params(equation.params):
            yield from forward_products(inner)
