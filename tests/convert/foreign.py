"""Foreign checkpoints for tests of import: the goldens, and tiny components with random weights."""

import dataclasses
import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from ross_jax.config import UserError
from ross_jax.convert.autoencoder import autoencoder_config
from ross_jax.convert.exporting import export
from ross_jax.convert.importing import SCOPES, TABLES, load, plan_import, write
from ross_jax.convert.language import language_config
from ross_jax.convert.mapping import expand
from ross_jax.convert.tensors import open_tensors
from ross_jax.convert.vision import vision_config
from ross_jax.models.ross import RossConfig, abstract_params
from ross_jax.tree import flatten

GOLDEN = Path(__file__).parents[1] / "golden"
ABSENT = object()

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "torch_dtype": "float32",
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_key_value_heads": 1}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 6}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 9,
    "patch_size": 4,
}
CLIP = SIGLIP | {"model_type": "clip_vision_model"}
DINOV2 = {
    "model_type": "dinov2",
    "hidden_size": 8,
    "mlp_ratio": 2,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 11,
    "patch_size": 4,
}
DINOV2_GIANT = DINOV2 | {"use_swiglu_ffn": True, "mlp_ratio": 3}
DINOV2_REGISTERS = DINOV2 | {"model_type": "dinov2_with_registers", "num_register_tokens": 3}
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [2, 4],
    "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
    "latent_channels": 3,
    "layers_per_block": 1,
    "norm_num_groups": 2,
}
TINY = {
    "_class_name": "AutoencoderTiny",
    "_diffusers_version": "0.30.0",
    "act_fn": "relu",
    "encoder_block_out_channels": [2, 2, 2],
    "decoder_block_out_channels": [3, 3, 3],
    "num_encoder_blocks": [1, 2, 1],
    "num_decoder_blocks": [2, 1, 1],
    "latent_channels": 4,
    "latent_magnitude": 3,
    "latent_shift": 0.5,
    "force_upcast": False,
}
ROSS = LLAMA | {
    "architectures": ["RossLlamaForCausalLM"],
    "model_type": "ross_llama",
    "mm_vision_tower": "towers/clip",
    "mm_hidden_size": 8,
    "mm_projector_type": "mlp2x_gelu",
}
"""config.json of the full checkpoint that `full` writes beside `towers/clip`."""


