"""Layout of transformers' `LlavaForConditionalGeneration`: names on disk, config.json, processor and chat template."""

import json
from pathlib import Path
from typing import Any

from ross_jax.config import UserError
from ross_jax.convert import vision
from ross_jax.data.conversation import IMAGE_MARKER, QWEN_2_SYSTEM, V1_SYSTEM
from ross_jax.data.tokenizer import TextEncoder
from ross_jax.models.ross import RossConfig

SCOPES = {"vision": "vision_tower.", "projector": "multi_modal_projector.", "language": "language_model."}
"""Component -> prefix of its keys on disk."""
PROJECTOR_KEYS = {"0.": "linear_1.", "2.": "linear_2."}
"""Beginning of a projector's key in the reference's layout -> beginning in transformers'."""
_CONTENT = (
    "{% macro text(m) %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] if p['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}{% endif %}{% endmacro %}"
)
"""Macro that writes a message's content, which is text or a list of parts. Images come first, each on its own line."""
_DIALOGUE = (
    "{% if messages[0]['role'] == 'system' %}{{ text(messages[0]) }} {% else %}SYSTEM {% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ text(m) }} "
    "{% elif m['role'] == 'assistant' %}ASSISTANT: {{ text(m) }}STOP{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_LLAMA3 = (
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ text(m) }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_PLAIN = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{% if m['content'] is not string %}"
    "{% for p in m['content'] if p['type'] == 'image' %}<image>{% endfor %}{% endif %}"
    "{% else %}{{ text(m) }}\n{% endif %}{% endfor %}"
)
_AS_TEXT = (
    "{% set ns = namespace(found=[]) %}{% for m in messages %}"
    "{% set ns.found = ns.found + [{'role': m['role'], 'content': text(m)}] %}{% endfor %}{% set messages = ns.found %}"
)


def problems(config: RossConfig) -> list[str]:
    """What the layout cannot hold, one line each."""
    found = [f"has no {name}" for name in SCOPES if getattr(config, name) is None]
    if found:
        return found
    if config.vision.kind not in ("siglip", "clip"):
        found.append(f"transformers' LLaVA is exported with a SigLIP or CLIP tower, not {config.vision.kind}")
    if config.vision.final_norm:
        found.append("transformers' LLaVA reads its tower before the final norm, this model behind it")
    if config.projector.kind != "mlp" or config.projector.depth != 2:
        found.append("transformers' LLaVA has a projector of two layers (mlp2x_gelu), this model another")
    return found


def chat_template(template: str, tokenizer: Any) -> str:
    """Jinja text that renders a conversation as training with `template` does."""
    if template in ("v1", "qwen_2"):
        system, stop = (V1_SYSTEM, tokenizer.eos_token) if template == "v1" else (QWEN_2_SYSTEM, "<|im_end|>")
        return _CONTENT + _DIALOGUE.replace("SYSTEM", system).replace("STOP", stop)
    if template == "chatml":
        return _CONTENT + _AS_TEXT + tokenizer.chat_template
    return _CONTENT + {"llama3": _LLAMA3, "plain": _PLAIN}[template]


def write_tokenizer(tokenizer: Any, template: str | None, folder: Path) -> int:
    """Saves the tokenizer with a special token `<image>` and the chat template; returns the id of `<image>`.

    Raises:
      UserError: `<image>` is a word of the tokenizer, but not a special token, so that text could forge it.
    """
    from tokenizers import AddedToken

    if IMAGE_MARKER in tokenizer.get_vocab() and IMAGE_MARKER not in TextEncoder(tokenizer).special:
        raise UserError(f"the tokenizer has {IMAGE_MARKER!r} as ordinary text; make it a special token first")
    tokenizer.add_tokens([AddedToken(IMAGE_MARKER, special=True, normalized=False)], special_tokens=True)
    if template is not None:
        tokenizer.chat_template = chat_template(template, tokenizer)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)
    return int(tokenizer.convert_tokens_to_ids(IMAGE_MARKER))


def settings(config: RossConfig, text: dict[str, Any], tower: dict[str, Any], image_id: int) -> dict[str, Any]:
    """config.json of the whole model from those of its language model and vision encoder."""
    kind = config.vision.kind
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image_id,
        "image_seq_length": config.vision.num_tokens,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": config.vision.select_layer,
        "vision_feature_select_strategy": _strategy(kind),
        "tie_word_embeddings": config.language.tied_head,
        **{name: text[name] for name in ("dtype", "torch_dtype") if name in text},
        "text_config": {**text, "vocab_size": max(config.language.vocab_size, image_id + 1)},
        "vision_config": {**tower, **({"vision_use_head": False} if kind == "siglip" else {})},
    }


def write_processor(config: RossConfig, mode: str | None, folder: Path) -> None:
    """Writes the settings of a `LlavaProcessor` whose images equal ours."""
    own = vision.processor_settings(config.vision, config.image_mean, config.image_std, config.image_resample)
    side = config.vision.image_size
    if mode != "square":
        own |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}, "do_center_crop": True}
        own |= {"do_convert_rgb": True, "image_processor_type": "CLIPImageProcessor"}
    if mode in (None, "pad"):
        own |= {"do_pad": True, "image_processor_type": "LlavaImageProcessor"}
    whole = {
        "processor_class": "LlavaProcessor",
        "patch_size": config.vision.patch_size,
        "vision_feature_select_strategy": _strategy(config.vision.kind),
        "num_additional_image_tokens": int(config.vision.kind == "clip"),
        "image_token": IMAGE_MARKER,
    }
    own |= {"processor_class": "LlavaProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(own, indent=2) + "\n")
    (folder / "processor_config.json").write_text(json.dumps(whole, indent=2) + "\n")


def _strategy(kind: str) -> str:
    return "default" if kind == "clip" else "full"
