"""Vision encoders of transformers: config.json and keys of SigLIP, CLIP and DINOv2."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ross_jax.config import ConfigError
from ross_jax.convert import fields
from ross_jax.convert.mapping import BATCHED, CONV, Row, Table, Transform, conv, dense, expand, norm
from ross_jax.convert.settings import MAX_LAYERS, Settings
from ross_jax.models.ross import RossConfig, abstract_params
from ross_jax.models.vision import VisionConfig
from ross_jax.tree import flatten

PREFIXES = ("vision_model.", "")
"""Prefixes that the keys of a vision tower can have. transformers 5 writes none in vision-only checkpoints."""
ANCHORS = ("embeddings.position_embedding.weight", "embeddings.position_embeddings", "embeddings.cls_token")
"""Keys below the prefix, one of which every vision tower has. They tell the prefix."""
NORMALISATION = {
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "dinov2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Kind -> (mean, standard deviation) that the published models expect of the colours red, green and blue, in [0, 1]."""
_MODEL_TYPES = {
    "siglip_vision_model": "siglip",
    "clip_vision_model": "clip",
    "siglip": "siglip",
    "clip": "clip",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2",
}
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_new": "gelu_tanh"}
_DEFAULTS = {
    "siglip": ("gelu_pytorch_tanh", 16, 1e-6),
    "clip": ("quick_gelu", 32, 1e-5),
    "dinov2": ("gelu", 14, 1e-6),
    "dinov2_with_registers": ("gelu", 16, 1e-6),
}
"""`model_type` without `_vision_model` -> defaults of transformers: activation, patch size, epsilon of the norms."""
_CLASS_TOKEN = Transform(lambda x: x[0, 0], lambda x: x[None, None])
_GATED_KERNEL = Transform(
    lambda x: x.reshape(2, x.shape[0] // 2, x.shape[1]).transpose(2, 0, 1),
    lambda x: x.transpose(1, 2, 0).reshape(-1, x.shape[0]),
)
"""Kernel of a torch Linear that computes gate and input: [2 * out, in] <-> [in, 2, out]."""
_GATED_BIAS = Transform(lambda x: x.reshape(2, -1), lambda x: x.reshape(-1))


def model_types() -> list[str]:
    """Every `model_type` that `vision_config` reads."""
    return list(_MODEL_TYPES)


def vision_config(settings: Mapping[str, Any], where: str) -> VisionConfig:
    """Reads the config.json of SigLIP, CLIP or DINOv2, either of the whole model or of its vision tower.

    Args:
      settings: the parsed file. Missing fields get the defaults of transformers.
      where: name of the file, for messages.

    Returns:
      A config that selects the last layer but one, as the reference always does for SigLIP.

    Raises:
      ConfigError: names every field that is malformed or not supported.
    """
    model_type = settings["model_type"]
    kind = _MODEL_TYPES[model_type]
    read = Settings(settings, where)
    if model_type in ("siglip", "clip"):
        read = read.inner("vision_config")
    hidden = read.size("hidden_size", 768)
    default_activation, default_patch, default_eps = _DEFAULTS[model_type.removesuffix("_vision_model")]
    activation = read.text("hidden_act", default_activation)
    if activation not in _ACTIVATIONS:
        read.refuse("hidden_act", f"one of {', '.join(_ACTIVATIONS)}")
    read.only("num_channels", 3)
    fields.VISION.check(read)
    sizes = {
        "kind": kind,
        "image_size": read.size("image_size", 224, most=2**14),
        "patch_size": read.size("patch_size", default_patch),
        "hidden_size": hidden,
        "num_layers": read.size("num_hidden_layers", 12, most=MAX_LAYERS),
        # No tensor's shape tells the number of heads. Only the default width has a default.
        "num_heads": read.size("num_attention_heads", 12 if hidden == 768 else None),
        "activation": _ACTIVATIONS.get(activation),
        "norm_eps": read.number("layer_norm_eps", default_eps),
    }
    if kind == "dinov2":
        read.only("qkv_bias", True)
        swiglu = sizes["swiglu"] = read.flag("use_swiglu_ffn")
        wide = hidden * read.size("mlp_ratio", 4, most=64)
        # A gated MLP has two thirds of the width, rounded up to a multiple of 8.
        sizes["intermediate_size"] = (int(wide * 2 / 3) + 7) // 8 * 8 if swiglu else wide
        registered = model_type == "dinov2_with_registers"
        sizes["registers"] = read.size("num_register_tokens", 4, most=2**10) if registered else 0
    else:
        sizes["intermediate_size"] = read.size("intermediate_size", 3072)
    return read.build(VisionConfig, **sizes)


def vision_settings(config: VisionConfig) -> dict[str, Any]:
    """config.json of a vision encoder. The inverse of `vision_config`, but for the selected layer.

    Raises:
      ConfigError: transformers has no such activation, or DINOv2 no such width of its MLPs.
    """
    activation = next((theirs for theirs, own in _ACTIVATIONS.items() if own == config.activation), None)
    if activation is None:
        raise ConfigError(f"activation {config.activation!r}: none of {', '.join(_ACTIVATIONS)}")
    architectures = {"siglip": "SiglipVisionModel", "clip": "CLIPVisionModel", "dinov2": "Dinov2Model"}
    settings = {
        "architectures": [architectures[config.kind]],
        "model_type": "dinov2" if config.kind == "dinov2" else f"{config.kind}_vision_model",
        "hidden_act": activation,
        "layer_norm_eps": config.norm_eps,
        "num_channels": 3,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
    }
    if config.kind == "siglip":
        settings["vision_use_head"] = False
    if config.kind != "dinov2":
        return settings | {"intermediate_size": config.intermediate_size, "attention_dropout": 0.0}
    settings |= {"qkv_bias": True, "use_swiglu_ffn": config.swiglu, "layerscale_value": 1.0}
    if config.registers:
        settings |= {"architectures": ["Dinov2WithRegistersModel"], "model_type": "dinov2_with_registers"}
        settings["num_register_tokens"] = config.registers
    for ratio in range(1, 64):
        if vision_config(settings | {"mlp_ratio": ratio}, "").intermediate_size == config.intermediate_size:
            return settings | {"mlp_ratio": ratio}
    raise ConfigError(f"DINOv2 of width {config.hidden_size} has no MLPs of width {config.intermediate_size}")


def processor_settings(
    config: VisionConfig, mean: tuple[float, ...], std: tuple[float, ...], resample: int
) -> dict[str, Any]:
    """preprocessor_config.json of a vision encoder: CLIP's processor crops, SigLIP's squashes."""
    square = {"height": config.image_size, "width": config.image_size}
    settings = {"image_processor_type": "SiglipImageProcessor", "size": square}
    if config.kind != "siglip":
        kind = {"clip": "CLIPImageProcessor", "dinov2": "BitImageProcessor"}[config.kind]
        settings = {"image_processor_type": kind, "size": {"shortest_edge": config.image_size}}
        settings |= {"crop_size": square, "do_center_crop": True, "do_convert_rgb": True}
    steps = {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": resample,
        "rescale_factor": 1 / 255,
    }
    return settings | steps | {"image_mean": list(mean), "image_std": list(std)}


def absent_tensors(config: VisionConfig) -> dict[str, np.ndarray]:
    """Tensors of transformers' model that an encoder lacks if it was never imported: key below the prefix -> values.

    They belong to layers above the selected one and to the last norm, and are never used. Zeros turn such a layer into
    the identity.
    """
    whole = dataclasses.replace(config, select_layer=-1, final_norm=config.kind != "clip")
    pieces = {}
    for each in (config, whole):
        params = flatten(abstract_params(RossConfig(vision=each))["vision"])
        found = expand(table(each), {path: leaf.shape for path, leaf in params.items()})
        pieces = {piece.hf_key: piece.shape for piece in found if piece.hf_key not in pieces}
    if config.kind == "clip":
        pieces |= {f"post_layernorm.{name}": (config.hidden_size,) for name in ("weight", "bias")}
    if config.kind == "dinov2":
        pieces["embeddings.mask_token"] = (1, config.hidden_size)
    scale = re.compile(r"(.*norm[12]?\.weight)")
    return {key: np.full(shape, float(bool(scale.fullmatch(key))), np.float32) for key, shape in pieces.items()}


def with_last_layer_unused(config: VisionConfig) -> VisionConfig:
    """SigLIP as readers of full checkpoints need it, which always take its hidden state -2.

    Where the last layer's output is selected, a layer that never runs follows. `absent_tensors` has its values.
    """
    if config.kind != "siglip" or config.final_norm or config.layers_used != config.num_layers:
        return config
    return dataclasses.replace(config, num_layers=config.num_layers + 1, select_layer=-2)


def teacher_config(settings: Mapping[str, Any], where: str) -> VisionConfig:
    """Reads the config.json of a teacher, whose features are transformers' `last_hidden_state`.

    This is the output of the last layer, after the final norm in SigLIP and DINOv2. CLIP's final norm sees the class
    token only. Arguments and errors are those of `vision_config`.
    """
    config = vision_config(settings, where)
    return dataclasses.replace(config, select_layer=-1, final_norm=config.kind != "clip")


def table(config: VisionConfig) -> Table:
    """Table of the keys below the tower's prefix."""
    return _dinov2_table(config) if config.kind == "dinov2" else _siglip_table(config)


def _siglip_table(config: VisionConfig) -> Table:
    """Table of SigLIP and CLIP."""
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
        for hf_key, path in {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}.items():
            rows += dense(f"{layer}.self_attn.{hf_key}", f"layers/attention/{path}")
        rows += dense(f"{layer}.mlp.fc1", "layers/mlp/up") + dense(f"{layer}.mlp.fc2", "layers/mlp/down")
    if config.final_norm:
        rows += norm("post_layernorm", "final_norm")
    unused = (
        rf"encoder\.layers\.({_above(config)})\..*",
        r"post_layernorm\..*",
        r"head\..*",
        r"embeddings\.position_ids",
    )
    return Table(tuple(rows), unused)


def _dinov2_table(config: VisionConfig) -> Table:
    """Table of DINOv2, with or without registers."""
    layer = "encoder.layer.{}"
    rows = [
        *conv("embeddings.patch_embeddings.projection", "patch_embedding"),
        Row("embeddings.cls_token", "class_embedding", _CLASS_TOKEN),
        Row("embeddings.position_embeddings", "position_embedding", BATCHED),
    ]
    if config.registers:
        rows.append(Row("embeddings.register_tokens", "registers", BATCHED))
    if config.layers_used:
        rows += norm(f"{layer}.norm1", "layers/norm1") + norm(f"{layer}.norm2", "layers/norm2")
        for name in ("query", "key", "value"):
            rows += dense(f"{layer}.attention.attention.{name}", f"layers/attention/{name}")
        rows += dense(f"{layer}.attention.output.dense", "layers/attention/out")
        rows += [Row(f"{layer}.layer_scale{i}.lambda1", f"layers/scale{i}") for i in (1, 2)]
        if config.swiglu:
            rows.append(Row(f"{layer}.mlp.weights_in.weight", "layers/mlp/gate_up/kernel", _GATED_KERNEL))
            rows.append(Row(f"{layer}.mlp.weights_in.bias", "layers/mlp/gate_up/bias", _GATED_BIAS))
            rows += dense(f"{layer}.mlp.weights_out", "layers/mlp/down")
        else:
            rows += dense(f"{layer}.mlp.fc1", "layers/mlp/up") + dense(f"{layer}.mlp.fc2", "layers/mlp/down")
    if config.final_norm:
        rows += norm("layernorm", "final_norm")
    unused = (rf"encoder\.layer\.({_above(config)})\..*", r"layernorm\..*", r"embeddings\.mask_token")
    return Table(tuple(rows), unused)


def _above(config: VisionConfig) -> str:
    """Regular expression of the numbers of the layers above the selected one, which never run."""
    return "|".join(str(i) for i in range(config.layers_used, config.num_layers)) or "none"


_OUTSIDE = (r"text_model\..*", r"text_projection\..*", r"visual_projection\..*", r"logit_scale", r"logit_bias")


def is_outside(key: str) -> bool:
    """Whether a key of a whole SigLIP or CLIP model lies outside its vision tower. Import keeps such tensors aside."""
    return any(re.fullmatch(pattern, key) for pattern in _OUTSIDE)
