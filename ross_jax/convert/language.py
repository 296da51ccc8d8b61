"""Language models of transformers: config.json and keys of Qwen2, Qwen2.5, Qwen3, Llama and Vicuna."""

from collections.abc import Mapping
from typing import Any

from ross_jax.config import ConfigError
from ross_jax.convert import fields
from ross_jax.convert.mapping import LINEAR, Row, Table, dense
from ross_jax.convert.settings import MAX_LAYERS, Settings
from ross_jax.models.language import LanguageConfig, RopeScaling

FAMILIES = ("qwen2", "qwen3", "llama")
"""Every `model_type` that `language_config` reads."""
ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
_POSITIONS = 32768
"""`max_position_embeddings` of a model that was never imported. It limits servers, not what is computed."""
_ROPE_FIELDS = {
    *("type", "rope_type", "rope_theta", "partial_rotary_factor"),
    *("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def language_config(family: str, settings: Mapping[str, Any], where: str) -> LanguageConfig:
    """Reads the config.json of a language model.

    Args:
      family: one of `FAMILIES`.
      settings: the parsed file. Sizes are required; other missing fields get the defaults of transformers.
      where: name of the file, for messages.

    Raises:
      ConfigError: names every field that is missing, malformed or not supported.
    """
    read = Settings(settings, where)
    heads, layers = read.size("num_attention_heads"), read.size("num_hidden_layers", most=MAX_LAYERS)
    hidden = read.size("hidden_size")
    bias = family != "qwen2" and read.flag("attention_bias")
    read.only("hidden_act", "silu")
    read.only("partial_rotary_factor", 1)
    if settings.get("quantization_config"):
        read.refuse("quantization_config", "unquantized weights")
    fields.LANGUAGE.check(read)
    _refuse_windows(read, family, layers)
    sizes = {
        "vocab_size": read.size("vocab_size", most=2**24),
        "hidden_size": hidden,
        "intermediate_size": read.size("intermediate_size"),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": read.size("num_key_value_heads", heads),
        "head_dim": read.size("head_dim", max(hidden // heads, 1)),
        "norm_eps": read.number("rms_norm_eps", 1e-6),
        "qkv_bias": family == "qwen2" or bias,
        "out_bias": bias,
        "mlp_bias": family == "llama" and read.flag("mlp_bias"),
        "qk_norm": family == "qwen3",
        "tied_head": read.flag("tie_word_embeddings"),
    }
    return read.build(LanguageConfig, **sizes, **_rotary(read))


def _refuse_windows(read: Settings, family: str, layers: int) -> None:
    """Refuses sliding windows.

    Qwen's layers have one if `use_sliding_window` is set and their number is at least `max_window_layers`.
    """
    windows = family != "llama" and read.flag("use_sliding_window") and read.values.get("sliding_window", 4096)
    if read.values.get("layer_types") is not None:
        if set(read.texts("layer_types", (), MAX_LAYERS)) - {"full_attention"}:
            read.refuse("layer_types", "'full_attention' in every layer")
    elif windows and read.integer("max_window_layers", 28) < layers:
        read.refuse("sliding_window", "full attention")


def _rotary(read: Settings) -> dict[str, Any]:
    """Reads base and scaling of the rotary embedding: `rope_parameters`, or `rope_theta` and `rope_scaling`."""
    scaling = read.inner("rope_parameters" if read.values.get("rope_parameters") else "rope_scaling")
    for name in sorted(scaling.values.keys() - _ROPE_FIELDS):
        scaling.refuse(name, "no such field")
    scaling.only("partial_rotary_factor", 1)
    base = (scaling if "rope_theta" in scaling.values else read).number("rope_theta", 10000.0)
    name = "rope_type" if "rope_type" in scaling.values else "type"
    kind = scaling.text(name, "default")
    if kind == "linear":
        return {"rope_theta": base, "rope_scaling": RopeScaling("linear", scaling.number("factor"))}
    if kind == "llama3":
        numbers = [scaling.number(name) for name in ("factor", "low_freq_factor", "high_freq_factor")]
        positions = scaling.size("original_max_position_embeddings", most=2**31)
        return {"rope_theta": base, "rope_scaling": RopeScaling("llama3", *numbers, positions)}
    if kind != "default":
        scaling.refuse(name, "default, linear or llama3")
    return {"rope_theta": base}


def language_settings(config: LanguageConfig) -> dict[str, Any]:
    """config.json of a language model, for transformers 4.43 and 5. The inverse of `language_config`.

    Raises:
      ConfigError: no family has the model's biases and norms.
    """
    family = _family(config)
    settings = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "attention_dropout": 0.0,
        "max_position_embeddings": _POSITIONS,
        "tie_word_embeddings": config.tied_head,
    }
    if config.head_dim * config.num_heads != config.hidden_size:
        settings["head_dim"] = config.head_dim
    if family == "llama":
        settings |= {"attention_bias": config.out_bias, "mlp_bias": config.mlp_bias}
    else:
        settings |= {"use_sliding_window": False, "sliding_window": None}
    if family == "qwen3":
        settings |= {"attention_bias": config.out_bias, "head_dim": config.head_dim}
    scaling = _scaling_settings(config.rope_scaling) if config.rope_scaling else None
    if scaling and "original_max_position_embeddings" in scaling:
        settings["max_position_embeddings"] = int(scaling["original_max_position_embeddings"] * scaling["factor"])
    rope = {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})}
    return settings | {"rope_theta": config.rope_theta, "rope_scaling": scaling, "rope_parameters": rope}


def _family(config: LanguageConfig) -> str:
    biases = (config.qkv_bias, config.out_bias, config.mlp_bias)
    if biases == (True, False, False) and not config.qk_norm:
        return "qwen2"
    if config.qkv_bias == config.out_bias and not (config.qk_norm and config.mlp_bias):
        return "qwen3" if config.qk_norm else "llama"
    raise ConfigError(
        f"no language model of transformers has qkv_bias {biases[0]}, out_bias {biases[1]}, mlp_bias {biases[2]} and "
        f"qk_norm {config.qk_norm}; leave it out with --without language"
    )


def _scaling_settings(scaling: RopeScaling) -> dict[str, Any]:
    """`rope_scaling` of a config.json. transformers 4.43 refuses numbers that are written without a decimal point."""
    settings = {"rope_type": scaling.kind, "factor": float(scaling.factor)}
    if scaling.kind == "llama3":
        settings |= {name: float(getattr(scaling, name)) for name in ("low_freq_factor", "high_freq_factor")}
        settings["original_max_position_embeddings"] = scaling.original_max_positions
    return settings


def for_both(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with the fields of transformers 4 beside those that only transformers 5 reads."""
    both = {name: for_both(value) if name.endswith("_config") and value else value for name, value in settings.items()}
    if settings.get("dtype") is not None:
        both.setdefault("torch_dtype", settings["dtype"])
    if rope := settings.get("rope_parameters"):
        both["rope_theta"] = rope.get("rope_theta", settings.get("rope_theta", 10000.0))
        scaling = {name: value for name, value in rope.items() if name in _ROPE_FIELDS - {"rope_theta", "type"}}
        scaling |= {name: float(value) for name, value in scaling.items() if name.endswith("factor")}
        kind = scaling.setdefault("rope_type", rope.get("type", "default"))
        both["rope_scaling"] = settings.get("rope_scaling") or (None if kind == "default" else scaling)
    return both


def table(config: LanguageConfig) -> Table:
    """Table of transformers' `...ForCausalLM`."""
    layer = "model.layers.{}"
    rows = [
        Row("model.embed_tokens.weight", "embedding"),
        Row("model.norm.weight", "final_norm/scale"),
        Row(f"{layer}.input_layernorm.weight", "layers/attention_norm/scale"),
        Row(f"{layer}.post_attention_layernorm.weight", "layers/mlp_norm/scale"),
        *dense(f"{layer}.self_attn.q_proj", "layers/query", config.qkv_bias),
        *dense(f"{layer}.self_attn.k_proj", "layers/key", config.qkv_bias),
        *dense(f"{layer}.self_attn.v_proj", "layers/value", config.qkv_bias),
        *dense(f"{layer}.self_attn.o_proj", "layers/out", config.out_bias),
        *dense(f"{layer}.mlp.gate_proj", "layers/gate", config.mlp_bias),
        *dense(f"{layer}.mlp.up_proj", "layers/up", config.mlp_bias),
        *dense(f"{layer}.mlp.down_proj", "layers/down", config.mlp_bias),
    ]
    if config.qk_norm:
        rows.append(Row(f"{layer}.self_attn.q_norm.weight", "layers/query_norm/scale"))
        rows.append(Row(f"{layer}.self_attn.k_norm.weight", "layers/key_norm/scale"))
    # Old checkpoints stored these buffers.
    unused = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq")
    if config.tied_head:
        return Table(tuple(rows), unused, {"lm_head.weight": "model.embed_tokens.weight"})
    return Table((*rows, Row("lm_head.weight", "head", LINEAR)), unused)
