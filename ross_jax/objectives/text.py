"""Next-token loss."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ross_jax.models.layers import linear
from ross_jax.sharding import axis_size, constrain

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
    head: Float[Array, "embed vocab"],
    dtype: DTypeLike = jnp.float32,
    chunk: int = 1024,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Sum of cross entropies over supervised positions, and their number.

    Goes through the vocabulary in blocks, forward and again backward: neither all logits nor, where the head is split
    over devices, the whole head exists on one. Each block's columns are gathered, multiplied with all positions, and
    folded into a running maximum and sum, as in the online softmax of Milakov & Gimelshein (2018). Where one block is
    all, its logits stay for the backward pass.

    Args:
      hidden: final hidden states.
      targets: the id to predict at each position (already shifted), `IGNORE` where none.
      head: what hidden states are multiplied with.
      dtype: of the operands; logits and everything after are float32.
      chunk: positions whose logits over the whole vocabulary would take the memory that those of a block take, on each
        device.
    """
    rows, length, width = hidden.shape
    shards = axis_size("vocab") if head.shape[1] % axis_size("vocab") == 0 else 1
    columns = head.shape[1] // shards  # of a device
    count = min(columns, -(-rows * length // (axis_size("batch") * chunk)))
    size = -(-columns // count)
    # A block takes as many columns of every device that holds some. [count, embed, shards * size], ids likewise.
    blocks = jnp.pad(head.astype(dtype).reshape(width, shards, columns), ((0, 0), (0, 0), (0, count * size - columns)))
    blocks = jnp.moveaxis(blocks.reshape(width, shards, count, size), 2, 0).reshape(count, width, shards * size)
    blocks = constrain(blocks, None, "embed", "vocab")
    inside = np.arange(count * size).reshape(count, 1, size)
    ids = np.where(inside < columns, inside + columns * np.arange(shards)[:, None], -1).reshape(count, shards * size)
    # In float32, so that what blocks make of its gradient adds up in float32.
    states = constrain(hidden.astype(jnp.float32), "batch")

    def step(carry: tuple[Array, Array, Array], block: tuple[Array, Array]):
        highest, total, picked = carry
        kernel, ids = block
        scores = linear(states.astype(dtype), kernel, None, ("embed", "vocab"), jnp.float32)
        scores = constrain(jnp.where(ids < 0, -jnp.inf, scores), "batch", None, "vocab")
        rises = jax.lax.stop_gradient(jnp.maximum(highest, jnp.max(scores, axis=-1)))
        total = total * jnp.exp(highest - rises) + jnp.sum(jnp.exp(scores - rises[..., None]), axis=-1)
        picked += jnp.sum(jnp.where(ids == targets[..., None], scores, 0.0), axis=-1)
        return (rises, total, picked), None

    zeros = jnp.zeros((rows, length), jnp.float32)
    step = jax.checkpoint(step) if count > 1 else step
    (highest, total, picked), _ = jax.lax.scan(step, (zeros - jnp.inf, zeros, zeros), (blocks, jnp.asarray(ids)))
    losses = highest + jnp.log(total) - picked
    return jnp.sum(jnp.where(targets != IGNORE, losses, 0.0)), jnp.sum(targets != IGNORE)