def random_arrays(shapes: dict[str, tuple[int, ...]], dtype: Any = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {key: generator.normal(size=shape).astype(dtype) for key, shape in shapes.items()}


def component_state(settings: dict[str, Any], dtype: Any = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors of the component that `settings` describe, with unused layers."""
    if "_class_name" in settings:
        return random_arrays(_shapes("autoencoder", autoencoder_config(settings, "")), dtype, seed)
    if "image_size" not in settings:
        return random_arrays(_shapes("language", language_config(settings["model_type"], settings, "")), dtype, seed)
    config = dataclasses.replace(vision_config(settings, ""), select_layer=-1)
    if config.kind == "dinov2":
        shapes = _shapes("vision", dataclasses.replace(config, final_norm=True)) | {"embeddings.mask_token": (1, 8)}
        return random_arrays(shapes, dtype, seed)
    shapes = _shapes("vision", config) | {f"post_layernorm.{name}": (8,) for name in ("weight", "bias")}
    shapes |= {"head.probe": (1, 1, 8)}
    return {f"vision_model.{key}": value for key, value in random_arrays(shapes, dtype, seed).items()}


def _shapes(kind: str, config: Any) -> dict[str, tuple[int, ...]]:
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(RossConfig(**{kind: config}))[kind]).items()}
    return {piece.hf_key: piece.shape for piece in expand(TABLES[kind](config), shapes)}


def scoped(state: dict[str, np.ndarray], component: str) -> dict[str, np.ndarray]:
    """Renames a component's tensors to the keys of a full checkpoint."""
    return {SCOPES[component] + key: value for key, value in state.items()}


def projector_state(sizes: list[int], first: str = "0.") -> dict[str, np.ndarray]:
    """Random tensors of LLaVA's projector.

    Args:
      sizes: input width, then the output width of each layer.
      first: prefix of the first layer's keys. Empty for the type `linear`.
    """
    shapes = {}
    for i, (size, into) in enumerate(itertools.pairwise(sizes)):
        name = first if i == 0 else f"{2 * i}."
        shapes |= {f"{name}weight": (into, size), f"{name}bias": (into,)}
    return scoped(random_arrays(shapes, seed=7), "projector")


def save(folder: Path, state: dict[str, np.ndarray], settings: dict[str, Any] | None, stem: str = "model") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(state, folder / f"{stem}.safetensors", {"format": "pt"})
    if settings is not None:
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return folder


def component(folder: Path, settings: dict[str, Any], **options: Any) -> Path:
    """Writes a component's folder with random weights."""
    stem = "diffusion_pytorch_model" if "_class_name" in settings else "model"
    return save(folder, component_state(settings, **options), settings, stem)


def full(folder: Path, settings: dict[str, Any] = ROSS, projector: list[int] | None = None) -> Path:
    """Writes a small full checkpoint of Llama and CLIP to `folder/model/checkpoint`, and the tower it names."""
    component(folder / "towers" / "clip", CLIP)
    state = component_state({**settings, "model_type": "llama"})
    state |= scoped(component_state(CLIP, seed=1), "vision") | projector_state(projector or [8, 8, 8])
    return save(folder / "model" / "checkpoint", state, settings)


def golden(name: str, folder: Path) -> Path:
    """Copies a golden's folders into `folder`, and returns its full checkpoint."""
    for part in ("checkpoint", "llm", "vision_tower", "vae"):
        shutil.copytree(GOLDEN / name / part, folder / name / part)
    return folder / name / "checkpoint"


def edit_json(file: Path, **changes: Any) -> None:
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not ABSENT}))


def edit_tensors(file: Path, **changes: Any) -> None:
    """Replaces tensors of a safetensors file. The value ABSENT removes a tensor."""
    state = {**state_of(file), **changes}
    safetensors.numpy.save_file({key: value for key, value in state.items() if value is not ABSENT}, file)


def state_of(path: Path) -> dict[str, np.ndarray]:
    with open_tensors(path) as files:
        return {key: files.read(key) for key in files}


def files_of(folder: Path) -> dict[str, bytes]:
    """Name -> content of all files but digests and model cards, which exports have and most checkpoints do not."""
    own = ("SHA256SUMS", "README.md")
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in own)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def assert_same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    """Checks that two states have the same keys, dtypes and bits."""
    assert left.keys() == right.keys()
    different = [key for key in left if not identical(left[key], right[key])]
    assert not different


def identical(left: np.ndarray, right: np.ndarray) -> bool:
    return (left.dtype, left.shape, left.tobytes()) == (right.dtype, right.shape, right.tobytes())


def import_model(output: Path, *origins: Path, **flags: Any) -> Path:
    plan = plan_import([str(origin) for origin in origins], **flags)
    try:
        write(plan, output)
    finally:
        plan.close()
    return output


def import_tree(*origins: Path, **flags: Any) -> dict[str, np.ndarray]:
    """Imports into memory: path -> array."""
    plan = plan_import([str(origin) for origin in origins], **flags)
    try:
        return flatten(load(plan))
    finally:
        plan.close()


def round_trip(folder: Path, layout: str, *origins: Path, dtype: str | None = None, **flags: Any) -> Path:
    """Imports and exports, and returns the exported folder."""
    model = import_model(folder / "imported", *origins, **flags)
    export(model, folder / "exported", layout, dtype)
    return folder / "exported"


def refused(*origins: Path | str, **flags: Any) -> str:
    """Runs an import that must fail, and returns its message."""
    with pytest.raises(UserError) as caught:
        plan = plan_import([str(origin) for origin in origins], **flags)
        load(plan)
    return str(caught.value)


def assert_says(message: str, *patterns: str) -> None:
    for pattern in patterns:
        assert re.search(pattern, message), f"{pattern!r} is not in: {message}"
