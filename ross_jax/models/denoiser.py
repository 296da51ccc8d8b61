"""The denoiser of Ross (paper section 4, Ross^D): a small DiT over latent tokens, conditioned on the visual outputs.

adaLN-Zero is applied per token: a token's condition is its own visual output plus the timestep embedding, so shift,
scale and gate differ from token to token.
"""

import dataclasses
from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ross_jax.config import Layers, Range, Size
from ross_jax.models.attention import attention
from ross_jax.models.layers import SAVED_ATTENTION, Dense, Mlp, RematPolicy, fusion_barrier, layer_norm, stack
from ross_jax.sharding import constrain

TIMESTEP_FEATURES = 256
"""Width of the sinusoidal timestep embedding."""
CONDITION_EPS = 1e-5
"""Epsilon of the affine-free LayerNorm on the visual outputs."""
NORM_EPS = 1e-6
NUM_HEADS = 16
"""Number of attention heads of every published size."""


def default_width(depth: int) -> int:
    """Width of the reference's `denoiser_vit{depth}x`: 1280 at depth 8, 1536 at depth 12, else 1024."""
    return {8: 1280, 12: 1536}.get(depth, 1024)


Prediction = Literal["epsilon", "v", "x0"]
Schedule = Literal["cosine", "linear", "scaled_linear", "sigmoid"]
Block = Literal["adaln", "mlp", "vit"]


@dataclasses.dataclass(frozen=True)
class DenoiserConfig:
    """Sizes of a denoiser.

    Attributes:
      condition_size: width of the visual outputs.
      latent_size: channels of a latent token.
      grid: latent tokens per side.
      width: channels of a token inside the denoiser.
      depth: number of blocks.
      mlp_ratio: width of the MLPs' hidden layer, in multiples of `width`.
      prediction: what the output means; the reference predicts the noise, `epsilon`.
      schedule: noise schedule that the denoiser is trained for.
      block: type of the blocks.
        adaln  attention and MLP with modulation, as in the reference
        mlp    MLP with modulation, without attention (the paper's ablation)
        vit    plain transformer blocks, with the condition added to the first block's input (the paper's ablation)
    """

    condition_size: Size
    latent_size: Size
    grid: Size
    width: Size
    depth: Layers = 3
    num_heads: Size = NUM_HEADS
    mlp_ratio: Annotated[float, Range(1e-6, 1e6)] = 4.0
    prediction: Prediction = "epsilon"
    schedule: Schedule = "cosine"
    block: Block = "adaln"

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        if self.width % 4:
            raise ValueError(f"width {self.width} is not a multiple of 4, which the position table needs")

    def build(self, dtype: DTypeLike = jnp.float32, remat: RematPolicy = "none") -> "Denoiser":
        """The module of this config. A subclass outside the package, see `config.extends`, has its own."""
        return Denoiser(self, dtype, remat)

    @property
    def num_tokens(self) -> int:
        """Latent tokens per image."""
        return self.grid**2


