"""Layout of transformers' `LlavaForConditionalGeneration`: names on disk, config.json and processor."""

import json
from pathlib import Path
from typing import Any

from ross_jax.config import UserError
from ross_jax.convert import vision
from ross_jax.data.conversation import IMAGE_MARKER
from ross_jax.data.tokenizer import TextEncoder
from ross_jax.models.ross import RossConfig

SCOPES = {"vision": "vision_tower.", "projector": "multi_modal_projector.", "language": "language_model."}
"""Component -> prefix of its keys on disk."""
PROJECTOR_KEYS = {"0.": "linear_1.", "2.": "linear_2."}
"""Beginning of a projector's key in the reference's layout -> beginning in transformers'."""


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


def add_image_token(tokenizer: Any) -> int:
    """Makes `<image>` a special token of the tokenizer, if it is none yet, and returns its id.

    Raises:
      UserError: `<image>` is a word of the tokenizer, but not a special token, so that text could forge it.
    """
    from tokenizers import AddedToken

    if IMAGE_MARKER in tokenizer.get_vocab() and IMAGE_MARKER not in TextEncoder(tokenizer).special:
        raise UserError(f"the tokenizer has {IMAGE_MARKER!r} as ordinary text; make it a special token first")
    tokenizer.add_tokens([AddedToken(IMAGE_MARKER, special=True, normalized=False)], special_tokens=True)
    return int(tokenizer.convert_tokens_to_ids(IMAGE_MARKER))


def settings(
    config: RossConfig, text: dict[str, Any], tower: dict[str, Any], image_id: int, rows: int
) -> dict[str, Any]:
    """config.json of the whole model.

    Args:
      text: config.json of the language model.
      tower: config.json of the vision encoder.
      image_id: id of `<image>`.
      rows: size of the vocabulary.
    """
    kind = config.vision.kind
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image_id,
        "image_seq_length": config.vision.num_tokens,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": config.vision.select_layer,
        "vision_feature_select_strategy": STRATEGIES[kind],
        "tie_word_embeddings": config.language.tied_head,
        **{name: text[name] for name in ("dtype", "torch_dtype") if name in text},
        "text_config": {**text, "vocab_size": rows},
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
        "vision_feature_select_strategy": STRATEGIES[config.vision.kind],
        "num_additional_image_tokens": int(config.vision.kind == "clip"),
        "image_token": IMAGE_MARKER,
    }
    own |= {"processor_class": "LlavaProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(own, indent=2) + "\n")
    (folder / "processor_config.json").write_text(json.dumps(whole, indent=2) + "\n")


STRATEGIES = {"siglip": "full", "clip": "default"}
"""Vision encoder -> `vision_feature_select_strategy`: all tokens, or all but the class token."""
