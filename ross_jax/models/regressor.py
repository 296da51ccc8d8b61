"""The regressor of Ross^R: an MLP from visual outputs to targets, token by token (paper section 3)."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ross_jax.config import Layers, Size
from ross_jax.models.layers import Dense, activate


@dataclasses.dataclass(frozen=True)
class RegressorConfig:
    """Sizes of a regressor.

    Attributes:
      target: name of the targets that are predicted for each image token: `pixels`, `latents` (of the autoencoder),
        `features` (of a teacher), or another. Each objective checks that the regressor predicts the right targets.
      condition_size: width of the visual outputs.
      out_size: values per token.
      width: units of each hidden layer.
      depth: number of linear layers; 1 is a linear map.
    """

    target: str
    condition_size: Size
    out_size: Size
    width: Size
    depth: Layers = 2

    def __post_init__(self):
        if self.depth < 1:
            raise ValueError(f"depth {self.depth} must be at least 1")


class Regressor(nn.Module):
    """Linear layers with exact GELU between."""

    config: RegressorConfig
    dtype: DTypeLike = jnp.float32

    def input_spec(self, batch: int = 1, tokens: int = 1) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of the arguments of `__call__`."""
        return (jax.ShapeDtypeStruct((batch, tokens, self.config.condition_size), jnp.float32),)

    @nn.compact
    def __call__(self, context: Float[Array, "batch tokens embed"]) -> Float[Array, "batch tokens target"]:
        """Predicts targets from normalised visual outputs (see `normalise_condition`)."""
        cfg = self.config
        x = context
        for i in range(cfg.depth - 1):
            x = activate("gelu", Dense(cfg.width, dtype=self.dtype, name=f"linear_{i}")(x))
        return Dense(cfg.out_size, dtype=self.dtype, name=f"linear_{cfg.depth - 1}")(x)
