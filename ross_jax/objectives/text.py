"""Next-token loss."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

IGNORE = -100
"""Target of a position where nothing is to be predicted."""


def next_token_loss(
    hidden: Float[Array, "batch seq embed"],
    targets: Int[Array, "batch seq"],
    logits: Callable[[Float[Array, "tokens embed"]], Float[Array, "tokens vocab"]],
    chunk: int = 1024,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Sum of cross entropies over supervised positions, and their number.

    Logits exist for `chunk` positions at a time, forward and backward: the whole `[batch, seq, vocab]` never does.

    Args:
      hidden: final hidden states.
      targets: the id to predict at each position (already shifted), `IGNORE` where none.
      logits: the head, float32 out.
      chunk: positions per step of the scan.
    """
    width = hidden.shape[-1]
    count = targets.size
    chunk = min(chunk, count)
    padding = -count % chunk
    hidden = jnp.pad(hidden.reshape(count, width), ((0, padding), (0, 0))).reshape(-1, chunk, width)
    targets = jnp.pad(targets.reshape(count), (0, padding), constant_values=IGNORE).reshape(-1, chunk)

    @jax.checkpoint
    def step(total: Float[Array, ""], part: tuple[Array, Array]):
        states, ids = part
        scores = logits(states)
        picked = jnp.take_along_axis(scores, jnp.maximum(ids, 0)[:, None], axis=-1)[:, 0]
        losses = jax.nn.logsumexp(scores, axis=-1) - picked
        return total + jnp.sum(jnp.where(ids != IGNORE, losses, 0.0)), None

    total, _ = jax.lax.scan(step, jnp.zeros((), jnp.float32), (hidden, targets))
    return total, jnp.sum(targets != IGNORE)
