"""`AutoencoderTiny` of diffusers: config.json and keys."""

from collections.abc import Mapping
from typing import Any

from ross_jax.convert.mapping import Row, Table, conv
from ross_jax.convert.settings import Settings
from ross_jax.models.tiny_autoencoder import TinyAutoencoderConfig

_MAX_LEVELS = 10
"""Every level but the last halves the image."""
_MAX_BLOCKS = 16
_FIXED = {"act_fn": "relu", "in_channels": 3, "out_channels": 3, "upsample_fn": "nearest"}
_FIXED |= {"upsampling_scaling_factor": 2}
_READ = {"num_encoder_blocks", "num_decoder_blocks", "encoder_block_out_channels", "decoder_block_out_channels"}
_READ |= {"latent_channels", "scaling_factor", "shift_factor"}
_UNUSED = {"latent_magnitude", "latent_shift", "force_upcast", "block_out_channels"}
"""Fields that neither encoding nor decoding reads.

`latent_magnitude` and `latent_shift` scale latents for display, `force_upcast` chooses a dtype for pipelines, and
`block_out_channels` repeats `encoder_block_out_channels`.
"""


def tiny_autoencoder_config(settings: Mapping[str, Any], where: str) -> TinyAutoencoderConfig:
    """Reads the config.json of an AutoencoderTiny. Missing fields get the defaults of diffusers.

    Args:
      settings: the parsed file.
      where: name of the file, for messages.

    Raises:
      ConfigError: names every field that is malformed, not supported or unknown to diffusers.
    """
    read = Settings(settings, where)
    for name, value in _FIXED.items():
        read.only(name, value)
    for name in sorted(settings.keys() - _READ - _FIXED.keys() - _UNUSED):
        if not name.startswith("_"):
            read.only(name)
    encoder_channels, encoder_blocks = _half(read, "encoder", [1, 3, 3, 3])
    decoder_channels, decoder_blocks = _half(read, "decoder", [3, 3, 3, 1])
    fields = {
        "encoder_channels": encoder_channels,
        "decoder_channels": decoder_channels,
        "encoder_blocks": encoder_blocks,
        "decoder_blocks": decoder_blocks,
        "latent_channels": read.size("latent_channels", 4),
        "scaling_factor": read.number("scaling_factor", 1.0),
        "shift_factor": read.number("shift_factor", 0.0, positive=False),
    }
    return read.build(TinyAutoencoderConfig, **fields)


def tiny_autoencoder_settings(config: TinyAutoencoderConfig) -> dict[str, Any]:
    """config.json of an AutoencoderTiny. The inverse of `tiny_autoencoder_config`."""
    return {
        "_class_name": "AutoencoderTiny",
        **_FIXED,
        "encoder_block_out_channels": [config.encoder_channels] * len(config.encoder_blocks),
        "decoder_block_out_channels": [config.decoder_channels] * len(config.decoder_blocks),
        "num_encoder_blocks": list(config.encoder_blocks),
        "num_decoder_blocks": list(config.decoder_blocks),
        "latent_channels": config.latent_channels,
        "latent_magnitude": 3,
        "latent_shift": 0.5,
        "scaling_factor": config.scaling_factor,
        "shift_factor": config.shift_factor,
    }


def _half(read: Settings, half: str, default: list[int]) -> tuple[int, tuple[int, ...]]:
    """Width of the encoder or decoder, the same at all levels, and number of blocks per level."""
    widths, numbers = f"{half}_block_out_channels", f"num_{half}_blocks"
    channels, blocks = read.sizes(widths, [64] * 4, _MAX_LEVELS), read.sizes(numbers, default, _MAX_LEVELS)
    if len(set(channels)) > 1:
        read.refuse(widths, "the same number for every level")
    if len(channels) != len(blocks):
        read.refuse(numbers, f"one number for each of the {len(channels)} levels of {widths}")
    if max(blocks) > _MAX_BLOCKS:
        read.refuse(numbers, f"at most {_MAX_BLOCKS} blocks per level")
    return channels[0], blocks


def _rows(half: str, layers: list[str | None]) -> list[Row]:
    """Rows of a torch Sequential. None stands for a layer without parameters."""
    rows: list[Row] = []
    for i, name in enumerate(layers):
        hf_key, path = f"{half}.layers.{i}", f"{half}/{name}"
        if name is None:
            continue
        if name.startswith("block"):
            for j in range(3):
                rows += conv(f"{hf_key}.conv.{2 * j}", f"{path}/conv{j + 1}")
        else:
            rows += conv(hf_key, path, bias="sample" not in name)
    return rows


def table(config: TinyAutoencoderConfig) -> Table:
    """Table of diffusers' AutoencoderTiny, which numbers all layers of encoder and decoder, activations included."""
    encoder: list[str | None] = ["conv_in"]
    decoder: list[str | None] = ["conv_in", None]
    for i, blocks in enumerate(config.encoder_blocks):
        encoder += [f"downsample_{i}"] if i else []
        encoder += [f"block_{i}_{j}" for j in range(blocks)]
    for i, blocks in enumerate(config.decoder_blocks):
        decoder += [None, f"upsample_{i}"] if i else []
        decoder += [f"block_{i}_{j}" for j in range(blocks)]
    return Table(tuple(_rows("encoder", [*encoder, "conv_out"]) + _rows("decoder", [*decoder, "conv_out"])))
