"""The training step: both losses, gradients of what trains, one optimizer update. Compiled once."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from ross_jax.models.layers import RematPolicy
from ross_jax.models.ross import Ross, RossConfig, normalise
from ross_jax.objectives.reconstruction import ReconstructionConfig, make_objective
from ross_jax.objectives.text import IGNORE, gather_supervised, next_token_loss
from ross_jax.sharding import constrain
from ross_jax.training.optimizer import OptimizerConfig, schedule
from ross_jax.training.state import TrainState, Tree
from ross_jax.tree import merge

Batch = dict[str, Array]
Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """How a step computes.

    Attributes:
      accumulate: micro-batches per step; rows of a batch must be a multiple of it.
      dtype: of activations in encoder and language model; the denoiser's are float32.
      text_chunk: positions whose logits would take the memory that logits take, on each device (see `next_token_loss`);
        with as many as a device has, logits are kept for the backward pass.
    """

    accumulate: int = 1
    dtype: str = "bfloat16"
    remat: RematPolicy = "full"
    text_chunk: int = 1024


def counts(batch: Batch, compat: str) -> tuple[Array, Array, Array]:
    """Supervised tokens, pictures, and what the reconstruction loss is divided by: of the whole batch."""
    tokens = jnp.sum(batch["targets"] != IGNORE)
    images = jnp.sum(real_images(batch))
    if compat == "default":
        return tokens, images, jnp.maximum(images, 1.0)
    # Of the reference: every row is an item, and the mean is scaled by m / (m + 1e-6), m = 4 x pictures.
    return tokens, images, batch["image_start"].size * (4 * images + 1e-6) / jnp.maximum(4 * images, 1e-30)


def real_images(batch: Batch) -> Float[Array, "batch images"]:
    """1 where a slot holds a picture."""
    return (batch["image_start"] < batch["tokens"].shape[1]).astype(jnp.float32)


def make_train_step(
    config: RossConfig,
    step_config: StepConfig,
    reconstruction: ReconstructionConfig,
    optimizer: optax.GradientTransformation,
    optimizer_config: OptimizerConfig,
    steps: int,
    key: Array,
    text_weight: float = 1.0,
    supervised: int | None = None,
):
    """The function (state, batch) -> (state, metrics), to be jitted with the state donated.

    Args:
      optimizer_config, steps: only to report learning rates.
      key: of the run; noise comes from it, the step number and the picture's identity.
      text_weight: of the text loss in the sum. 0: there is none; no logits are computed, and nothing is reported of it.
      supervised: most supervised positions of a row, if the packing plan has such a limit: no logits beyond it.
    """
    dtype = jnp.dtype(step_config.dtype)
    model = Ross(config, dtype, step_config.remat)
    objective = make_objective(config, reconstruction, dtype)

    def losses(params: Tree, frozen: Tree, batch: Batch, totals, step_key: Array):
        """Sums of one micro-batch, each divided by the count of the whole batch."""
        tree = merge(params, frozen)
        variables = {"params": tree}
        images = normalise(config, batch["images"], jnp.float32) if "images" in batch else None
        text = (batch[name] for name in ("tokens", "positions", "segments"))
        output = model.apply(variables, *text, images, batch["image_start"], features=batch.get("image_features"))
        text_loss = jnp.zeros(())
        if text_weight:
            hidden, labels = constrain(output.hidden, "batch"), batch["targets"]
            with jax.named_scope("text_loss"):
                if supervised is not None:
                    hidden, labels = gather_supervised(hidden, labels, supervised)
                head = model.apply(variables, method="head_kernel")
                total, _ = next_token_loss(hidden, labels, head, dtype, step_config.text_chunk)
            text_loss = total / jnp.maximum(totals[0], 1)
        if objective is None:
            return text_weight * text_loss, (text_loss, jnp.zeros(()))
        weights = real_images(batch) if reconstruction.compat == "default" else jnp.ones(batch["image_ids"].shape)
        targets = objective.unpack(frozen, batch)
        if targets is None:
            with jax.named_scope("targets"):
                images = images.reshape(-1, *images.shape[2:])
                targets = objective.targets(frozen, images, weights.reshape(-1) != 0)
        keys = jax.vmap(lambda i: jax.random.fold_in(step_key, i))(batch["image_ids"].reshape(-1))
        keys = keys.reshape(batch["image_ids"].shape)
        with jax.named_scope("reconstruction"):
            items = objective.loss(tree, frozen, output.visual_outputs, targets, keys)
        reconstruction_loss = jnp.sum(items * weights) / totals[2]
        loss = text_weight * text_loss + reconstruction.weight * reconstruction_loss
        return loss, (text_loss, reconstruction_loss)

    def gradients(state: TrainState, batch: Batch, totals, step_key: Array):
        function = jax.value_and_grad(losses, has_aux=True)
        parts = step_config.accumulate
        if parts == 1:
            (_, values), grads = function(state.params, state.frozen, batch, totals, step_key)
            return values, grads
        # Micro-batch m takes every parts-th row, so that each device keeps its own rows.
        micro = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
        micro = jax.tree.map(lambda x: constrain(x, None, "batch"), micro)

        def add(carry, part: Batch):
            (_, values), grads = function(state.params, state.frozen, part, totals, step_key)
            return jax.tree.map(jnp.add, carry, (values, grads)), None

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        (values, grads), _ = jax.lax.scan(add, ((jnp.zeros(()), jnp.zeros(())), zeros), micro)
        return values, grads

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        step_key = jax.random.fold_in(key, state.step)
        totals = counts(batch, reconstruction.compat)
        (text_loss, reconstruction_loss), grads = gradients(state, batch, totals, step_key)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": text_weight * text_loss + reconstruction.weight * reconstruction_loss,
            "reconstruction_loss": reconstruction_loss,
            "gradient_norm": optax.tree.norm(grads),
            "images": totals[1],
            "tokens": jnp.sum(batch["segments"] != 0),
            **{
                f"learning_rate/{name}": schedule(peak, steps, optimizer_config.warmup_ratio)(state.step)
                for name, peak in optimizer_config.rates().items()
            },
        }
        if text_weight:
            metrics |= {"text_loss": text_loss, "supervised_tokens": totals[0]}
        return TrainState(state.step + 1, params, opt_state, state.frozen), metrics

    return train_step


def make_state(params: Tree, frozen: Tree, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), frozen)


def compiler_options(device: jax.Device) -> dict[str, int | float] | None:
    """XLA's for the step on such devices.

    Weights are gathered whole before they are multiplied: where tensor splits what is left of them, XLA otherwise
    gathers them in pieces, and a step of Qwen2-7B takes twice as long by its own estimate. Of the kernels for a product
    or convolution, a smaller one is taken if it is nearly as fast as the fastest: the step is as fast by XLA's
    estimate, and compiles in little more than half of the time on v5e, three quarters on v6e. On v4 and v7x they may be
    slower still: 5.5 and 0.2 % of the step for a fifth and a tenth of the compiler's memory, on v4 to stay below 4 GB.
    """
    if device.platform != "tpu":
        return None
    return {
        "xla_jf_spmd_threshold_for_windowed_einsum_mib": 2**20,
        "xla_jf_convolution_performance_target": {"TPU v4": 0.96, "TPU7x": 0.98}.get(device.device_kind, 0.985),
    }


def compile_step(train_step: Any, state_shardings: TrainState, batch_sharding: NamedSharding):
    """Jits the step: state donated and kept where it is, metrics on every device."""
    return jax.jit(
        train_step,
        in_shardings=(state_shardings, batch_sharding),
        out_shardings=(state_shardings, None),
        donate_argnums=0,
        compiler_options=compiler_options(batch_sharding.mesh.devices.flat[0]),
    )
