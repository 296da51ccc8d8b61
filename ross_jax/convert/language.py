"""Language models of transformers: config.json and keys of Qwen2, Qwen2.5, Qwen3, Llama and Vicuna."""

from collections.abc import Mapping
from typing import Any

from ross_jax.convert import fields
from ross_jax.convert.mapping import LINEAR, Row, Table, dense
from ross_jax.convert.settings import MAX_LAYERS, Settings
from ross_jax.models.language import LanguageConfig, RopeScaling

FAMILIES = ("qwen2", "qwen3", "llama")
"""Every `model_type` that `language_config` reads."""
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
