"""Attention from all positions to all positions, in plain XLA: for platforms without an attention kernel.

Scores are computed for a block of queries at a time.

The backward pass reads the attention weights that the forward pass kept. With remat, these are the weights of one layer
at a time, which the recomputed forward pass has just made. FlashAttention (Dao et al., 2022) keeps the logarithms of
the sums instead, and would compute the weights twice.

Some gradients are products with a transposed operand. Their order is chosen so that the smaller operand is transposed,
which is faster in XLA for CPU.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from ross_jax.models.layers import SAVED_ATTENTION

BLOCK = 256
"""Number of queries whose scores are computed at once."""


@jax.custom_vjp
def blockwise_attention(
    query: Float[Array, "batch seq heads dim"],
    key: Float[Array, "batch keys kv_heads dim"],
    value: Float[Array, "batch keys kv_heads dim"],
) -> Float[Array, "batch seq heads dim"]:
    """Attention to all keys; scores and softmax in float32. There may be more or fewer keys than queries."""
    return _forward(query, key, value)[0]


def _forward(query: Array, key: Array, value: Array):
    rows = _by_group(_scaled(query), key.shape[2])
    keys, values = (x.transpose(0, 2, 1, 3) for x in (key, value))
    outputs, weights, sums = [], [], []
    for start in range(0, query.shape[1], BLOCK):
        scores = _product(rows[..., start : start + BLOCK, :], keys.swapaxes(-1, -2))
        block = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        sums.append(jnp.sum(block, axis=-1, keepdims=True))
        weights.append(block.astype(value.dtype))
        outputs.append(_product(weights[-1], values) / sums[-1])
    output = jnp.concatenate(outputs, axis=3).astype(query.dtype)
    return checkpoint_name(_by_position(output), SAVED_ATTENTION), weights, jnp.concatenate(sums, axis=3)


def _forward_rule(query: Array, key: Array, value: Array):
    output, weights, sums = _forward(query, key, value)
    return output, (query, key, value, output, weights, sums)


def _backward_rule(residuals: tuple[Any, ...], gradient: Array):
    query, key, value, output, weights, sums = residuals
    groups, dtype = key.shape[2], query.dtype
    rows, scaled_gradient = _by_group(_scaled(query), groups), _by_group(gradient, groups) / sums
    inner = jnp.sum(scaled_gradient * _by_group(output, groups), axis=-1, keepdims=True)
    scaled_gradient = scaled_gradient.astype(dtype)
    keys, values = (x.transpose(0, 2, 1, 3) for x in (key, value))
    grad_keys = grad_values = jnp.zeros(key.transpose(0, 2, 3, 1).shape, jnp.float32)
    grad_rows = []
    for start, block_weights in zip(range(0, query.shape[1], BLOCK), weights, strict=True):
        here = slice(start, start + BLOCK)
        block_queries, block_gradient = rows[..., here, :], scaled_gradient[..., here, :]
        grad_scores = block_weights * (_product(block_gradient, values.swapaxes(-1, -2)) - inner[..., here, :])
        grad_scores = grad_scores.astype(dtype)
        grad_rows.append(_product(grad_scores, keys))
        grad_keys += _product(_transposed(block_queries), _joined(grad_scores))
        grad_values += _product(_transposed(block_gradient), _joined(block_weights))
    grad_query = _scaled(_by_position(jnp.concatenate(grad_rows, axis=3)))
    # `grad_keys` and `grad_values` are [batch, kv_heads, dim, keys].
    grad_key, grad_value = (x.transpose(0, 3, 1, 2) for x in (grad_keys, grad_values))
    return grad_query.astype(dtype), grad_key.astype(key.dtype), grad_value.astype(value.dtype)


blockwise_attention.defvjp(_forward_rule, _backward_rule)


def _scaled(x: Array) -> Array:
    """`x / sqrt(dim)`, for queries or their gradient. Scores, which are more, then need no scaling."""
    return x * x.shape[-1] ** -0.5


def _by_group(x: Array, groups: int) -> Array:
    """[batch, seq, heads, dim] to [batch, kv_heads, query heads of each key head, seq, dim]."""
    batch, seq, heads, dim = x.shape
    return x.reshape(batch, seq, groups, heads // groups, dim).transpose(0, 2, 3, 1, 4)


def _by_position(x: Array) -> Array:
    """The inverse of `_by_group`."""
    batch, groups, heads, seq, dim = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, seq, groups * heads, dim)


def _joined(x: Array) -> Array:
    """[batch, kv_heads, heads, rows, columns] to [batch, kv_heads, heads * rows, columns]."""
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], x.shape[4])


def _transposed(x: Array) -> Array:
    """[batch, kv_heads, heads, rows, columns] to [batch, kv_heads, columns, heads * rows]."""
    return _joined(x).swapaxes(-1, -2)


def _product(x: Array, y: Float[Array, "batch kv_heads inner columns"]) -> Array:
    """Matrix product of `x` and `y` for each key head, accumulated and returned in float32."""
    rows = _joined(x) if x.ndim == 5 else x
    return jnp.matmul(rows, y, preferred_element_type=jnp.float32).reshape(*x.shape[:-1], y.shape[-1])
