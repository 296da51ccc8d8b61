"""diffusers' autoencoders: config and keys. `AutoencoderKL` is here, `AutoencoderTiny` in its own file."""

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
"""Each halves the picture."""


def autoencoder_config(settings: Mapping[str, Any], where: str) -> AutoencoderConfig | TinyAutoencoderConfig:
    """Reads the config.json of an AutoencoderKL or AutoencoderTiny; diffusers' defaults fill what it leaves out.

    Raises:
      ConfigError: what is malformed or not computed by us, by name.
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


def _resnet(theirs: str, ours: str, shortcut: bool) -> tuple[Row, ...]:
    rows = norm(f"{theirs}.norm1", f"{ours}/norm1") + conv(f"{theirs}.conv1", f"{ours}/conv1")
    rows += norm(f"{theirs}.norm2", f"{ours}/norm2") + conv(f"{theirs}.conv2", f"{ours}/conv2")
    return rows + (conv(f"{theirs}.conv_shortcut", f"{ours}/shortcut") if shortcut else ())


def _attention(theirs: str, ours: str) -> tuple[Row, ...]:
    rows = list(norm(f"{theirs}.group_norm", f"{ours}/norm"))
    names = {
        "query": ("to_q", "query"),
        "key": ("to_k", "key"),
        "value": ("to_v", "value"),
        "out": ("to_out.0", "proj_attn"),
    }
    for name, (key, old) in names.items():
        # diffusers before 0.15 named them otherwise; Stable Diffusion's published autoencoders still do.
        rows.append(Row(f"{theirs}.{key}.weight", f"{ours}/{name}/kernel", LINEAR, f"{theirs}.{old}.weight"))
        rows.append(Row(f"{theirs}.{key}.bias", f"{ours}/{name}/bias", alias=f"{theirs}.{old}.bias"))
    return tuple(rows)


def _half(theirs: str, channels: list[int], first: int, layers: int, attends: tuple[bool, ...], up: bool, mid: bool):
    """Rows of the encoder or decoder; `first` = channels that enter the first level."""
    level, sample = ("up", "upsample") if up else ("down", "downsample")
    rows = [*conv(f"{theirs}.conv_in", f"{theirs}/conv_in")]
    entering = first
    for i, features in enumerate(channels):
        for j in range(layers):
            block = f"{theirs}.{level}_blocks.{i}"
            rows += _resnet(f"{block}.resnets.{j}", f"{theirs}/{level}_{i}/resnet_{j}", entering != features)
            if attends[i]:
                rows += _attention(f"{block}.attentions.{j}", f"{theirs}/{level}_{i}/attention_{j}")
            entering = features
        if i < len(channels) - 1:
            rows += conv(f"{block}.{sample}rs.0.conv", f"{theirs}/{sample}_{i}")
    for j in range(2):
        rows += _resnet(f"{theirs}.mid_block.resnets.{j}", f"{theirs}/mid/resnet_{j}", False)
    if mid:
        rows += _attention(f"{theirs}.mid_block.attentions.0", f"{theirs}/mid/attention_0")
    rows += norm(f"{theirs}.conv_norm_out", f"{theirs}/norm_out")
    return [*rows, *conv(f"{theirs}.conv_out", f"{theirs}/conv_out")]


def table(config: AutoencoderConfig | TinyAutoencoderConfig) -> Table:
    """Keys of diffusers' AutoencoderKL or AutoencoderTiny."""
    if config.kind == "tiny":
        return tiny_autoencoder.table(config)
    channels, layers = list(config.channels), config.layers_per_block
    mid = config.mid_attention
    rows = _half("encoder", channels, channels[0], layers, config.down_attention, False, mid)
    rows += _half("decoder", channels[::-1], channels[-1], layers + 1, config.up_attention, True, mid)
    if config.quant_conv:
        rows += conv("quant_conv", "quant_conv")
    if config.post_quant_conv:
        rows += conv("post_quant_conv", "post_quant_conv")
    return Table(tuple(rows))
