"""Vision encoders: SigLIP, CLIP and DINOv2, one ViT with three configs.

Matches transformers' `SiglipVisionModel`, `CLIPVisionModel` and `Dinov2Model` (`Dinov2WithRegistersModel`) up to the
selected hidden layer. The parameter tree has only what is computed: no layers above the selected one, no final norm
unless `final_norm` is set, no pooling head, and no mask token of DINOv2. Images are always resized to `image_size`, so
position tables are never interpolated.
"""

import dataclasses
from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ross_jax.config import Layers, Positive, Range, Size
from ross_jax.models.attention import attention
from ross_jax.models.layers import SAVED_ATTENTION, SAVED_GATE, Activation, Dense, Mlp, RematPolicy, layer_norm, stack
from ross_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of a vision encoder.

    Attributes:
      kind: `siglip` (biased patch embedding), `clip` (class token, pre-layernorm) or `dinov2` (class token, biased
        patch embedding, layer scale).
      num_layers: number of layers of the published model.
      select_layer: number of the hidden state that becomes the features, counted as in transformers' `hidden_states`:
        0 is the embedding, -1 the last layer's output.
      final_norm: whether the model's last layernorm is applied to the selected hidden state. For the last layer, the
        result is transformers' `last_hidden_state`. Not for CLIP, which normalises only the class token's output.
      registers: number of DINOv2's register tokens, which follow the class token.
      swiglu: whether MLPs are gated, as in DINOv2's giant model.
    """

    kind: Literal["siglip", "clip", "dinov2"]
    image_size: Size
    patch_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_layers: Layers
    num_heads: Size
    activation: Activation
    norm_eps: Positive
    select_layer: Annotated[int, Range(-1000, 1000)] = -2
    final_norm: bool = False
    registers: Annotated[int, Range(0, 1024)] = 0
    swiglu: bool = False

    def __post_init__(self):
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.image_size < self.patch_size:
            raise ValueError(f"image_size {self.image_size} is smaller than patch_size {self.patch_size}")
        if not -self.num_layers - 1 <= self.select_layer <= self.num_layers:
            raise ValueError(f"select_layer {self.select_layer} does not exist in {self.num_layers} layers")
        if self.kind == "clip" and self.final_norm:
            raise ValueError("final_norm: clip has no norm of its patch features")
        if self.kind != "dinov2" and (self.registers or self.swiglu):
            raise ValueError(
                f"registers {self.registers} and swiglu {self.swiglu} are dinov2's; {self.kind} has neither"
            )

    def build(self, dtype: DTypeLike = jnp.float32, remat: RematPolicy = "none") -> nn.Module:
        """The module of this config. A subclass outside the package, see `config.extends`, has its own."""
        return VisionEncoder(self, dtype, remat)

    @property
    def grid(self) -> int:
        """Patches per side. A remainder of the image is not seen, as in 384 = 27 * 14 + 6."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Features per image (N), without class and register tokens."""
        return self.grid**2

    @property
    def extra_tokens(self) -> int:
        """Number of tokens before the patch tokens: class and register tokens."""
        return 0 if self.kind == "siglip" else 1 + self.registers

    @property
    def layers_used(self) -> int:
        """Number of layers that run, and that the parameter tree has."""
        return self.select_layer if self.select_layer >= 0 else self.num_layers + 1 + self.select_layer


class VisionBlock(nn.Module):
    """Pre-norm transformer block."""

    config: VisionConfig
    dtype: DTypeLike
    collect: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens embed"]):
        cfg = self.config
        x = constrain(x, "images")
        y = layer_norm(cfg.norm_eps, self.dtype, name="norm1")(x)
        x = x + self._scaled(VisionAttention(cfg.num_heads, self.dtype, name="attention")(y), "scale1")
        y = layer_norm(cfg.norm_eps, self.dtype, name="norm2")(x)
        if cfg.swiglu:
            y = SwiGlu(cfg.intermediate_size, self.dtype, name="mlp")(y)
        else:
            y = Mlp(cfg.intermediate_size, cfg.activation, self.dtype, name="mlp")(y)
        x = x + self._scaled(y, "scale2")
        return x, (x if self.collect else None)

    def _scaled(self, x: Float[Array, "batch tokens embed"], name: str) -> Float[Array, "batch tokens embed"]:
        """`x` times a learned factor per channel (layer scale) for DINOv2, else `x`."""
        if self.config.kind != "dinov2":
            return x
        return x * self.param(name, nn.initializers.ones, (x.shape[-1],)).astype(self.dtype)


