"""Tiny autoencoder: diffusers' `AutoencoderTiny`, the family of TAESD (4 channels), TAESD3 and TAEF1 (16 channels).

A tiny autoencoder is distilled from a KL autoencoder and shares its latent space. It consists of plain convolutions,
without norms, attention or randomness. Encoder and decoder see images in [0, 1].
"""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ross_jax.config import Finite, Layers, Positive, Size
from ross_jax.models.autoencoder import Autoencoder, Posterior

CLAMP = 3.0
"""Bound of latents: the decoder maps them smoothly into (-3, 3). A constant of the architecture, which config.json does
not change."""
NO_VARIANCE = -1000.0
"""Log-variance of a posterior without variance. The deviation is 0 in float32, so every sample is the mean. The value
is finite, so that sums over it are not NaN."""


@dataclasses.dataclass(frozen=True)
class TinyAutoencoderConfig:
    """Sizes of a tiny autoencoder.

    Attributes:
      encoder_channels, decoder_channels: channels, the same at every resolution level.
      encoder_blocks, decoder_blocks: number of residual blocks of each level. Finest level first for the encoder,
        coarsest first for the decoder.
      latent_channels: channels of a latent.
      scaling_factor, shift_factor: the denoiser sees latents as `(sample - shift_factor) * scaling_factor`. Published
        tiny autoencoders encode to that scale already.
    """

    encoder_channels: Size
    decoder_channels: Size
    encoder_blocks: tuple[Layers, ...]
    decoder_blocks: tuple[Layers, ...]
    latent_channels: Size
    scaling_factor: Positive = 1.0
    shift_factor: Finite = 0.0
    kind: Literal["tiny"] = "tiny"

    def __post_init__(self):
        encoder, decoder = len(self.encoder_blocks), len(self.decoder_blocks)
        if not encoder or encoder != decoder:
            raise ValueError(f"encoder_blocks has {encoder} levels, decoder_blocks {decoder}; must be equal, not 0")

    @property
    def downsampling(self) -> int:
        """Pixels per latent, along a side of the image."""
        return 2 ** (len(self.encoder_blocks) - 1)


def _conv(features: int, dtype: DTypeLike, name: str, stride: int = 1, bias: bool = True) -> nn.Conv:
    # Explicit padding, because "SAME" pads a strided convolution only at the end.
    return nn.Conv(features, (3, 3), stride, padding=1, use_bias=bias, dtype=dtype, name=name)


class TinyBlock(nn.Module):
    """Three convolutions with a skip connection; ReLU between the convolutions and after the sum."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]):
        features = x.shape[-1]
        y = nn.relu(_conv(features, self.dtype, "conv1")(x))
        y = nn.relu(_conv(features, self.dtype, "conv2")(y))
        return nn.relu(x + _conv(features, self.dtype, "conv3")(y))


class TinyEncoder(nn.Module):
    """Maps images in [0, 1] to latents."""

    config: TinyAutoencoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width 3"]):
        cfg = self.config
        x = _conv(cfg.encoder_channels, self.dtype, "conv_in")(x)
        for i, blocks in enumerate(cfg.encoder_blocks):
            if i > 0:
                x = _conv(cfg.encoder_channels, self.dtype, f"downsample_{i}", stride=2, bias=False)(x)
            for j in range(blocks):
                x = TinyBlock(self.dtype, name=f"block_{i}_{j}")(x)
        return _conv(cfg.latent_channels, self.dtype, "conv_out")(x)


class TinyDecoder(nn.Module):
    """Maps bounded latents to images in [0, 1]."""

    config: TinyAutoencoderConfig
    dtype: DTypeLike
    remat: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "batch rows columns latent"]):
        cfg = self.config
        x = nn.relu(_conv(cfg.decoder_channels, self.dtype, "conv_in")(x))
        block = nn.remat(TinyBlock) if self.remat else TinyBlock
        for i, blocks in enumerate(cfg.decoder_blocks):
            if i > 0:
                x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
                x = _conv(cfg.decoder_channels, self.dtype, f"upsample_{i}", bias=False)(x)
            for j in range(blocks):
                x = block(self.dtype, name=f"block_{i}_{j}")(x)
        return _conv(3, self.dtype, "conv_out")(x)


class TinyAutoencoder(Autoencoder):
    """Maps images in [-1, 1] to latents and back, without randomness."""

    config: TinyAutoencoderConfig

    def setup(self):
        self.encoder = TinyEncoder(self.config, self.dtype)
        self.decoder = TinyDecoder(self.config, self.dtype, self.remat)

    def encode(self, images: Float[Array, "batch height width 3"]) -> Posterior:
        """The latents as a posterior without variance, float32: every sample is the mean.

        Raises:
          ValueError: the images' sides are not multiples of the downsampling.
        """
        self.check_sides(images)
        unit = (images.astype(jnp.float32) + 1.0) / 2.0
        mean = self.encoder(unit.astype(self.dtype)).astype(jnp.float32)
        return Posterior(mean, jnp.full_like(mean, NO_VARIANCE))

    def decode(self, latents: Float[Array, "batch rows columns latent"]) -> Float[Array, "batch height width 3"]:
        """The image of raw latents (see `denormalise`), float32; not clipped to [-1, 1]."""
        bounded = CLAMP * jnp.tanh(latents.astype(jnp.float32) / CLAMP)
        return 2.0 * self.decoder(bounded.astype(self.dtype)).astype(jnp.float32) - 1.0
