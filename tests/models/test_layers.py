"""Linear layers: outputs and gradients equal those of Flax's `nn.Dense`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters.partial_eval import dce_jaxpr

from ross_jax.models.language import LanguageModel
from ross_jax.models.layers import FEW, ONES, Dense
from tiny import CONFIG


@pytest.mark.parametrize("shape", [(7,), (1, 7), (2, 3, 7), (FEW, 7), (FEW + 1, 7)])
@pytest.mark.parametrize("use_bias", [True, False])
def test_transposed_kernels_give_the_same(shape, use_bias):
    x = jax.random.normal(jax.random.key(0), shape)
    params = nn.Dense(4, use_bias=use_bias, bias_init=nn.initializers.normal()).init(jax.random.key(1), x)["params"]
    expected = nn.Dense(4, use_bias=use_bias).apply({"params": params}, x)
    transposed = params | {"kernel": params["kernel"].T}
    found = jax.jit(Dense(4, use_bias=use_bias, transposed=True).apply)({"params": transposed}, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (2, 2, 3, 7), (7,)])
@pytest.mark.parametrize("use_bias", [True, False])
def test_dense_is_linens(shape, dtype, use_bias):
    x = jax.random.normal(jax.random.key(0), shape, dtype)
    params = nn.Dense(4).init(jax.random.key(1), x)["params"]
    params = {name: leaf for name, leaf in params.items() if use_bias or name == "kernel"}

    def run(module: nn.Module):
        def loss(params, x):
            return jnp.sum(jnp.sin(module.apply({"params": params}, x).astype(jnp.float32)))

        return jax.value_and_grad(loss, argnums=(0, 1))(params, x)

    ours, theirs = (run(layer(4, use_bias=use_bias, dtype=dtype)) for layer in (Dense, nn.Dense))
    tolerance = 1e-6 if dtype == jnp.float32 else 1e-2
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert mine.dtype == other.dtype and mine.shape == other.shape
        np.testing.assert_allclose(mine, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("use_bias", [True, False])
def test_several_outputs_are_one_taken_apart(use_bias):
    x = jax.random.normal(jax.random.key(0), (2, 3, 7))
    params = Dense(12, use_bias=use_bias).init(jax.random.key(1), x)
    weights = jax.random.normal(jax.random.key(2), (3, 2, 3, 4))

    def run(outputs: int):
        def loss(params, x):
            y = Dense(12, use_bias=use_bias, outputs=outputs).apply(params, x)
            return jnp.sum(jnp.sin(jnp.stack(y if outputs > 1 else jnp.split(y, 3, axis=-1))) * weights)

        return jax.value_and_grad(loss, argnums=(0, 1))(params, x)

    for several, one in zip(jax.tree.leaves(run(3)), jax.tree.leaves(run(1)), strict=True):
        np.testing.assert_allclose(several, one, rtol=1e-6, atol=1e-6)


def test_ambient_precision_is_kept():
    """The ambient precision, `highest` in verification, also applies to the products of the gradients."""
    x, kernel = jnp.ones((2, 3)), {"kernel": jnp.ones((3, 4))}
    with jax.default_matmul_precision("highest"):
        text = jax.jit(jax.grad(lambda p, x: Dense(4, use_bias=False).apply({"params": p}, x).sum(), (0, 1)))
        text = text.lower(kernel, x).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products and all("HIGHEST" in line for line in products)


@pytest.mark.parametrize(
    ("remat", "again"), [("none", 0), ("full", 6), ("attention", 3), ("gate", 2), ("mlp", 1), ("dots", 0)]
)
def test_what_the_backward_pass_computes_again(remat, again):
    """Each `remat` repeats `again` of a layer's seven matrix products; no gradient reads the output of the last."""
    model = LanguageModel(CONFIG.language, jnp.float32, remat)
    inputs = [jnp.ones(each.shape, each.dtype) for each in model.input_spec()]
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)

    def loss(params):
        return jnp.sum(model.apply(params, *inputs).hidden)

    traced = jax.make_jaxpr(jax.grad(loss))(params).jaxpr
    assert count_products(dce_jaxpr(traced, [True] * len(traced.outvars))[0]) == 7 + again + 2 * 7


def count_products(jaxpr) -> int:
    """Number of products with a matrix. A loop counts once.

    Left out: products of attention, rotary embedding's swap of a head's halves, and sums as products with ones.
    """
    found, swap = 0, (CONFIG.language.head_dim,) * 2
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            shapes = [var.aval.shape for var in equation.invars]
            other = equation.params["dimension_numbers"][1][0] or swap in shapes or shapes[0][-1:] == (ONES,)
            found += not other
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                found += count_products(inner) if hasattr(inner, "eqns") else 0
    return found