class VisionAttention(nn.Module):
    """Bidirectional multi-head attention with biases."""

    num_heads: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens embed"]) -> Float[Array, "batch tokens embed"]:
        width = x.shape[-1]
        split = (*x.shape[:-1], self.num_heads, width // self.num_heads)
        query, key, value = (
            checkpoint_name(Dense(width, dtype=self.dtype, name=name)(x), SAVED_ATTENTION).reshape(split)
            for name in ("query", "key", "value")
        )
        y = checkpoint_name(attention(query, key, value), SAVED_ATTENTION)
        return Dense(width, dtype=self.dtype, name="out")(y.reshape(x.shape))


class SwiGlu(nn.Module):
    """Gated MLP with biases. Gate and input projections are one matrix, as DINOv2 stores them."""

    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens embed"]) -> Float[Array, "batch tokens embed"]:
        both = checkpoint_name(nn.DenseGeneral((2, self.features), dtype=self.dtype, name="gate_up")(x), SAVED_GATE)
        y = nn.silu(both[..., 0, :]) * both[..., 1, :]
        return Dense(x.shape[-1], dtype=self.dtype, name="down")(y)


class VisionEncoder(nn.Module):
    """Maps normalised images to patch features."""

    config: VisionConfig
    dtype: DTypeLike = jnp.float32
    remat: RematPolicy = "none"

    def input_spec(self, batch: int = 1) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of the arguments of `__call__`."""
        size = self.config.image_size
        return (jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32),)

    @nn.compact
    def __call__(self, images: Float[Array, "batch height width 3"], hidden_states: bool = False):
        """Encodes images.

        Args:
          images: normalised with the encoder's mean and std, `image_size` pixels square.
          hidden_states: also return every hidden state.

        Returns:
          Features `[batch, num_tokens, hidden_size]` of the selected layer, without class and register tokens. With
          `hidden_states`: a pair of the features and all hidden states
          `[layers_used + 1, batch, extra_tokens + num_tokens, hidden_size]`, before the final norm.

        Raises:
          ValueError: the images have another size.
        """
        cfg = self.config
        if images.shape[1:3] != (cfg.image_size, cfg.image_size):
            raise ValueError(f"expected images of {cfg.image_size} pixels square, found {images.shape}")
        patches = nn.Conv(
            cfg.hidden_size,
            (cfg.patch_size, cfg.patch_size),
            strides=cfg.patch_size,
            padding="VALID",
            use_bias=cfg.kind != "clip",
            dtype=self.dtype,
            name="patch_embedding",
        )(images)
        x = patches.reshape(images.shape[0], cfg.num_tokens, cfg.hidden_size)
        init = nn.initializers.normal(0.02)
        if cfg.kind != "siglip":
            cls = self.param("class_embedding", init, (cfg.hidden_size,)).astype(self.dtype)
            x = jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], 1, cfg.hidden_size)), x], axis=1)
        x = x + self.param("position_embedding", init, (x.shape[1], cfg.hidden_size)).astype(self.dtype)
        if cfg.registers:  # after the position embedding, because registers have no position
            registers = self.param("registers", init, (cfg.registers, cfg.hidden_size)).astype(self.dtype)
            registers = jnp.broadcast_to(registers, (x.shape[0], *registers.shape))
            x = jnp.concatenate([x[:, :1], registers, x[:, 1:]], axis=1)
        if cfg.kind == "clip":
            x = layer_norm(cfg.norm_eps, self.dtype, name="pre_norm")(x)
        states = x[None]
        if cfg.layers_used:
            layers = stack(VisionBlock, cfg.layers_used, self.remat)
            x, outputs = layers(cfg, self.dtype, hidden_states, name="layers")(x)
            states = jnp.concatenate([states, outputs]) if hidden_states else None
        features = x[:, cfg.extra_tokens :]
        if cfg.final_norm:
            features = layer_norm(cfg.norm_eps, self.dtype, name="final_norm")(features)
        return (features, states) if hidden_states else features
