"""The training step: gradients of the loss, one optimizer update. Compiled once.

The loss itself is `ross_jax.objectives.loss.Loss`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array

from ross_jax.config import Count, Dtype, Size
from ross_jax.models.layers import RematPolicy
from ross_jax.objectives.loss import Counts, Loss, Losses
from ross_jax.sharding import compiler_options, constrain
from ross_jax.training.state import TrainState, Tree

Batch = dict[str, Array]
Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """How a step computes.

    Attributes:
      accumulate: micro-batches per step; rows of a batch must be a multiple of it.
      dtype: of the activations of vision encoder and language model; for the denoiser see `reconstruction.dtype`.
      remat: what the backward pass through encoder and language model recomputes (see `models.layers.stack`).
      text_chunk: memory budget for logits, in positions per device: a vocabulary block is sized so that its logits use
        as much memory as text_chunk full rows of logits. With as many as a device has, logits are kept for the
        backward pass.
    """

    accumulate: Size = 1
    dtype: Dtype = "bfloat16"
    remat: RematPolicy = "full"
    text_chunk: Count = 1024


def gradients(
    loss: Loss, state: TrainState, batch: Batch, counts: Counts, key: Array, accumulate: int = 1
) -> tuple[Losses, Tree]:
    """Both losses of a batch, and the gradients of their weighted sum.

    Args:
      accumulate: micro-batches that the batch is cut into, one after the other.
    """
    function = jax.value_and_grad(loss, has_aux=True)
    if accumulate == 1:
        (_, losses), grads = function(state.params, state.frozen, batch, counts, key)
        return losses, grads
    # Micro-batch m takes every accumulate-th row, so that each device keeps its own rows.
    micro = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
    micro = jax.tree.map(lambda x: constrain(x, None, "batch"), micro)

    def add(carry: tuple[Losses, Tree], part: tuple[Batch, Array]):
        rows, number = part
        (_, losses), grads = function(state.params, state.frozen, rows, counts, key, number)
        return jax.tree.map(jnp.add, carry, (losses, grads)), None

    zeros = loss.zeros(batch), jax.tree.map(jnp.zeros_like, state.params)
    (losses, grads), _ = jax.lax.scan(add, zeros, (micro, jnp.arange(accumulate)))
    return losses, grads


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    key: Array,
    accumulate: int = 1,
    learning_rates: Callable[[Array], Metrics] = lambda step: {},
):
    """The function (state, batch) -> (state, metrics), to be jitted with the state donated.

    Args:
      key: of the run; noise comes from it, the step number and the image's identity.
      learning_rates: step -> what is reported of the optimizer.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        counts = loss.counts(batch)
        losses, grads = gradients(loss, state, batch, counts, jax.random.fold_in(key, state.step), accumulate)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss.weighted_sum(losses),
            "reconstruction_loss": losses.reconstruction,
            "gradient_norm": optax.tree.norm(grads),
            "images": counts.images,
            "tokens": jnp.sum(batch["segments"] != 0),
            **learning_rates(state.step),
        }
        if losses.sources is not None:
            metrics["sources"] = losses.sources
        if loss.text_weight:
            metrics |= {"text_loss": losses.text, "supervised_tokens": counts.tokens}
        return TrainState(state.step + 1, params, opt_state, state.frozen), metrics

    return train_step


def make_state(params: Tree, frozen: Tree, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), frozen)


def compile_step(train_step: Any, state_shardings: TrainState, batch_sharding: NamedSharding):
    """Jits the step: state donated and kept where it is, metrics on every device."""
    return jax.jit(
        train_step,
        in_shardings=(state_shardings, batch_sharding),
        out_shardings=(state_shardings, None),
        donate_argnums=0,
        compiler_options=compiler_options(batch_sharding.mesh.devices.flat[0]),
    )
