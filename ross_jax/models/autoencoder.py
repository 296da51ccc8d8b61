"""KL autoencoder: diffusers' `AutoencoderKL`, in the FLUX layout (16 channels, no quant convs) and the LDM / SD ones.

Images and latents are channels-last. GroupNorm statistics are float32 whatever the compute dtype.
"""

import dataclasses
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ross_jax.config import Finite, Layers, Positive, Size
from ross_jax.models.attention import attention

NORM_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of a KL autoencoder.

    Attributes:
      channels: channels of each resolution level, finest first.
      layers_per_block: residual blocks of each level in the encoder; the decoder's levels have one more.
      latent_channels: channels of a latent.
      norm_groups: groups of every group normalisation.
      scaling_factor, shift_factor: the denoiser sees latents as `(sample - shift_factor) * scaling_factor`.
      down_attention, up_attention: whether the blocks of each level are followed by attention (LDM KL-16: at the
        coarsest level). Finest level first for the encoder, coarsest first for the decoder, as in diffusers' lists of
        block types.
      mid_attention: whether the middle block has attention.
      quant_conv, post_quant_conv: whether a 1 x 1 convolution follows the encoder, or precedes the decoder.
    """

    channels: tuple[Size, ...]
    layers_per_block: Layers
    latent_channels: Size
    norm_groups: Size
    scaling_factor: Positive
    shift_factor: Finite
    down_attention: tuple[bool, ...]
    up_attention: tuple[bool, ...]
    mid_attention: bool = True
    quant_conv: bool = False
    post_quant_conv: bool = False
    kind: Literal["kl"] = "kl"

    def __post_init__(self):
        for name in ("down_attention", "up_attention"):
            if len(getattr(self, name)) != len(self.channels):
                raise ValueError(f"{name} must have one value per level ({len(self.channels)}) of channels")
        for channels in self.channels:
            if channels % self.norm_groups:
                raise ValueError(f"{channels} channels do not divide into {self.norm_groups} groups")

    @property
    def downsampling(self) -> int:
        """Pixels per latent, along a side of the image."""
        return 2 ** (len(self.channels) - 1)


class Posterior(NamedTuple):
    """A diagonal Gaussian over latents."""

    mean: Float[Array, "batch rows columns latent"]
    logvar: Float[Array, "batch rows columns latent"]

    def sample(self, noise: Float[Array, "batch rows columns latent"]) -> Float[Array, "batch rows columns latent"]:
        """The sample `mean + deviation * noise`, for standard normal `noise`."""
        return self.mean + jnp.exp(0.5 * self.logvar) * noise


class GroupNorm(nn.Module):
    """Group normalisation with float32 statistics.

    Flax's GroupNorm loses three digits on images of one colour, such as the dummy image of a text-only row, whose
    deviations are tiny beside the mean. The corrected two-pass algorithm (Chan et al., 1983) used here also removes the
    mean's rounding error.
    """

    groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        y = y - self._mean(y)
        error = self._mean(y)
        variance = self._mean(jnp.square(y)) - jnp.square(error)
        y = (y - error) * (jax.lax.rsqrt(variance + NORM_EPS) * scale) + bias
        return y.astype(self.dtype)

    def _mean(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch 1 1 channels"]:
        """Mean of each channel's group, repeated for every channel of the group.

        The channels of the means are grouped, not those of the images, whose reshape would be slow on TPUs.
        """
        batch, _, _, channels = x.shape
        means = jnp.mean(x, axis=(1, 2)).reshape(batch, self.groups, channels // self.groups)
        means = jnp.broadcast_to(means.mean(axis=-1, keepdims=True), means.shape)
        return means.reshape(batch, 1, 1, channels)


def _norm(config: AutoencoderConfig, dtype: DTypeLike, name: str) -> GroupNorm:
    return GroupNorm(config.norm_groups, dtype, name=name)


def _conv(features: int, size: int, dtype: DTypeLike, name: str) -> nn.Conv:
    return nn.Conv(features, (size, size), padding="SAME", dtype=dtype, name=name)


class ResnetBlock(nn.Module):
    """Two normalised convolutions with a skip connection."""

    config: AutoencoderConfig
    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]):
        y = _conv(self.features, 3, self.dtype, "conv1")(nn.silu(_norm(self.config, self.dtype, "norm1")(x)))
        y = _conv(self.features, 3, self.dtype, "conv2")(nn.silu(_norm(self.config, self.dtype, "norm2")(y)))
        if x.shape[-1] != self.features:
            x = _conv(self.features, 1, self.dtype, "shortcut")(x)
        # The sum is float32: a sum in half precision crashes XLA's compiler for TPU v7x. Other devices lose no speed.
        wide = jnp.promote_types(self.dtype, jnp.float32)
        return (x.astype(wide) + y.astype(wide)).astype(self.dtype)


class AttentionBlock(nn.Module):
    """Single-head attention over all pixels of the feature map, with a skip connection."""

    config: AutoencoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]):
        batch, height, width, channels = x.shape
        y = _norm(self.config, self.dtype, "norm")(x).reshape(batch, height * width, channels)
        query, key, value = (nn.Dense(channels, dtype=self.dtype, name=n)(y) for n in ("query", "key", "value"))
        y = attention(query[:, :, None], key[:, :, None], value[:, :, None])[:, :, 0]
        return x + nn.Dense(channels, dtype=self.dtype, name="out")(y).reshape(x.shape)


def _blocks(remat: bool) -> tuple[type[nn.Module], type[nn.Module]]:
    """Classes of residual and attention blocks. With `remat`, a backward pass keeps only the inputs of each block."""
    return (nn.remat(ResnetBlock), nn.remat(AttentionBlock)) if remat else (ResnetBlock, AttentionBlock)


class Level(nn.Module):
    """The blocks of one resolution: residual blocks, each followed by attention if `attends`."""

    config: AutoencoderConfig
    features: int
    layers: int
    attends: bool
    dtype: DTypeLike
    remat: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]):
        resnet, attention_block = _blocks(self.remat)
        for i in range(self.layers):
            x = resnet(self.config, self.features, self.dtype, name=f"resnet_{i}")(x)
            if self.attends:
                x = attention_block(self.config, self.dtype, name=f"attention_{i}")(x)
        return x


class MidBlock(nn.Module):
    """A residual, an attention and a residual block, at the coarsest resolution."""

    config: AutoencoderConfig
    dtype: DTypeLike
    remat: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]):
        resnet, attention_block = _blocks(self.remat)
        x = resnet(self.config, x.shape[-1], self.dtype, name="resnet_0")(x)
        if self.config.mid_attention:
            x = attention_block(self.config, self.dtype, name="attention_0")(x)
        return resnet(self.config, x.shape[-1], self.dtype, name="resnet_1")(x)


class Encoder(nn.Module):
    """Maps images to the posterior's parameters: mean and log-variance, side by side in the channels."""

    config: AutoencoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width 3"]):
        cfg = self.config
        x = _conv(cfg.channels[0], 3, self.dtype, "conv_in")(x)
        for i, features in enumerate(cfg.channels):
            level = Level(cfg, features, cfg.layers_per_block, cfg.down_attention[i], self.dtype, name=f"down_{i}")
            x = level(x)
            if i < len(cfg.channels) - 1:
                down = nn.Conv(features, (3, 3), 2, padding=((0, 1), (0, 1)), dtype=self.dtype, name=f"downsample_{i}")
                x = down(x)
        x = MidBlock(cfg, self.dtype, name="mid")(x)
        x = nn.silu(_norm(cfg, self.dtype, "norm_out")(x))
        return _conv(2 * cfg.latent_channels, 3, self.dtype, "conv_out")(x)


