"""Autoencoders of diffusers: config.json and keys of `AutoencoderKL`. `AutoencoderTiny` has a file of its own."""

from collections.abc import Mapping
from typing import Any

from ross_jax.convert import tiny_autoencoder
from ross_jax.convert.mapping import LINEAR, Row, Table, conv, norm
from ross_jax.convert.settings import Settings
from ross_jax.models.autoencoder import AutoencoderConfig
from ross_jax.models.tiny_autoencoder import TinyAutoencoderConfig

_DOWN = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
_UP = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}
_MAX_LEVELS = 10
"""Every level but the last halves the image."""


def autoencoder_config(settings: Mapping[str, Any], where: str) -> AutoencoderConfig | TinyAutoencoderConfig:
    """Reads the config.json of an AutoencoderKL or AutoencoderTiny. Missing fields get the defaults of diffusers.

    Args:
      settings: the parsed file.
      where: name of the file, for messages.

    Raises:
      ConfigError: names every field that is malformed or not supported.
    """
    if settings.get("_class_name") == "AutoencoderTiny":
        return tiny_autoencoder.tiny_autoencoder_config(settings, where)
    read = Settings(settings, where)
    if settings.get("_class_name") != "AutoencoderKL":
        read.refuse("_class_name", "'AutoencoderKL' or 'AutoencoderTiny'")
    for name, value in {"act_fn": "silu", "in_channels": 3, "out_channels": 3}.items():
        read.only(name, value)
    for name in ("latents_mean", "latents_std"):
        read.only(name)
    down = read.texts("down_block_types", ["DownEncoderBlock2D"], _MAX_LEVELS)
    up = read.texts("up_block_types", ["UpDecoderBlock2D"], _MAX_LEVELS)
    for name, types, known in (("down_block_types", down, _DOWN), ("up_block_types", up, _UP)):
        if not set(types) <= set(known):
            read.refuse(name, " or ".join(known))
    fields = {
        "channels": read.sizes("block_out_channels", [64], _MAX_LEVELS),
        "layers_per_block": read.size("layers_per_block", 1, most=16),
        "latent_channels": read.size("latent_channels", 4),
        "norm_groups": read.size("norm_num_groups", 32),
        "scaling_factor": read.number("scaling_factor", 0.18215),
        "shift_factor": read.number("shift_factor", 0.0, positive=False),
        "down_attention": [_DOWN.get(name) for name in down],
        "up_attention": [_UP.get(name) for name in up],
        "mid_attention": read.flag("mid_block_add_attention", True),
        "quant_conv": read.flag("use_quant_conv", True),
        "post_quant_conv": read.flag("use_post_quant_conv", True),
    }
    return read.build(AutoencoderConfig, **fields)


def autoencoder_settings(config: AutoencoderConfig | TinyAutoencoderConfig) -> dict[str, Any]:
    """config.json of an autoencoder. The inverse of `autoencoder_config`."""
    if config.kind == "tiny":
        return tiny_autoencoder.tiny_autoencoder_settings(config)
    down, up = ({attends: name for name, attends in types.items()} for types in (_DOWN, _UP))
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": list(config.channels),
        "layers_per_block": config.layers_per_block,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_groups,
        "scaling_factor": config.scaling_factor,
        "shift_factor": config.shift_factor,
        "down_block_types": [down[attends] for attends in config.down_attention],
        "up_block_types": [up[attends] for attends in config.up_attention],
        "mid_block_add_attention": config.mid_attention,
        "use_quant_conv": config.quant_conv,
        "use_post_quant_conv": config.post_quant_conv,
    }


def _resnet(hf_key: str, path: str, shortcut: bool) -> tuple[Row, ...]:
    rows = norm(f"{hf_key}.norm1", f"{path}/norm1") + conv(f"{hf_key}.conv1", f"{path}/conv1")
    rows += norm(f"{hf_key}.norm2", f"{path}/norm2") + conv(f"{hf_key}.conv2", f"{path}/conv2")
    return rows + (conv(f"{hf_key}.conv_shortcut", f"{path}/shortcut") if shortcut else ())


def _attention(hf_key: str, path: str) -> tuple[Row, ...]:
    rows = list(norm(f"{hf_key}.group_norm", f"{path}/norm"))
    names = {
        "query": ("to_q", "query"),
        "key": ("to_k", "key"),
        "value": ("to_v", "value"),
        "out": ("to_out.0", "proj_attn"),
    }
    for name, (key, old) in names.items():
        # The published autoencoders of Stable Diffusion have the names of diffusers before 0.15.
        rows.append(Row(f"{hf_key}.{key}.weight", f"{path}/{name}/kernel", LINEAR, f"{hf_key}.{old}.weight"))
        rows.append(Row(f"{hf_key}.{key}.bias", f"{path}/{name}/bias", alias=f"{hf_key}.{old}.bias"))
    return tuple(rows)


def _half(half: str, channels: list[int], layers: int, attends: tuple[bool, ...], mid: bool) -> list[Row]:
    """Rows of the encoder or decoder.

    Args:
      half: "encoder" or "decoder".
      channels: channels of each level, in the order of computation.
      layers: residual blocks per level.
      attends: whether each level has attention.
      mid: whether the middle block has attention.
    """
    level, sample = ("up", "upsample") if half == "decoder" else ("down", "downsample")
    rows = [*conv(f"{half}.conv_in", f"{half}/conv_in")]
    entering = channels[0]
    for i, features in enumerate(channels):
        for j in range(layers):
            block = f"{half}.{level}_blocks.{i}"
            rows += _resnet(f"{block}.resnets.{j}", f"{half}/{level}_{i}/resnet_{j}", entering != features)
            if attends[i]:
                rows += _attention(f"{block}.attentions.{j}", f"{half}/{level}_{i}/attention_{j}")
            entering = features
        if i < len(channels) - 1:
            rows += conv(f"{block}.{sample}rs.0.conv", f"{half}/{sample}_{i}")
    for j in range(2):
        rows += _resnet(f"{half}.mid_block.resnets.{j}", f"{half}/mid/resnet_{j}", False)
    if mid:
        rows += _attention(f"{half}.mid_block.attentions.0", f"{half}/mid/attention_0")
    rows += norm(f"{half}.conv_norm_out", f"{half}/norm_out")
    return [*rows, *conv(f"{half}.conv_out", f"{half}/conv_out")]


def table(config: AutoencoderConfig | TinyAutoencoderConfig) -> Table:
    """Table of diffusers' AutoencoderKL or AutoencoderTiny."""
    if config.kind == "tiny":
        return tiny_autoencoder.table(config)
    channels, layers = list(config.channels), config.layers_per_block
    rows = _half("encoder", channels, layers, config.down_attention, config.mid_attention)
    rows += _half("decoder", channels[::-1], layers + 1, config.up_attention, config.mid_attention)
    if config.quant_conv:
        rows += conv("quant_conv", "quant_conv")
    if config.post_quant_conv:
        rows += conv("post_quant_conv", "post_quant_conv")
    return Table(tuple(rows))
