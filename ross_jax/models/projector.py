"""The projector from vision features to language embeddings: LLaVA's `linear`, `mlpNx_gelu` and `identity`."""

import dataclasses
from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ross_jax.config import Range, Size
from ross_jax.models.layers import Dense, activate


@dataclasses.dataclass(frozen=True)
class ProjectorConfig:
    """Sizes of a projector.

    Attributes:
      kind: `mlp` (linear layers with exact GELU between) or `identity`.
      depth: number of linear layers; 1 is LLaVA's `linear`.
    """

    kind: Literal["mlp", "identity"]
    in_size: Size
    out_size: Size
    depth: Annotated[int, Range(0, 1000)] = 2

    def __post_init__(self):
        if self.kind == "mlp" and self.depth < 1:
            raise ValueError(f"depth {self.depth} must be at least 1")
        if self.kind == "identity" and self.in_size != self.out_size:
            raise ValueError(f"an identity cannot map {self.in_size} features to {self.out_size}")


class Projector(nn.Module):
    """Maps each vision feature to a language embedding, independently of other features."""

    config: ProjectorConfig
    dtype: DTypeLike = jnp.float32
    dropout: float = 0.0

    def input_spec(self, batch: int = 1, tokens: int = 1) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of the arguments of `__call__`."""
        return (jax.ShapeDtypeStruct((batch, tokens, self.config.in_size), jnp.float32),)

    @nn.compact
    def __call__(self, features: Float[Array, "... vision"]) -> Float[Array, "... embed"]:
        """Projects `[..., in_size]` to `[..., out_size]`."""
        if self.config.kind == "identity":
            return features.astype(self.dtype)
        x = features
        for i in range(self.config.depth):
            x = activate("gelu", x) if i else x
            x = Dense(self.config.out_size, dtype=self.dtype, dropout=self.dropout, name=f"linear_{i}")(x)
        return x
