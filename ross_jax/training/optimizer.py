"""AdamW or Muon with a learning rate per group of parameters, warmup and cosine decay."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import optax
import optax.contrib

from ross_jax import lora
from ross_jax.config import Decay, Factor, Positive, Share, check_patterns
from ross_jax.tree import flatten, unflatten

_ADAM_RMS = 0.2
"""Root mean square of AdamW's updates in units of the learning rate, by Moonlight (arXiv 2502.16982)."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, with the reference's defaults, or Muon.

    Attributes:
      learning_rate: peak learning rate of parameters that no group matches.
      groups: (pattern of paths, peak learning rate). The first pattern that matches a path counts.
      warmup_ratio: share of the run in which the learning rate rises from 0.
      weight_decay: of matrices and embeddings, not of norms and biases. With Muon, only of the matrices it updates.
      max_gradient_norm: gradients with a larger norm, over all groups together, are scaled down to it.
      algorithm: `adamw`; or `muon` for matrices and AdamW for everything else (embeddings, norms, biases). Updates by
        Muon are scaled to the size of AdamW's, so that learning rates keep their meaning.
    """

    learning_rate: Factor
    groups: tuple[tuple[str, Factor], ...] = ()
    warmup_ratio: Share = 0.03
    weight_decay: Factor = 0.0
    b1: Decay = 0.9
    b2: Decay = 0.999
    eps: Share = 1e-8
    max_gradient_norm: Positive = 1.0
    algorithm: Literal["adamw", "muon"] = "adamw"

    def __post_init__(self):
        check_patterns("groups", [pattern for pattern, _ in self.groups])
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio {self.warmup_ratio} must be in [0, 1)")

    def rates(self) -> dict[str, float]:
        """Pattern of each group -> its peak learning rate; `rest` -> that of all other parameters."""
        return {"rest": self.learning_rate, **dict(self.groups)}

    def group(self, path: str) -> str:
        """The pattern of the parameter's group, or `rest`."""
        return next((pattern for pattern, _ in self.groups if re.fullmatch(pattern, path)), "rest")


def warmup_steps(steps: int, warmup_ratio: float) -> int:
    """Number of steps in which the learning rate rises."""
    return math.ceil(steps * warmup_ratio)


def schedule(peak: float, steps: int, warmup_ratio: float) -> optax.Schedule:
    """Learning rate by step: linear warmup from 0, then half a cosine to 0 at `steps`, as in transformers."""
    warmup = warmup_steps(steps, warmup_ratio)

    def rate(step):
        rising = step / max(1, warmup)
        progress = (step - warmup) / max(1, steps - warmup)
        falling = 0.5 * (1.0 + jax.numpy.cos(math.pi * jax.numpy.clip(progress, 0.0, 1.0)))
        return peak * jax.numpy.where(step < warmup, rising, falling)

    return rate


def learning_rates(config: OptimizerConfig, steps: int) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """Step -> the learning rate of each group, under the names of metrics."""
    schedules = {name: schedule(peak, steps, config.warmup_ratio) for name, peak in config.rates().items()}
    return lambda step: {f"learning_rate/{name}": rate(step) for name, rate in schedules.items()}


def _is_kernel(path: tuple[Any, ...]) -> bool:
    return path[-1].key in ("kernel", lora.A, lora.B)


def _decayed(params: Any) -> Any:
    """True where weight decay applies. Names decide, because stacked norms and biases have two dimensions, too."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("scale", "bias"), params)


def _matrices(params: Any) -> Any:
    """Axes that are rows and columns of each kernel and factor, layer by layer where layers are stacked."""

    def dimensions(path: tuple[Any, ...], leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        if not _is_kernel(path):
            return None
        stacked = any(key.key in ("layers", "blocks") for key in path)
        return optax.contrib.MuonDimensionNumbers(tuple(range(int(stacked), leaf.ndim - 1)), leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(dimensions, params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer for a run of `steps` steps."""

    def make_group(peak: float) -> optax.GradientTransformation:
        rate = schedule(peak, steps, config.warmup_ratio)
        if config.algorithm == "adamw":
            return optax.adamw(rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=_decayed)
        return optax.contrib.muon(
            rate,
            eps=config.eps,
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=_ADAM_RMS,
        )

    def labels(params: Any) -> Any:
        return unflatten({path: config.group(path) for path in flatten(params)})

    groups = {name: make_group(peak) for name, peak in config.rates().items()}
    return optax.chain(optax.clip_by_global_norm(config.max_gradient_norm), optax.multi_transform(groups, labels))
