"""Attention: one entry point, whatever kernel runs behind it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def segment_mask(
    query_segments: Int[Array, "batch queries"],
    key_segments: Int[Array, "batch keys"],
    first_query: int | Int[Array, ""] = 0,
) -> Bool[Array, "batch 1 queries keys"]:
    """Causal attention that never crosses a segment.

    Args:
      query_segments: conversation number of each query; 0 = padding.
      key_segments: the same for each key.
      first_query: index, among the keys, of the first query (the filled length of a cache).
    """
    same = query_segments[:, :, None] == key_segments[:, None, :]
    order = first_query + jnp.arange(query_segments.shape[1])[:, None] >= jnp.arange(key_segments.shape[1])
    return (same & order & (key_segments != 0)[:, None, :])[:, None]


def attention(
    query: Float[Array, "batch queries heads dim"],
    key: Float[Array, "batch keys kv_heads dim"],
    value: Float[Array, "batch keys kv_heads dim"],
    mask: Bool[Array, "#batch 1 queries keys"] | None = None,
) -> Float[Array, "batch queries heads dim"]:
    """Scaled dot-product attention; scores and softmax in float32, grouped-query heads when `kv_heads < heads`.

    A query that may attend to nothing (padding) yields a finite value that means nothing.
    """
    return jax.nn.dot_product_attention(query, key, value, mask=mask)
