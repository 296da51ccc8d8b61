"""AdamW with a learning rate per group of parameters, warmup and cosine decay."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import optax
import optax.contrib

from ross_jax.tree import flatten, unflatten

_ADAM_RMS = 0.2
"""Root mean square that AdamW's updates have, in units of the learning rate, as Moonlight (arXiv 2502.16982) found."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, as the reference sets it, or Muon.

    Attributes:
      algorithm: `adamw`; or `muon` for matrices, whose updates are scaled to the size of AdamW's, so that rates keep
        their meaning, with AdamW for all else (embeddings, norms, biases).
      learning_rate: peak, of every parameter that no group names.
      groups: (pattern of paths, peak learning rate); the first match counts.
      warmup_ratio: share of the run in which the rate rises from 0.
      weight_decay: of matrices and embeddings, not of norms and biases; with Muon of its matrices alone.
      max_gradient_norm: gradients are scaled down to it; over all groups together.
    """

    learning_rate: float
    groups: tuple[tuple[str, float], ...] = ()
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    max_gradient_norm: float = 1.0
    algorithm: Literal["adamw", "muon"] = "adamw"

    def __post_init__(self):
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio {self.warmup_ratio} must be in [0, 1)")

    def rates(self) -> dict[str, float]:
        """Peak learning rate of each group, by its pattern; `rest` for all others."""
        return {"rest": self.learning_rate, **dict(self.groups)}

    def group(self, path: str) -> str:
        """The group of a parameter."""
        return next((pattern for pattern, _ in self.groups if re.fullmatch(pattern, path)), "rest")


def warmup_steps(steps: int, warmup_ratio: float) -> int:
    """Steps in which the rate rises."""
    return math.ceil(steps * warmup_ratio)


def schedule(peak: float, steps: int, warmup_ratio: float) -> optax.Schedule:
    """Linear warmup from 0, then half a cosine to 0 at `steps`; as transformers' cosine schedule."""
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
    return path[-1].key == "kernel"


def _decayed(params: Any) -> Any:
    """Stacked norms and biases have two dimensions as well, so names decide."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("scale", "bias"), params)


def _matrices(params: Any) -> Any:
    """Which axes of a kernel are a matrix's rows and columns; stacked layers are matrices of their own."""

    def dimensions(path: tuple[Any, ...], leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        if not _is_kernel(path):
            return None
        stacked = any(key.key in ("layers", "blocks") for key in path)
        return optax.contrib.MuonDimensionNumbers(tuple(range(int(stacked), leaf.ndim - 1)), leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(dimensions, params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer for a run of `steps` steps."""

    def of_group(peak: float) -> optax.GradientTransformation:
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

    groups = {name: of_group(peak) for name, peak in config.rates().items()}
    return optax.chain(optax.clip_by_global_norm(config.max_gradient_norm), optax.multi_transform(groups, labels))