class Decoder(nn.Module):
    """Maps latents to images."""

    config: AutoencoderConfig
    dtype: DTypeLike
    remat: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "batch rows columns latent"]):
        cfg = self.config
        x = _conv(cfg.channels[-1], 3, self.dtype, "conv_in")(x)
        x = MidBlock(cfg, self.dtype, self.remat, name="mid")(x)
        for i, features in enumerate(reversed(cfg.channels)):
            layers, attends = cfg.layers_per_block + 1, cfg.up_attention[i]
            x = Level(cfg, features, layers, attends, self.dtype, self.remat, name=f"up_{i}")(x)
            if i < len(cfg.channels) - 1:
                x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
                x = _conv(features, 3, self.dtype, f"upsample_{i}")(x)
        x = nn.silu(_norm(cfg, self.dtype, "norm_out")(x))
        return _conv(3, 3, self.dtype, "conv_out")(x)


class Autoencoder(nn.Module):
    """Maps images in [-1, 1] to latents and back.

    Attributes:
      remat: the backward pass through the decoder keeps only the inputs of the decoder's blocks.
    """

    config: AutoencoderConfig
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    def input_spec(self, batch: int = 1, size: int | None = None) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of the arguments of `__call__`."""
        size = size or 2 * self.config.downsampling
        return (jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32),)

    def setup(self):
        cfg = self.config
        self.encoder, self.decoder = Encoder(cfg, self.dtype), Decoder(cfg, self.dtype, self.remat)
        if cfg.quant_conv:
            self.quant_conv = nn.Conv(2 * cfg.latent_channels, (1, 1), dtype=self.dtype)
        if cfg.post_quant_conv:
            self.post_quant_conv = nn.Conv(cfg.latent_channels, (1, 1), dtype=self.dtype)

    def encode(self, images: Float[Array, "batch height width 3"]) -> Posterior:
        """The posterior over latents, float32; log-variance clipped to [-30, 20].

        Raises:
          ValueError: the images' sides are not multiples of the downsampling.
        """
        self.check_sides(images)
        moments = self.encoder(images.astype(self.dtype))
        if self.config.quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return Posterior(mean, jnp.clip(logvar, -30.0, 20.0))

    def check_sides(self, images: Float[Array, "batch height width 3"]) -> None:
        """Raises `ValueError` if the images' sides are not multiples of the downsampling."""
        if images.shape[1] % self.config.downsampling or images.shape[2] % self.config.downsampling:
            raise ValueError(f"sides of {images.shape} must be multiples of {self.config.downsampling}")

    def decode(self, latents: Float[Array, "batch rows columns latent"]) -> Float[Array, "batch height width 3"]:
        """The image of raw latents (see `denormalise`), float32."""
        latents = latents.astype(self.dtype)
        if self.config.post_quant_conv:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents).astype(jnp.float32)

    def normalise(self, latents: Float[Array, "..."]) -> Float[Array, "..."]:
        """Raw latents, scaled as the denoiser sees them."""
        return (latents - self.config.shift_factor) * self.config.scaling_factor

    def denormalise(self, latents: Float[Array, "..."]) -> Float[Array, "..."]:
        """Raw latents from scaled ones: the inverse of `normalise`."""
        return latents / self.config.scaling_factor + self.config.shift_factor

    def __call__(self, images: Float[Array, "batch height width 3"]) -> Float[Array, "batch height width 3"]:
        """Reconstructs images from the posterior's mean."""
        return self.decode(self.encode(images).mean)
