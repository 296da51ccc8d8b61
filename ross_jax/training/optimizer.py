"""AdamW with a learning rate per group of parameters, warmup and cosine decay."""

import dataclasses
import math
import re
from typing import Any

import jax
import optax

from ross_jax.tree import flatten, unflatten


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, as the reference sets it.

    Attributes:
      learning_rate: peak, of every parameter that no group names.
      groups: (pattern of paths, peak learning rate); the first match counts.
      warmup_ratio: share of the run in which the rate rises from 0.
      weight_decay: of matrices; vectors (norms, biases) are never decayed.
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

    def __post_init__(self):
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio {self.warmup_ratio} must be in [0, 1)")

    def rates(self) -> dict[str, float]:
        """Peak learning rate of each group, by its pattern; `rest` for all others."""
        return {"rest": self.learning_rate, **dict(self.groups)}

    def group(self, path: str) -> str:
        """The group of a parameter."""
        return next((pattern for pattern, _ in self.groups if re.fullmatch(pattern, path)), "rest")


def schedule(peak: float, steps: int, warmup_ratio: float) -> optax.Schedule:
    """Linear warmup from 0, then half a cosine to 0 at `steps`; as transformers' cosine schedule."""
    warmup = math.ceil(steps * warmup_ratio)

    def rate(step):
        rising = step / max(1, warmup)
        progress = (step - warmup) / max(1, steps - warmup)
        falling = 0.5 * (1.0 + jax.numpy.cos(math.pi * jax.numpy.clip(progress, 0.0, 1.0)))
        return peak * jax.numpy.where(step < warmup, rising, falling)

    return rate


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer for a run of `steps` steps."""

    def adamw(peak: float) -> optax.GradientTransformation:
        def decayed(params: Any) -> Any:
            return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

        rate = schedule(peak, steps, config.warmup_ratio)
        return optax.adamw(rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=decayed)

    def labels(params: Any) -> Any:
        return unflatten({path: config.group(path) for path in flatten(params)})

    groups = {name: adamw(peak) for name, peak in config.rates().items()}
    return optax.chain(optax.clip_by_global_norm(config.max_gradient_norm), optax.multi_transform(groups, labels))
