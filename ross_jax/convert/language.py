"""Qwen2 / Qwen2.5 / Qwen3 and Llama / Vicuna: transformers' configs and keys."""

from collections.abc import Mapping
from typing import Any

from ross_jax.config import ConfigError
from ross_jax.convert.mapping import LINEAR, Row, Table, dense
from ross_jax.models.language import LanguageConfig, RopeScaling

FAMILIES = ("qwen2", "qwen3", "llama")
"""`model_type` of the configs that `language_config` reads."""


def language_config(family: str, settings: Mapping[str, Any], where: str) -> LanguageConfig:
    """Reads a language model's config.json.

    Args:
      family: one of `FAMILIES`.
      settings: the parsed file; transformers' defaults fill what it leaves out.
      where: its name, for messages.

    Raises:
      ConfigError: a setting that we do not compute, by name.
    """
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    cls = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}[family]
    full = cls(**{**settings, "model_type": family})
    head_dim = getattr(full, "head_dim", None) or full.hidden_size // full.num_attention_heads
    checks = {
        "hidden_act": (full.hidden_act, full.hidden_act == "silu", "silu"),
        "sliding_window": (_sliding_window(full, settings), _sliding_window(full, settings) is None, "full attention"),
        "partial_rotary_factor": (
            settings.get("partial_rotary_factor"),
            settings.get("partial_rotary_factor") in (None, 1, 1.0),
            "1",
        ),
        "quantization_config": (
            settings.get("quantization_config"),
            not settings.get("quantization_config"),
            "unquantized weights",
        ),
    }
    problems = [f"{name} {value!r} is not supported; {good} is" for name, (value, ok, good) in checks.items() if not ok]
    if problems:
        raise ConfigError(f"{where}: {'; '.join(problems)}")
    bias = bool(getattr(full, "attention_bias", False))
    try:
        return LanguageConfig(
            vocab_size=full.vocab_size,
            hidden_size=full.hidden_size,
            intermediate_size=full.intermediate_size,
            num_layers=full.num_hidden_layers,
            num_heads=full.num_attention_heads,
            num_kv_heads=full.num_key_value_heads,
            head_dim=head_dim,
            rope_theta=float(full.rope_parameters["rope_theta"]),
            norm_eps=full.rms_norm_eps,
            rope_scaling=_rope_scaling(full.rope_parameters, where),
            qkv_bias=family == "qwen2" or bias,
            out_bias=bias,
            mlp_bias=bool(getattr(full, "mlp_bias", False)),
            qk_norm=family == "qwen3",
            tied_head=bool(full.tie_word_embeddings),
        )
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def _sliding_window(full: Any, settings: Mapping[str, Any]) -> int | None:
    """The window if any layer uses one: Qwen's windows need `use_sliding_window` and a layer past the full ones."""
    kinds = set(getattr(full, "layer_types", None) or ())
    if kinds - {"full_attention"}:
        return settings.get("sliding_window") or getattr(full, "sliding_window", None) or 0
    return None


def _rope_scaling(parameters: Mapping[str, Any], where: str) -> RopeScaling | None:
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", float(parameters["factor"]))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            float(parameters["factor"]),
            float(parameters["low_freq_factor"]),
            float(parameters["high_freq_factor"]),
            int(parameters["original_max_position_embeddings"]),
        )
    raise ConfigError(f"{where}: rope scaling {kind!r} is not supported; default, linear and llama3 are")


def table(config: LanguageConfig) -> Table:
    """Keys of `...ForCausalLM`."""
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
    # Buffers that old checkpoints stored.
    unused = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq")
    if config.tied_head:
        return Table(tuple(rows), unused, {"lm_head.weight": "model.embed_tokens.weight"})
    return Table((*rows, Row("lm_head.weight", "head", LINEAR)), unused)
