"""Reads exported checkpoints as the reference does. Runs in the environment of launch/environments/transformers4.txt.

    python transformers4.py OUTPUT TEXT FOLDER...

OUTPUT.npz gets `I/slow_ids`, `I/fast_ids`, `I/logits` and `I/features` for the I-th folder.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file

SCOPE = "model.vision_tower.vision_tower."


def read(folder: Path, text: str) -> dict[str, np.ndarray]:
    settings = json.loads((folder / "config.json").read_text())
    found = {}
    for name, fast in {"slow": False, "fast": True}.items():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, use_fast=fast)
        found[f"{name}_ids"] = np.array(tokenizer(text).input_ids)
    family = {"ross_qwen2": "Qwen2", "ross_llama": "Llama"}[settings["model_type"]]
    cls = getattr(transformers, f"{family}ForCausalLM")
    model, loading = cls.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not loading["missing_keys"] and not loading["mismatched_keys"], loading
    assert str(model.dtype) == f"torch.{settings['torch_dtype']}" == "torch.float32"
    ids = torch.arange(3, 40)[None]
    found["logits"] = model(ids).logits.detach().numpy()

    name = settings["mm_vision_tower"]
    kind = "CLIP" if "clip" in name.lower() else "Siglip" if "siglip" in name.lower() else None
    processor = getattr(transformers, f"{kind}ImageProcessor").from_pretrained(name)
    assert processor.image_mean == settings["image_mean"] and processor.image_std == settings["image_std"]
    tower = getattr(transformers, f"{kind}VisionModel").from_pretrained(name)
    state = {key.removeprefix(SCOPE): x for key, x in load_file(folder / "model.safetensors").items() if SCOPE in key}
    tower.load_state_dict(state, strict=True)
    size = tower.config.image_size
    pixels = torch.sin(torch.arange(3.0 * size * size)).reshape(1, 3, size, size)
    states = tower(pixels, output_hidden_states=True).hidden_states
    features = states[settings["mm_vision_select_layer"]].detach().numpy()
    found["features"] = features[:, 1:] if kind == "CLIP" else features
    return found


output, text, *folders = sys.argv[1:]
results = {f"{i}/{name}": x for i, folder in enumerate(folders) for name, x in read(Path(folder), text).items()}
np.savez(output, **results)
