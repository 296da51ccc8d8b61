"""Next-token loss."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ross_jax.data.conversation import IGNORE
from ross_jax.models.layers import linear
from ross_jax.sharding import axis_size, constrain, logical_axes


def supervised_order(targets: Int[Array, "batch seq"], capacity: int) -> Int[Array, "batch places"]:
    """Where in its row each place of `gather_supervised` comes from."""
    return jnp.argsort(targets == IGNORE, axis=1, stable=True)[:, :capacity]


def gather_supervised(
    hidden: Float[Array, "batch seq embed"], targets: Int[Array, "batch seq"], capacity: int
) -> tuple[Float[Array, "batch places embed"], Int[Array, "batch places"]]:
    """The supervised positions of each row and their targets, in order; unused places have the target `IGNORE`.

    Args:
      capacity: most supervised positions of a row. Positions beyond it would be lost, so the packing plan limits them.
    """
    order = supervised_order(targets, capacity)
    # Row by row: a row only touches itself, so a sharded batch needs no communication.
    gathered = jax.vmap(lambda row, index: row.at[index].get(unique_indices=True, mode="promise_in_bounds"))
    return gathered(hidden, order), jnp.take_along_axis(targets, order, axis=1)


def next_token_loss(
    hidden: Float[Array, "batch seq embed"],
    targets: Int[Array, "batch seq"],
    head: Float[Array, "embed vocab"],
    dtype: DTypeLike = jnp.float32,
    chunk: int = 1024,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Sum of cross entropies over supervised positions, and the number of these positions; see `token_losses`."""
    return jnp.sum(token_losses(hidden, targets, head, dtype, chunk)), jnp.sum(targets != IGNORE)


def token_losses(
    hidden: Float[Array, "batch seq embed"],
    targets: Int[Array, "batch seq"],
    head: Float[Array, "embed vocab"],
    dtype: DTypeLike = jnp.float32,
    chunk: int = 1024,
) -> Float[Array, "batch seq"]:
    """The cross entropy of each supervised position; 0 elsewhere.

    Goes through the vocabulary in blocks, forward and again backward, so that no device holds all logits or, if the
    head is split, the whole head. Each block's columns are gathered, multiplied with all positions, and folded into a
    running maximum and sum, as in the online softmax of Milakov & Gimelshein (2018). With a single block, its logits
    are kept for the backward pass.

    Args:
      hidden: final hidden states.
      targets: the id to predict at each position (already shifted), `IGNORE` where none.
      head: the matrix that hidden states are multiplied with.
      dtype: of the operands; logits and losses are float32.
      chunk: memory budget for logits, in positions per device: a vocabulary block is sized so that its logits use as
        much memory as `chunk` full rows of logits.
    """
    rows, length, width = hidden.shape
    shards = axis_size("vocab") if head.shape[1] % axis_size("vocab") == 0 else 1
    columns = head.shape[1] // shards  # of a device
    count = min(columns, -(-rows * length // (axis_size("batch") * chunk)))
    size = -(-columns // count)
    # blocks [count, embed, shards * size]: a block has the same number of columns of every shard. ids likewise.
    blocks = jnp.pad(head.astype(dtype).reshape(width, shards, columns), ((0, 0), (0, 0), (0, count * size - columns)))
    blocks = jnp.moveaxis(blocks.reshape(width, shards, count, size), 2, 0).reshape(count, width, shards * size)
    axes = logical_axes("language/head")
    blocks = constrain(blocks, None, *axes)
    inside = np.arange(count * size).reshape(count, 1, size)
    ids = np.where(inside < columns, inside + columns * np.arange(shards)[:, None], -1).reshape(count, shards * size)
    # In float32, so that the blocks' gradients are summed in float32.
    states = constrain(hidden.astype(jnp.float32), "batch")

    def step(carry: tuple[Array, Array, Array], block: tuple[Array, Array]):
        highest, total, picked = carry
        kernel, ids = block
        scores = linear(states.astype(dtype), kernel, None, axes, jnp.float32)
        scores = jnp.where(ids < 0, -jnp.inf, scores)  # pyright: ignore[reportArgumentType] custom_vjp hides the type
        scores = constrain(scores, "batch", None, "vocab")
        rises = jax.lax.stop_gradient(jnp.maximum(highest, jnp.max(scores, axis=-1)))
        total = total * jnp.exp(highest - rises) + jnp.sum(jnp.exp(scores - rises[..., None]), axis=-1)
        picked += jnp.sum(jnp.where(ids == targets[..., None], scores, 0.0), axis=-1)
        return (rises, total, picked), None

    zeros = jnp.zeros((rows, length), jnp.float32)
    step = jax.checkpoint(step) if count > 1 else step
    (highest, total, picked), _ = jax.lax.scan(step, (zeros - jnp.inf, zeros, zeros), (blocks, jnp.asarray(ids)))
    losses = highest + jnp.log(total) - picked
    return jnp.where(targets != IGNORE, losses, 0.0)
