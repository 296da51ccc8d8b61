"""Next-token loss."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ross_jax.sharding import constrain, replicas

IGNORE = -100
"""Target of a position where nothing is to be predicted."""


def gather_supervised(
    hidden: Float[Array, "batch seq embed"], targets: Int[Array, "batch seq"], capacity: int
) -> tuple[Float[Array, "batch places embed"], Int[Array, "batch places"]]:
    """The supervised positions of each row and their targets, in order; places that stay empty are `IGNORE`.

    Args:
      capacity: most supervised positions that a row has; any beyond would be lost, so the packing plan must see to it.
    """
    order = jnp.argsort(targets == IGNORE, axis=1, stable=True)[:, :capacity]
    # Row by row: each row only touches itself, so that sharding the batch needs no communication.
    gathered = jax.vmap(lambda row, index: row.at[index].get(unique_indices=True, mode="promise_in_bounds"))
    return gathered(hidden, order), jnp.take_along_axis(targets, order, axis=1)


def next_token_loss(
    hidden: Float[Array, "batch seq embed"],
    targets: Int[Array, "batch seq"],
    logits: Callable[[Float[Array, "batch some embed"]], Float[Array, "batch some vocab"]],
    chunk: int = 1024,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Sum of cross entropies over supervised positions, and their number.

    Logits exist for `chunk` positions of a device at a time, forward and backward: the whole `[batch, seq, vocab]`
    never does. A chunk is a stretch of every row, so that each device works on its own rows and none waits for another.

    Args:
      hidden: final hidden states.
      targets: the id to predict at each position (already shifted), `IGNORE` where none.
      logits: the head, float32 out.
      chunk: positions per step of the scan, on each device; at least one of every row.
    """
    rows, length, width = hidden.shape
    stretch = max(1, min(length, chunk * replicas() // rows))
    padding = -length % stretch
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(rows, -1, stretch, width).swapaxes(0, 1)
    targets = jnp.pad(targets, ((0, 0), (0, padding)), constant_values=IGNORE).reshape(rows, -1, stretch).swapaxes(0, 1)

    @jax.checkpoint
    def step(total: Float[Array, ""], part: tuple[Array, Array]):
        states, ids = part
        scores = constrain(logits(constrain(states, "batch")), "batch", None, "vocab")
        picked = jnp.take_along_axis(scores, jnp.maximum(ids, 0)[..., None], axis=-1)[..., 0]
        losses = jax.nn.logsumexp(scores, axis=-1) - picked
        return total + jnp.sum(jnp.where(ids != IGNORE, losses, 0.0)), None

    total, _ = jax.lax.scan(step, jnp.zeros((), jnp.float32), (hidden, targets))
    return total, jnp.sum(targets != IGNORE)
