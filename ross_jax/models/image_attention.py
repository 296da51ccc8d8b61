"""Attention of all tokens of a picture to all, on TPU, where several heads share the 128 lanes of a register.

Splash attention wants each head by itself: for heads of 64 values that takes twice the memory, and copies that cost
more than the attention. Here queries, keys and values stay as projections write them, a picture's scores are made at
once, and a head's products run over the lanes of its neighbours too, which are set to zero: a matrix unit of 128 rows
takes no longer for them. Heads are a loop, not copies of its code, which are slow to compile.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, Float

LANES = 128
"""Values in a row of a TPU's registers."""
LONGEST = 1024
"""Tokens of a picture whose scores fit on chip."""


def fits(query: tuple[int, ...], key: tuple[int, ...], dtype: DTypeLike) -> bool:
    """Whether `image_attention` computes queries and keys of these shapes, `[batch, tokens, heads, dim]`.

    It does in bfloat16, for whole groups of heads in 128 lanes and at most 1024 tokens.
    """
    _, length, heads, dim = query
    whole = LANES % dim == 0 == heads * dim % LANES
    return query == key and whole and length <= LONGEST and jnp.dtype(dtype) == jnp.bfloat16


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def image_attention(
    query: Float[Array, "batch tokens width"],
    key: Float[Array, "batch tokens width"],
    value: Float[Array, "batch tokens width"],
    dim: int,
    interpret: bool = False,
) -> Float[Array, "batch tokens width"]:
    """Scaled dot-product attention where it `fits`; scores and softmax in float32.

    Args:
      dim: size of a head; heads lie side by side.
      interpret: runs on any platform, slowly.
    """
    return _run(_forward, 1, (query, key, value), "image_attention_fwd", dim, interpret)[0]


def _vjp_forward(query: Array, key: Array, value: Array, dim: int, interpret: bool):
    return image_attention(query, key, value, dim, interpret), (query, key, value)


def _vjp_backward(dim: int, interpret: bool, residuals: tuple[Array, Array, Array], gradient: Array):
    return tuple(_run(_backward, 3, (*residuals, gradient), "image_attention_bwd", dim, interpret))


image_attention.defvjp(_vjp_forward, _vjp_backward)


def _run(kernel, outputs: int, arrays: tuple[Array, ...], name: str, dim: int, interpret: bool) -> Sequence[Array]:
    """Runs a kernel on each picture and group of heads; as many outputs, shaped as the first array.

    Its name ends in the size of a head, which the shapes of what it reads do not tell (see `plan.cost`).
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
    """Which lanes are a head's, of those that share them."""
    lanes = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return (lanes >= head * dim) & (lanes < (head + 1) * dim)


def _only(own: Array, x: Array) -> Array:
    return jnp.where(own, x.astype(jnp.float32), 0.0).astype(x.dtype)


def _weights(query: Array, key: Array, dim: int) -> Float[Array, "keys queries"]:
    """Softmax over the keys. They come first: most sums are then over rows, which are cheap, and not over lanes."""
    scores = _product(key, query, 1, 1) * dim**-0.5
    scores = jnp.exp(scores - jnp.max(scores, axis=0, keepdims=True))
    return scores / jnp.sum(scores, axis=0, keepdims=True)


def _product(left: Array, right: Array, left_axis: int, right_axis: int) -> Float[Array, "rows columns"]:
    dimensions = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)
