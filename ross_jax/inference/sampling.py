"""How the next token is chosen from a model's scores: the most likely one, or one that is drawn.

Matches transformers' logits processors, applied in this order: repetition penalty, temperature, top-k, top-p, min-p.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32


class Drawing(NamedTuple):
    """How each row's tokens are drawn.

    Attributes:
      temperature: divides the scores; 0 takes the most likely token.
      top_k: draws from the k most likely tokens; 0 draws from all.
      top_p: draws from the most likely tokens that together have this probability.
      min_p: draws from tokens with at least this share of the most likely token's probability.
      penalty: divides positive scores of tokens that the row has, and multiplies negative ones.
      seed: seed of the row's draws.
    """

    temperature: Float[Array, " batch"]
    top_k: Int[Array, " batch"]
    top_p: Float[Array, " batch"]
    min_p: Float[Array, " batch"]
    penalty: Float[Array, " batch"]
    seed: UInt32[Array, " batch"]


def choose(
    scores: Float[Array, "batch vocab"],
    seen: Bool[Array, "batch vocab"],
    drawing: Drawing,
    number: Int[Array, " batch"],
) -> Int[Array, " batch"]:
    """The next token of each row, which depends on no other row.

    Args:
      scores: the model's scores.
      seen: True for tokens that the row has.
      number: number of tokens that the row has drawn before.
    """
    scores = jax.lax.cond(jnp.any(drawing.penalty != 1), penalise, lambda scores, *_: scores, scores, seen, drawing)

    def draw(scores: Array) -> Array:
        def gumbel(seed: Array, number: Array) -> Array:
            return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), number), scores.shape[1:])

        noise = jax.vmap(gumbel)(drawing.seed, number)
        drawn = jnp.argmax(warp(scores, drawing) + noise, axis=-1)
        return jnp.where(drawing.temperature > 0, drawn, jnp.argmax(scores, axis=-1))

    any_drawn = jnp.any(drawing.temperature > 0)
    return jax.lax.cond(any_drawn, draw, lambda scores: jnp.argmax(scores, axis=-1), scores).astype(jnp.int32)


def penalise(
    scores: Float[Array, "batch vocab"], seen: Bool[Array, "batch vocab"], drawing: Drawing
) -> Float[Array, "batch vocab"]:
    """Scores after the repetition penalty."""
    penalty = drawing.penalty[:, None]
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def warp(scores: Float[Array, "batch vocab"], drawing: Drawing) -> Float[Array, "batch vocab"]:
    """Scores divided by the temperature; -inf for tokens that are not drawn. Equal scores are kept or dropped together.

    Rows whose temperature is 0 are divided by 1.
    """
    scores = scores / jnp.where(drawing.temperature > 0, drawing.temperature, 1)[:, None]
    size = scores.shape[-1]
    ordered = -jnp.sort(-scores, axis=-1)
    top_k = jnp.where(drawing.top_k > 0, jnp.minimum(drawing.top_k, size), size)
    within = jnp.arange(size) < top_k[:, None]
    least = jnp.take_along_axis(ordered, top_k[:, None] - 1, axis=-1)
    probabilities = jax.nn.softmax(jnp.where(within, ordered, -jnp.inf), axis=-1)
    # A token is drawn as long as the more likely ones have less than top_p together; the most likely one always is.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    top_p = jnp.where(drawing.top_p < 1, drawing.top_p, jnp.inf)[:, None]  # rounded sums reach 1 before the end
    drawn = within & ((before < top_p) | (jnp.arange(size) == 0))
    last = jnp.take_along_axis(ordered, drawn.sum(-1, keepdims=True) - 1, axis=-1)
    floor = ordered[:, :1] + jnp.log(drawing.min_p)[:, None]
    return jnp.where(scores >= jnp.maximum(jnp.maximum(least, last), floor), scores, -jnp.inf)
