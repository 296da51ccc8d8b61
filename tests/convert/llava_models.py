"""Tiny models of transformers' LLaVA, made and saved by transformers itself. They need torch."""

from pathlib import Path
from typing import Any

import safetensors.numpy
import torch
import transformers

from tokenizer_fixtures import byte_level_tokenizer

CLIP = {
    **{"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3},
    **{"num_attention_heads": 2, "image_size": 28, "patch_size": 14, "initializer_range": 1.0},
}
SIGLIP = {**CLIP, "model_type": "siglip_vision_model", "image_size": 30, "vision_use_head": False}
LLAMA = {
    **{"model_type": "llama", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 271, "initializer_range": 0.5},
}
QWEN2 = {**LLAMA, "model_type": "qwen2", "tie_word_embeddings": True}
KINDS: dict[str, dict[str, Any]] = {
    "clip_llama": {"vision_config": CLIP, "text_config": LLAMA, "vision_feature_select_strategy": "default"},
    "siglip_qwen2": {
        **{"vision_config": SIGLIP, "text_config": QWEN2, "vision_feature_select_strategy": "full"},
        **{"vision_feature_layer": -1, "tie_word_embeddings": True},
    },
}
"""As LLaVA-1.5, whose images are cropped, and as LLaVA-Interleave, whose tower lacks its last layer and whose images
are squashed."""


def make_model(kind: str) -> Any:
    """A random model of a kind."""
    torch.manual_seed(0)
    config = transformers.LlavaConfig(**KINDS[kind], image_token_index=270, image_seq_length=4)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    for name, values in model.named_parameters():
        if name.endswith("bias") or "norm" in name:  # transformers starts these at 0 and 1
            values.data += 0.3 * torch.randn_like(values)
    return model


def make_processor(kind: str) -> Any:
    """The processor of a kind, with the tokenizer of the tests."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    tokenizer.padding_side = "left"
    if kind == "clip_llama":
        square = {"height": 28, "width": 28}
        images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=square)
    else:
        images = transformers.SiglipImageProcessorPil(size={"height": 30, "width": 30})
    return transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy=KINDS[kind]["vision_feature_select_strategy"],
        num_additional_image_tokens=int(kind == "clip_llama"),
    )


def save_namings(model: Any, folder: Path) -> dict[str, Path]:
    """Saves a model under each of the names that transformers 5 writes: naming -> folder."""
    folders = {name: folder / name for name in ("never_loaded", "loaded", "in_memory")}
    model.save_pretrained(folders["never_loaded"])
    loaded = transformers.LlavaForConditionalGeneration.from_pretrained(_as_on_the_hub(model, folder / "hub"))
    loaded.save_pretrained(folders["loaded"])
    model.save_pretrained(folders["in_memory"], save_original_format=False)
    return folders


def _as_on_the_hub(model: Any, folder: Path) -> Path:
    """Saves a model under the names of llava-hf's repositories."""
    model.config.save_pretrained(folder)
    names = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
    names |= {"model.vision_tower.": "vision_tower.vision_model.", "model.multi_modal": "multi_modal"}
    state = {}
    for key, values in model.state_dict().items():
        begin = next(each for each in names if key.startswith(each))
        state[names[begin] + key.removeprefix(begin)] = values.numpy().copy()
    if model.config.tie_word_embeddings:
        del state["language_model.lm_head.weight"]
    safetensors.numpy.save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder
