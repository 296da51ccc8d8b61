"""Attention of all positions to all by blocks of queries, in plain XLA: where no kernel is at hand.

The backward pass reads the weights of the forward pass, of a layer at a time if layers are computed again: those have
just made them, and FlashAttention's way (Dao et al., 2022), from the logarithm of their sums, would make them twice.
Where a gradient is a product with a transposed operand, it is the smaller one: for the larger, XLA takes three times as
long on a CPU.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from ross_jax.models.layers import SAVED_ATTENTION

BLOCK = 256
"""Queries whose scores are computed at once."""


@jax.custom_vjp
def blockwise_attention(
    query: Float[Array, "batch seq heads dim"],
    key: Float[Array, "batch keys kv_heads dim"],
    value: Float[Array, "batch keys kv_heads dim"],
) -> Float[Array, "batch seq heads dim"]:
    """Attention to all keys, however many; scores and softmax in float32."""
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
    rows, upper = _by_group(_scaled(query), groups), _by_group(gradient, groups) / sums
    inner = jnp.sum(upper * _by_group(output, groups), axis=-1, keepdims=True)
    upper = upper.astype(dtype)
    keys, values = (x.transpose(0, 2, 1, 3) for x in (key, value))
    of_keys = of_values = jnp.zeros(key.transpose(0, 2, 3, 1).shape, jnp.float32)
    of_rows = []
    for start, block in zip(range(0, query.shape[1], BLOCK), weights, strict=True):
        here = slice(start, start + BLOCK)
        some, above = rows[..., here, :], upper[..., here, :]
        change = block * (_product(above, values.swapaxes(-1, -2)) - inner[..., here, :])
        change = change.astype(dtype)
        of_rows.append(_product(change, keys))
        of_keys += _product(_transposed(some), _joined(change))
        of_values += _product(_transposed(above), _joined(block))
    of_query = _scaled(_by_position(jnp.concatenate(of_rows, axis=3)))
    # `of_keys` and `of_values` are [batch, kv_heads, dim, seq].
    of_key, of_value = (x.transpose(0, 3, 1, 2) for x in (of_keys, of_values))
    return of_query.astype(dtype), of_key.astype(key.dtype), of_value.astype(value.dtype)


blockwise_attention.defvjp(_forward_rule, _backward_rule)


def _scaled(x: Array) -> Array:
    """Queries instead of scores, which are many more; or the gradient of queries."""
    return x * x.shape[-1] ** -0.5


def _by_group(x: Array, groups: int) -> Array:
    """[batch, seq, heads, dim] to [batch, kv_heads, heads of each, seq, dim]."""
    batch, seq, heads, dim = x.shape
    return x.reshape(batch, seq, groups, heads // groups, dim).transpose(0, 2, 3, 1, 4)


def _by_position(x: Array) -> Array:
    """The inverse of `_by_group`."""
    batch, groups, heads, seq, dim = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, seq, groups * heads, dim)


def _joined(x: Array) -> Array:
    """[batch, kv_heads, heads of each, rows, columns] to [batch, kv_heads, all rows, columns]."""
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], x.shape[4])


def _transposed(x: Array) -> Array:
    """The same, then its last two axes swapped."""
    return _joined(x).swapaxes(-1, -2)


def _product(x: Array, y: Float[Array, "batch kv_heads inner columns"]) -> Array:
    """Matrix product with the matrices of each key head, accumulated and returned in float32."""
    rows = _joined(x) if x.ndim == 5 else x
    return jnp.matmul(rows, y, preferred_element_type=jnp.float32).reshape(*x.shape[:-1], y.shape[-1])
