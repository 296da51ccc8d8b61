"""Attention inside the conversations of packed rows, in plain XLA: for platforms without an attention kernel.

    row                1 1 1 1 | 1 2 2 2 | 2 2 3 3        three blocks, three conversations
    keys of block 0    x x x x
    keys of block 1    x x x x   x x x x
    keys of block 2              x x x x   x x x x

Queries are computed block by block. A block reads the keys from the start of the first block that shares a conversation
with it, to its own last position. The number of keys depends on the data, but shapes must be static: there is one loop
for each number of keys, and it runs over all blocks that read that many.

The backward pass computes the weights, their maxima and their sums again. If it read the forward pass's values, XLA for
CPU would no longer compute scores and weights in one kernel.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from ross_jax.models.layers import SAVED_ATTENTION

BLOCK = 128
"""Number of queries whose scores are computed at once. Keys are skipped in units of as many, or more in long rows."""
LOOPS = 8
"""Largest number of loops. More loops skip more keys that no query attends to, but take longer to compile."""
_NEVER = -1e30

Place = tuple[Array, Array, Array]
"""Place of a block: its row, its first query, and the first key that it reads."""


def packed_attention(
    query: Float[Array, "batch seq heads dim"],
    key: Float[Array, "batch seq kv_heads dim"],
    value: Float[Array, "batch seq kv_heads dim"],
    segments: Int[Array, "batch seq"],
) -> Float[Array, "batch seq heads dim"]:
    """Attention to earlier positions of the same segment; scores and softmax in float32.

    Args:
      segments: conversation number of each position; 0 = padding. The numbers may lie in any order, but sorted numbers
        need the least computation. Padding positions attend to each other: their output is finite, but has no meaning.
    """
    length = query.shape[1]
    if not query.size:
        return query
    padding = -length % min(BLOCK, length)
    padded = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (query, key, value))
    return _attention(*padded, jnp.pad(segments, ((0, 0), (0, padding))))[:, :length]


@jax.custom_vjp
def _attention(query: Array, key: Array, value: Array, segments: Array) -> Array:
    return _forward(query, key, value, segments)


def _forward(query: Array, key: Array, value: Array, segments: Array) -> Array:
    groups, scaled = key.shape[2], _scaled(query)
    keys, values = (x.swapaxes(1, 2) for x in (key, value))

    def step(place: Place, bias: Array, output: Array) -> Array:
        weights, sums = _weights(_queries(scaled, place, bias, groups), _keys(keys, place, bias), bias)
        attended = _product(weights.astype(value.dtype), _keys(values, place, bias)) / sums
        return _write(output, attended, place, bias)

    return checkpoint_name(_for_each_block(segments, step, jnp.zeros_like(query)), SAVED_ATTENTION)


def _forward_rule(query: Array, key: Array, value: Array, segments: Array):
    output = _forward(query, key, value, segments)
    return output, (query, key, value, segments, output)


def _backward_rule(residuals: tuple[Array, ...], gradient: Array):
    query, key, value, segments, output = residuals
    groups, dtype, scaled = key.shape[2], query.dtype, _scaled(query)
    keys, values = (x.swapaxes(1, 2) for x in (key, value))
    inner = jnp.sum(gradient.astype(jnp.float32) * output, axis=-1, keepdims=True)

    def step(place: Place, bias: Array, gradients: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        grad_query, grad_keys, grad_values = gradients
        rows, block_keys = _queries(scaled, place, bias, groups), _keys(keys, place, bias)
        weights, sums = _weights(rows, block_keys, bias)
        block_gradient = _queries(gradient, place, bias, groups) / sums
        grad_scores = _product(block_gradient.astype(dtype), _keys(values, place, bias).swapaxes(-1, -2))
        grad_scores = weights * (grad_scores - _queries(inner, place, bias, groups) / sums)
        block_gradient, grad_scores, weights = (x.astype(dtype) for x in (block_gradient, grad_scores, weights))
        return (
            _write(grad_query, _scaled(_product(grad_scores, block_keys)), place, bias),
            _add(grad_keys, _product(rows.swapaxes(-1, -2), grad_scores), place),
            _add(grad_values, _product(block_gradient.swapaxes(-1, -2), weights), place),
        )

    # The gradients of keys and values have positions as their last axis. Each is then a product whose smaller operand
    # is transposed, which is faster in XLA for CPU.
    transposed = jnp.zeros(keys.swapaxes(-1, -2).shape, jnp.float32)
    grad_query, *others = _for_each_block(segments, step, (jnp.zeros_like(query), transposed, transposed))
    grad_key, grad_value = (x.transpose(0, 3, 1, 2).astype(key.dtype) for x in others)
    return grad_query, grad_key, grad_value, None


_attention.defvjp(_forward_rule, _backward_rule)


def _for_each_block(segments: Int[Array, "batch seq"], step: Callable[[Place, Array, Any], Any], carry: Any) -> Any:
    """Runs `carry = step(place, bias, carry)` for each block of queries, and returns the last `carry`.

    `bias`, [queries, keys], is added to a block's scores: 0 where a query may attend to a key, else a large negative
    number.
    """
    batch, length = segments.shape
    size = min(BLOCK, length)
    unit = -(-length // size // LOOPS) * size
    starts = jnp.arange(0, length, size)
    units = -((_first_keys(segments, size) - starts - size) // unit)  # [batch, blocks]; rounded up
    order = jnp.argsort(units, axis=None)
    rows, starts = (jnp.broadcast_to(x, units.shape).ravel()[order] for x in (jnp.arange(batch)[:, None], starts))
    counts = range(1, -(-length // unit) + 1)
    inner = jnp.searchsorted(units.ravel()[order], jnp.arange(2, len(counts) + 1))
    bounds = [0, *inner, units.size]
    for count in counts:
        keys = min(count * unit, length)

        def one(index: Array, carry: Any, keys: int = keys) -> Any:
            row, start = rows[index], starts[index]
            first = jnp.maximum(start + size - keys, 0)
            own = jax.lax.dynamic_slice(segments, (row, start), (1, size))[0]
            others = jax.lax.dynamic_slice(segments, (row, first), (1, keys))[0]
            earlier = (start + jnp.arange(size))[:, None] >= first + jnp.arange(keys)
            bias = jnp.where((own[:, None] == others) & earlier, 0.0, _NEVER)
            return step((row, start, first), bias, carry)

        carry = jax.lax.fori_loop(bounds[count - 1], bounds[count], one, carry)
    return carry


def _first_keys(segments: Int[Array, "batch seq"], size: int) -> Int[Array, "batch blocks"]:
    """Index of the first key that each block of queries reads: the start of the first block that may share a segment.

    Two blocks may share a segment if the ranges of their segment numbers overlap.
    """
    # Padding sorts last, where packing puts it.
    last = jnp.where(segments == 0, jnp.iinfo(segments.dtype).max, segments)
    blocks = last.reshape(len(segments), -1, size)
    lowest, highest = blocks.min(-1), blocks.max(-1)
    shared = (lowest[:, :, None] <= highest[:, None, :]) & (lowest[:, None, :] <= highest[:, :, None])
    return jnp.argmax(shared, axis=-1) * size


def _scaled(x: Array) -> Array:
    """`x / sqrt(dim)`, for queries or their gradient. Scores, which are more, then need no scaling."""
    return x * x.shape[-1] ** -0.5


def _queries(x: Float[Array, "batch seq heads dim"], place: Place, bias: Array, groups: int) -> Array:
    """A block of `x`, [kv_heads, query heads of each key head * queries, dim]."""
    heads, dim = x.shape[2:]
    block = jax.lax.dynamic_slice(x, (place[0], place[1], 0, 0), (1, len(bias), heads, dim))
    return block.reshape(len(bias), groups, -1, dim).transpose(1, 2, 0, 3).reshape(groups, -1, dim)


def _keys(x: Float[Array, "batch kv_heads seq dim"], place: Place, bias: Array) -> Float[Array, "kv_heads keys dim"]:
    """The keys, or values, that a block of queries reads."""
    return jax.lax.dynamic_slice(x, (place[0], 0, place[2], 0), (1, x.shape[1], bias.shape[1], x.shape[3]))[0]


def _write(x: Float[Array, "batch seq heads dim"], block: Array, place: Place, bias: Array) -> Array:
    """`x` with a block, shaped as by `_queries`, written to its place."""
    groups, dim = block.shape[0], block.shape[2]
    block = block.reshape(groups, -1, len(bias), dim).transpose(2, 0, 1, 3).reshape(1, len(bias), -1, dim)
    return jax.lax.dynamic_update_slice(x, block.astype(x.dtype), (place[0], place[1], 0, 0))


def _add(x: Float[Array, "batch kv_heads dim seq"], part: Float[Array, "kv_heads dim keys"], place: Place) -> Array:
    """`x` with `part` added at the keys that a block reads."""
    at = (place[0], 0, 0, place[2])
    before = jax.lax.dynamic_slice(x, at, (1, *part.shape))
    return jax.lax.dynamic_update_slice(x, before + part, at)


def _product(x: Float[Array, "kv_heads rows inner"], y: Float[Array, "kv_heads inner columns"]) -> Array:
    """Matrix product of `x` and `y` for each key head, accumulated and returned in float32."""
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)


def _weights(queries: Array, keys: Array, bias: Array) -> tuple[Array, Array]:
    """Attention weights before the division by their sums, and the sums.

    Shapes: [kv_heads, query heads of each key head * queries, keys], and the same with 1 in place of keys.
    """
    scores = _product(queries, keys.swapaxes(-1, -2)).reshape(-1, *bias.shape) + bias
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    shape = queries.shape[:2]
    return weights.reshape(*shape, -1), jnp.sum(weights, axis=-1).reshape(*shape, 1)
