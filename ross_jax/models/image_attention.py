"""Attention between all tokens of an image, on TPU, for small heads: several share the 128 lanes of a register.

    lanes   0 ....... 63 | 64 ...... 127         one group of two heads of 64 values
            head 0       | head 1

Splash attention needs every head in an array of its own. Heads of 64 values would take twice the memory, and copying
them would cost more than the attention itself. This kernel reads queries, keys and values as projections write them,
and computes all scores of an image and a head at once. A head's matrix products run over all 128 lanes, with the lanes
of other heads set to zero: a matrix unit of 128 rows is no slower for that. Heads run in a loop, because unrolled code
is slow to compile.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, Float

LANES = 128
"""Number of values in a row of a TPU's registers."""
LONGEST = 1024
"""Largest number of tokens per image whose scores fit on chip."""


def fits(query: tuple[int, ...], key: tuple[int, ...], dtype: DTypeLike) -> bool:
    """Whether `image_attention` can compute attention for these shapes, `[batch, tokens, heads, dim]`.

    It can in bfloat16, if heads fill groups of 128 lanes without a remainder and an image has at most 1024 tokens.
    """
    _, length, heads, dim = query
    full_groups = LANES % dim == 0 == heads * dim % LANES
    return query == key and full_groups and length <= LONGEST and jnp.dtype(dtype) == jnp.bfloat16


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def image_attention(
    query: Float[Array, "batch tokens width"],
    key: Float[Array, "batch tokens width"],
    value: Float[Array, "batch tokens width"],
    dim: int,
    interpret: bool = False,
) -> Float[Array, "batch tokens width"]:
    """Scaled dot-product attention; scores and softmax in float32. The shapes must pass `fits`.

    Args:
      query, key, value: width = heads * dim, heads side by side.
      dim: values of a head.
      interpret: interprets the kernel, which is slow but runs on any platform.
    """
    return _run(_forward, 1, (query, key, value), "image_attention_fwd", dim, interpret)[0]


def _vjp_forward(query: Array, key: Array, value: Array, dim: int, interpret: bool):
    return image_attention(query, key, value, dim, interpret), (query, key, value)


def _vjp_backward(dim: int, interpret: bool, residuals: tuple[Array, Array, Array], gradient: Array):
    return tuple(_run(_backward, 3, (*residuals, gradient), "image_attention_bwd", dim, interpret))


image_attention.defvjp(_vjp_forward, _vjp_backward)


def _run(kernel, outputs: int, arrays: tuple[Array, ...], name: str, dim: int, interpret: bool) -> Sequence[Array]:
    """Runs a kernel on each image and each group of heads.

    The kernel's name ends in the size of a head, for `plan.cost`: the shapes of the kernel's inputs do not tell it.

    Args:
      outputs: number of outputs, each shaped as the first of `arrays`.
    """
    batch, length, width = arrays[0].shape
    block = pl.BlockSpec((1, length, LANES), lambda image, group: (image, 0, group))
    return pl.pallas_call(
        functools.partial(kernel, dim),
        grid=(batch, width // LANES),
        in_specs=[block] * len(arrays),
        out_specs=[block] * outputs,
        out_shape=[jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype)] * outputs,
        name=f"{name}_{dim}",
        interpret=interpret,
    )(*arrays)


def _forward(dim: int, query_ref, key_ref, value_ref, output_ref):
    query, key, value = query_ref[0], key_ref[0], value_ref[0]

    def head(index: Array, output: Array) -> Array:
        own = _lanes_of(index, query.shape, dim)
        weights = _weights(_only(own, query), key, dim)
        return jnp.where(own, _product(weights.astype(value.dtype), value, 0, 0), output)

    output = jax.lax.fori_loop(0, LANES // dim, head, jnp.zeros(query.shape, jnp.float32))
    output_ref[0] = output.astype(output_ref.dtype)


def _backward(dim: int, query_ref, key_ref, value_ref, gradient_ref, grad_query_ref, grad_key_ref, grad_value_ref):
    key, value, dtype = key_ref[0], value_ref[0], key_ref.dtype

    def head(index: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        grad_query, grad_key, grad_value = sums
        own = _lanes_of(index, key.shape, dim)
        query, gradient = _only(own, query_ref[0]), _only(own, gradient_ref[0])
        weights = _weights(query, key, dim)
        grad_value += _product(weights.astype(dtype), gradient, 1, 0)
        grad_weights = _product(value, gradient, 1, 1)
        grad_scores = weights * (grad_weights - jnp.sum(weights * grad_weights, axis=0, keepdims=True))
        grad_scores = (grad_scores * dim**-0.5).astype(dtype)
        grad_key += _product(grad_scores, query, 1, 0)
        return jnp.where(own, _product(grad_scores, key, 0, 0), grad_query), grad_key, grad_value

    zeros = (jnp.zeros(key.shape, jnp.float32),) * 3
    results = jax.lax.fori_loop(0, LANES // dim, head, zeros)
    for ref, result in zip((grad_query_ref, grad_key_ref, grad_value_ref), results, strict=True):
        ref[0] = result.astype(dtype)


def _lanes_of(head: Array, shape: tuple[int, int], dim: int) -> Array:
    """bool, of `shape`: True in the lanes that belong to a head, counted inside its group."""
    lanes = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return (lanes >= head * dim) & (lanes < (head + 1) * dim)


def _only(own: Array, x: Array) -> Array:
    """`x`, with zeros where `own` is False."""
    return jnp.where(own, x.astype(jnp.float32), 0.0).astype(x.dtype)


def _weights(query: Array, key: Array, dim: int) -> Float[Array, "keys queries"]:
    """Softmax over the keys. Keys are the first axis, because sums over rows are cheaper than sums over lanes."""
    scores = _product(key, query, 1, 1) * dim**-0.5
    scores = jnp.exp(scores - jnp.max(scores, axis=0, keepdims=True))
    return scores / jnp.sum(scores, axis=0, keepdims=True)


def _product(left: Array, right: Array, left_axis: int, right_axis: int) -> Float[Array, "rows columns"]:
    dimensions = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)
