"""SigLIP and CLIP: configs and keys of transformers."""

import re
from collections.abc import Mapping
from typing import Any

from ross_jax.convert.mapping import CONV, Row, Table, dense, norm
from ross_jax.convert.settings import MAX_LAYERS, Settings
from ross_jax.models.vision import VisionConfig

PREFIXES = ("vision_model.", "")
"""transformers 5 writes vision-only checkpoints without the prefix."""
ANCHOR = "embeddings.position_embedding.weight"
"""A key that every vision tower has, below its prefix."""
NORMALISATION = {
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
"""Mean and standard deviation of the pictures that the published models were trained on."""
_MODEL_TYPES = {
    "siglip_vision_model": "siglip",
    "clip_vision_model": "clip",
    "siglip": "siglip",
    "clip": "clip",
}
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_new": "gelu_tanh"}


def model_types() -> list[str]:
    """`model_type` of the configs that `vision_config` reads."""
    return list(_MODEL_TYPES)


def vision_config(settings: Mapping[str, Any], where: str) -> VisionConfig:
    """Reads a SigLIP/CLIP config.json, of the whole model or of its vision tower.

    Args:
      settings: the parsed file; transformers' defaults, the base model's sizes, fill what it leaves out.
      where: its name, for messages.

    Returns:
      A config that selects the last layer but one, as the reference always does for SigLIP.

    Raises:
      ConfigError: what is malformed or not computed by us, by name.
    """
    kind = _MODEL_TYPES[settings["model_type"]]
    read = Settings(settings, where)
    if settings["model_type"] in ("siglip", "clip"):
        read = read.inner("vision_config")
    hidden = read.size("hidden_size", 768)
    activation = read.text("hidden_act", "gelu_pytorch_tanh" if kind == "siglip" else "quick_gelu")
    if activation not in _ACTIVATIONS:
        read.refuse("hidden_act", f"one of {', '.join(_ACTIVATIONS)}")
    read.only("num_channels", 3)
    fields = {
        "kind": kind,
        "image_size": read.size("image_size", 224, most=2**14),
        "patch_size": read.size("patch_size", 16 if kind == "siglip" else 32),
        "hidden_size": hidden,
        "intermediate_size": read.size("intermediate_size", 3072),
        "num_layers": read.size("num_hidden_layers", 12, most=MAX_LAYERS),
        # No tensor tells the number of heads, so another width's is not guessed.
        "num_heads": read.size("num_attention_heads", 12 if hidden == 768 else None),
        "activation": _ACTIVATIONS.get(activation),
        "norm_eps": read.number("layer_norm_eps", 1e-6 if kind == "siglip" else 1e-5),
    }
    return read.build(VisionConfig, **fields)


def table(config: VisionConfig) -> Table:
    """Keys below the tower's prefix."""
    layer, clip = "encoder.layers.{}", config.kind == "clip"
    rows = [
        Row("embeddings.patch_embedding.weight", "patch_embedding/kernel", CONV),
        Row("embeddings.position_embedding.weight", "position_embedding"),
    ]
    if clip:
        rows.append(Row("embeddings.class_embedding", "class_embedding"))
        rows += norm("pre_layrnorm", "pre_norm")
    else:
        rows.append(Row("embeddings.patch_embedding.bias", "patch_embedding/bias"))
    if config.layers_used:
        rows += norm(f"{layer}.layer_norm1", "layers/norm1") + norm(f"{layer}.layer_norm2", "layers/norm2")
        for theirs, ours in {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}.items():
            rows += dense(f"{layer}.self_attn.{theirs}", f"layers/attention/{ours}")
        rows += dense(f"{layer}.mlp.fc1", "layers/mlp/up") + dense(f"{layer}.mlp.fc2", "layers/mlp/down")
    above = "|".join(str(i) for i in range(config.layers_used, config.num_layers)) or "none"
    unused = (
        rf"encoder\.layers\.({above})\..*",
        r"post_layernorm\..*",
        r"head\..*",
        r"embeddings\.position_ids",
    )
    return Table(tuple(rows), unused)


_OUTSIDE = (r"text_model\..*", r"text_projection\..*", r"visual_projection\..*", r"logit_scale", r"logit_bias")


def is_outside(key: str) -> bool:
    """Whether a key belongs to a whole SigLIP/CLIP model, beside its tower: kept, never used."""
    return any(re.fullmatch(pattern, key) for pattern in _OUTSIDE)
