"""Attention inside the conversations of packed rows, in plain XLA: where no kernel is at hand.

Blocks of queries take turns, and each looks at keys from its first conversation's first one to its own last one. How
many blocks of keys that is, data decide: blocks of queries with the same number share a loop, which has static shapes
and runs as often as there are such blocks. The backward pass makes weights again, their maxima and sums included:
were those of the forward pass kept, XLA would no longer make scores and weights in one kernel on a CPU.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from ross_jax.models.layers import SAVED_ATTENTION

BLOCK = 128
"""Queries whose scores are computed at once; keys are left out by as many, or more where rows are long."""
LOOPS = 8
"""At most; the more, the fewer keys that nothing attends to are looked at, and the longer XLA compiles."""
_NEVER = -1e30

Place = tuple[Array, Array, Array]
"""Of a block: its row, its first query, and the first key that it looks at."""


def packed_attention(
    query: Float[Array, "batch seq heads dim"],
    key: Float[Array, "batch seq kv_heads dim"],
    value: Float[Array, "batch seq kv_heads dim"],
    segments: Int[Array, "batch seq"],
) -> Float[Array, "batch seq heads dim"]:
    """Attention to earlier positions of the same segment; scores and softmax in float32.

    Args:
      segments: conversation number of each position; the better they are sorted, the less is computed. Those of
        segment 0, padding, attend to each other: finite, and without meaning.
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
        of_query, of_keys, of_values = gradients
        rows, some = _queries(scaled, place, bias, groups), _keys(keys, place, bias)
        weights, sums = _weights(rows, some, bias)
        above = _queries(gradient, place, bias, groups) / sums
        change = _product(above.astype(dtype), _keys(values, place, bias).swapaxes(-1, -2))
        change = weights * (change - _queries(inner, place, bias, groups) / sums)
        above, change, weights = (x.astype(dtype) for x in (above, change, weights))
        return (
            _write(of_query, _scaled(_product(change, some)), place, bias),
            _add(of_keys, _product(rows.swapaxes(-1, -2), change), place),
            _add(of_values, _product(above.swapaxes(-1, -2), weights), place),
        )

    # Those of keys and values with positions last: each is a product with a transposed operand, the smaller one, as
    # for the larger XLA takes three times as long on a CPU.
    transposed = jnp.zeros(keys.swapaxes(-1, -2).shape, jnp.float32)
    of_query, *others = _for_each_block(segments, step, (jnp.zeros_like(query), transposed, transposed))
    of_key, of_value = (x.transpose(0, 3, 1, 2).astype(key.dtype) for x in others)
    return of_query, of_key, of_value, None


_attention.defvjp(_forward_rule, _backward_rule)


def _for_each_block(segments: Int[Array, "batch seq"], step: Callable[[Place, Array, Any], Any], carry: Any) -> Any:
    """`carry` after `step(place, bias, carry)` of each block of queries.

    `bias`, [queries, keys], is what a block's scores are added to: zero, or next to minus infinity.
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
    """First position of the first block with a segment number between those of each block of queries, or before it."""
    last = jnp.where(segments == 0, jnp.iinfo(segments.dtype).max, segments)  # where packing puts padding
    blocks = last.reshape(len(segments), -1, size)
    lowest, highest = blocks.min(-1), blocks.max(-1)
    shared = (lowest[:, :, None] <= highest[:, None, :]) & (lowest[:, None, :] <= highest[:, :, None])
    return jnp.argmax(shared, axis=-1) * size


def _scaled(x: Array) -> Array:
    """Queries instead of scores, which are many more; or the gradient of queries."""
    return x * x.shape[-1] ** -0.5


def _queries(x: Float[Array, "batch seq heads dim"], place: Place, bias: Array, groups: int) -> Array:
    """A block's part, [kv_heads, heads of each x queries, dim]."""
    heads, dim = x.shape[2:]
    block = jax.lax.dynamic_slice(x, (place[0], place[1], 0, 0), (1, len(bias), heads, dim))
    return block.reshape(len(bias), groups, -1, dim).transpose(1, 2, 0, 3).reshape(groups, -1, dim)


def _keys(x: Float[Array, "batch kv_heads seq dim"], place: Place, bias: Array) -> Float[Array, "kv_heads keys dim"]:
    """What a block looks at."""
    return jax.lax.dynamic_slice(x, (place[0], 0, place[2], 0), (1, x.shape[1], bias.shape[1], x.shape[3]))[0]


def _write(x: Float[Array, "batch seq heads dim"], block: Array, place: Place, bias: Array) -> Array:
    """`x` with a block's part, as `_queries` returns it, in its place."""
    groups, dim = block.shape[0], block.shape[2]
    block = block.reshape(groups, -1, len(bias), dim).transpose(2, 0, 1, 3).reshape(1, len(bias), -1, dim)
    return jax.lax.dynamic_update_slice(x, block.astype(x.dtype), (place[0], place[1], 0, 0))


def _add(x: Float[Array, "batch kv_heads dim seq"], part: Float[Array, "kv_heads dim keys"], place: Place) -> Array:
    """`x` with a part added to it where a block looks."""
    at = (place[0], 0, 0, place[2])
    before = jax.lax.dynamic_slice(x, at, (1, *part.shape))
    return jax.lax.dynamic_update_slice(x, before + part, at)


def _product(x: Float[Array, "kv_heads rows inner"], y: Float[Array, "kv_heads inner columns"]) -> Array:
    """Of the matrices of each key head, accumulated and returned in float32."""
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)


def _weights(queries: Array, keys: Array, bias: Array) -> tuple[Array, Array]:
    """Weights [kv_heads, heads of each x queries, keys] before they are divided by their sums, and the sums."""
    scores = _product(queries, keys.swapaxes(-1, -2)).reshape(-1, *bias.shape) + bias
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    shape = queries.shape[:2]
    return weights.reshape(*shape, -1), jnp.sum(weights, axis=-1).reshape(*shape, 1)
