"""Linear layers: Linen's outputs, and its gradients though they are computed another way."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ross_jax.models.layers import Dense


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


def test_ambient_precision_is_kept():
    """`highest`, as in verification, reaches the gradients' products too."""
    x, kernel = jnp.ones((2, 3)), {"kernel": jnp.ones((3, 4))}
    with jax.default_matmul_precision("highest"):
        text = jax.jit(jax.grad(lambda p, x: Dense(4, use_bias=False).apply({"params": p}, x).sum(), (0, 1)))
        text = text.lower(kernel, x).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products and all("HIGHEST" in line for line in products)
