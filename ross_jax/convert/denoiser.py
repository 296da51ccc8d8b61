"""Denoiser of the reference (`mm_inv_projector.net`): sizes and keys."""

import math
import re
from collections.abc import Mapping

from ross_jax.config import ConfigError, from_dict
from ross_jax.convert.mapping import BATCHED, POINTWISE, Row, Table, dense
from ross_jax.models.denoiser import NUM_HEADS, DenoiserConfig


def read_denoiser_config(
    shapes: Mapping[str, tuple[int, ...]], kind: str | None = None, num_heads: int = NUM_HEADS
) -> DenoiserConfig:
    """Reads the sizes from the shapes of the tensors.

    Args:
      shapes: key below `net.` -> shape.
      kind: `mm_inv_projector_type` of the config, `denoiser_vitNx` with N blocks. None if there is no config.
      num_heads: number of attention heads, which no shape tells.

    Raises:
      ConfigError: another kind, another number of blocks, or tensors that do not tell the sizes.
    """
    needed = {
        "x_embedder.proj.weight": 4,
        "z_embedder.1.weight": 2,
        "pos_embed": 3,
        "blocks.0.mlp.fc1.weight": 2,
    }
    wrong = [
        f"{key} {list(shapes[key]) if key in shapes else 'missing'}"
        for key in needed
        if len(shapes.get(key, ())) != needed[key] or 0 in shapes[key]
    ]
    if wrong:
        raise ConfigError(f"mm_inv_projector: cannot read the denoiser's sizes off {', '.join(wrong)}")
    blocks = [re.match(r"blocks\.([0-9]{1,3})\.", key) for key in shapes]
    depth = 1 + max(int(block[1]) for block in blocks if block)
    named = re.fullmatch(r"denoiser_vit([0-9]+)x", kind or f"denoiser_vit{depth}x")
    if not named:
        raise ConfigError(f"mm_inv_projector_type {kind!r} is not supported; expected denoiser_vitNx")
    if named[1] != str(depth):
        raise ConfigError(f"mm_inv_projector_type {kind!r} has {named[1]} blocks, the checkpoint {depth}")
    width, latent_size = shapes["x_embedder.proj.weight"][:2]
    tokens, table_width = shapes["pos_embed"][1:]
    if math.isqrt(tokens) ** 2 != tokens or table_width != width:
        expected = f"[1, a square number, {width}]"
        raise ConfigError(f"mm_inv_projector: pos_embed has shape {list(shapes['pos_embed'])}, expected {expected}")
    fields = {
        "condition_size": shapes["z_embedder.1.weight"][1],
        "latent_size": latent_size,
        "grid": math.isqrt(tokens),
        "width": width,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_ratio": shapes["blocks.0.mlp.fc1.weight"][0] / width,
    }
    return from_dict(DenoiserConfig, fields, "mm_inv_projector")


def table(config: DenoiserConfig) -> Table:
    """Table of the keys below `mm_inv_projector.net.`."""
    del config  # all sizes have the same keys
    block = "blocks.{}"
    return Table(
        (
            Row("pos_embed", "position_embedding", BATCHED),
            Row("x_embedder.proj.weight", "latent_embedding/kernel", POINTWISE),
            Row("x_embedder.proj.bias", "latent_embedding/bias"),
            *dense("z_embedder.1", "condition_embedding"),
            *dense("t_embedder.mlp.0", "timestep_in"),
            *dense("t_embedder.mlp.2", "timestep_out"),
            *dense(f"{block}.adaLN_modulation.1", "blocks/modulation"),
            *dense(f"{block}.attn.qkv", "blocks/attention/qkv"),
            *dense(f"{block}.attn.proj", "blocks/attention/out"),
            *dense(f"{block}.mlp.fc1", "blocks/mlp/up"),
            *dense(f"{block}.mlp.fc2", "blocks/mlp/down"),
            *dense("final_layer.adaLN_modulation.1", "final_modulation"),
            *dense("final_layer.linear", "final"),
        )
    )