def timestep_embedding(timesteps: Int[Array, " batch"], size: int) -> Float[Array, "batch size"]:
    """Sinusoids of the timestep, cosines first; an odd `size` is padded with a zero."""
    half = size // 2
    # Rounded at the same steps as in torch: an error in a frequency's last bit shifts the angle of t = 999 by 6e-5
    # radians.
    exponents = np.float32(-np.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    freqs = np.exp(exponents, dtype=np.float64).astype(np.float32)
    angles = timesteps[:, None].astype(jnp.float32) * freqs
    features = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return jnp.pad(features, ((0, 0), (0, size % 2)))


def position_table(width: int, grid: int) -> np.ndarray:
    """Fixed 2-D sin-cos table `[grid^2, width]`, float64. The first half of the channels encodes the column, the second
    half the row."""

    def encode(index: np.ndarray) -> np.ndarray:
        freqs = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width // 4))
        angles = index.reshape(-1, 1) * freqs
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    rows, columns = np.meshgrid(np.arange(grid), np.arange(grid), indexing="ij")
    return np.concatenate([encode(columns), encode(rows)], axis=1)


def normalise_condition(visual_outputs: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
    """The reference's `ln_pre`: LayerNorm without affine, float32. Zeros stay zeros."""
    return layer_norm(CONDITION_EPS, jnp.float32, affine=False).apply({}, visual_outputs.astype(jnp.float32))


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """Shifts and scales normalised tokens, as adaLN does."""
    return x * (1 + scale) + shift


class SelfAttention(nn.Module):
    """Bidirectional attention with one joint query-key-value projection, as in timm."""

    num_heads: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        width = x.shape[-1]
        init = nn.initializers.xavier_uniform()
        qkv = Dense(3 * width, dtype=self.dtype, kernel_init=init, outputs=3, name="qkv")(x)
        y = attention(*(part.reshape(*x.shape[:-1], self.num_heads, width // self.num_heads) for part in qkv))
        return Dense(width, dtype=self.dtype, kernel_init=init, name="out")(
            checkpoint_name(y.reshape(x.shape), SAVED_ATTENTION)
        )


class DenoiserBlock(nn.Module):
    """A block of type `DenoiserConfig.block`. Gates start at zero, so blocks with modulation start as the identity."""

    config: DenoiserConfig
    dtype: DTypeLike
    collect: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"], condition: Float[Array, "batch tokens width"]):
        """Runs the block. `condition` must have passed through its SiLU already."""
        cfg = self.config
        x = constrain(x, "images")
        xavier = nn.initializers.xavier_uniform()
        attention = SelfAttention(cfg.num_heads, self.dtype, name="attention")
        mlp = Mlp(int(cfg.width * cfg.mlp_ratio), "gelu_tanh", self.dtype, kernel_init=xavier, name="mlp")
        if cfg.block == "vit":
            attended = attention(layer_norm(NORM_EPS, self.dtype, name="norm1")(x))
            x = x + attended
            x = x + mlp(layer_norm(NORM_EPS, self.dtype, name="norm2")(x))
            return x, ((attended, x) if self.collect else None)
        branches = 1 if cfg.block == "mlp" else 2
        modulation = Dense(
            3 * branches * cfg.width, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="modulation"
        )(condition)
        *first, shift, scale, gate = jnp.split(modulation, 3 * branches, axis=-1)
        norm = layer_norm(NORM_EPS, self.dtype, affine=False)
        attended = None
        if first:
            attended = attention(fusion_barrier(modulate(norm(x), first[0], first[1])))
            attended = checkpoint_name(attended, SAVED_ATTENTION)
            x = x + first[2] * attended
        y = fusion_barrier(mlp(fusion_barrier(modulate(norm(x), shift, scale))))
        x = x + gate * checkpoint_name(y, SAVED_ATTENTION)
        return x, ((attended, x) if self.collect else None)


class Denoiser(nn.Module):
    """Predicts the noise in latent tokens, or what `DenoiserConfig.prediction` names.

    An image's condition is projected once (`embed_condition`) and used for every noise level drawn for the image.
    """

    config: DenoiserConfig
    dtype: DTypeLike = jnp.float32
    remat: RematPolicy = "none"

    def input_spec(self, batch: int = 1) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of the arguments of `__call__`."""
        cfg = self.config
        return (
            jax.ShapeDtypeStruct((batch, cfg.num_tokens, cfg.latent_size), jnp.float32),
            jax.ShapeDtypeStruct((batch,), jnp.int32),
            jax.ShapeDtypeStruct((batch, cfg.num_tokens, cfg.condition_size), jnp.float32),
        )

    def setup(self):
        cfg = self.config
        xavier, zeros = nn.initializers.xavier_uniform(), nn.initializers.zeros
        normal = nn.initializers.normal(0.02)

        def dense(features: int, init) -> Dense:
            return Dense(features, dtype=self.dtype, kernel_init=init)

        table = position_table(cfg.width, cfg.grid)
        self.position_embedding = self.param("position_embedding", lambda _: jnp.asarray(table, jnp.float32))
        self.latent_embedding = dense(cfg.width, xavier)
        self.condition_embedding = dense(cfg.width, xavier)
        self.timestep_in, self.timestep_out = dense(cfg.width, normal), dense(cfg.width, normal)
        self.final = dense(cfg.latent_size, zeros)
        if cfg.block == "vit":
            self.final_norm = layer_norm(NORM_EPS, self.dtype)
        else:
            self.final_modulation = dense(2 * cfg.width, zeros)

    def embed_condition(self, context: Float[Array, "batch tokens embed"]) -> Float[Array, "batch tokens width"]:
        """Projects normalised visual outputs (see `normalise_condition`)."""
        return self.condition_embedding(nn.silu(context.astype(self.dtype)))

    def __call__(
        self,
        noised: Float[Array, "batch tokens latent"],
        timesteps: Int[Array, " batch"],
        context: Float[Array, "batch tokens embed"],
        internals: bool = False,
    ):
        """Predicts noise from noised latents and normalised visual outputs. See `denoise`."""
        return self.denoise(noised, timesteps, self.embed_condition(context), internals)

    @nn.compact
    def denoise(
        self,
        noised: Float[Array, "batch tokens latent"],
        timesteps: Int[Array, " batch"],
        condition: Float[Array, "batch tokens width"],
        internals: bool = False,
    ):
        """Predicts noise.

        Args:
          noised: latent tokens, row by row.
          timesteps: one per image, in the 1000-step training process.
          condition: output of `embed_condition`.
          internals: also return the outputs of inner layers.

        Returns:
          Predicted noise, shaped as `noised`. With `internals`: a pair of the predicted noise and a dictionary of the
          inner layers' outputs.
        """
        cfg = self.config
        embedded = self.latent_embedding(noised.astype(self.dtype))
        features = timestep_embedding(timesteps, TIMESTEP_FEATURES).astype(self.dtype)
        time = self.timestep_out(nn.silu(self.timestep_in(features)))
        per_token = time[:, None] + condition
        x = embedded + self.position_embedding.astype(self.dtype)
        if cfg.block == "vit":
            x = x + per_token
        blocks = stack(DenoiserBlock, cfg.depth, self.remat, constant=1)
        x, outputs = blocks(cfg, self.dtype, internals, name="blocks")(x, fusion_barrier(nn.silu(per_token)))
        if cfg.block == "vit":
            x = self.final(self.final_norm(x))
        else:
            shift, scale = jnp.split(self.final_modulation(nn.silu(per_token)), 2, axis=-1)
            x = self.final(modulate(layer_norm(NORM_EPS, self.dtype, affine=False)(x), shift, scale))
        if not internals:
            return x
        return x, {
            "latent_embedding": embedded,
            "timestep_embedding": time,
            "condition_embedding": condition,
            "attention": outputs[0],
            "blocks": outputs[1],
        }
