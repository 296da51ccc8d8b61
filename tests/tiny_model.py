"""A tiny model directory, laid out as import and training lay it out."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ross_jax import checkpoints
from ross_jax.config import to_dict
from ross_jax.models.ross import RossConfig, components
from tiny import CONFIG
from tokenizer_fixtures import byte_level_tokenizer

SIZED = dataclasses.replace(CONFIG, language=dataclasses.replace(CONFIG.language, vocab_size=320))


def write_model(folder: Path, config: RossConfig = SIZED) -> Path:
    """Writes all components with random parameters, none of them zero, and template qwen_2."""
    rng = np.random.default_rng(0)
    leaves = {}
    for name, module in components(config).items():
        inputs = [jnp.zeros(spec.shape, spec.dtype) for spec in module.input_spec()]
        params = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
        leaves[name] = jax.tree.map(lambda leaf: _leaf(_values(rng, leaf.shape)), params)
    checkpoints.save_streamed(folder / "params", leaves)
    byte_level_tokenizer().save_pretrained(folder / "files" / "language")
    settings = {"foreign": {}, "template": "qwen_2", "image_mode": "square"}
    checkpoints.write_manifest(folder, {"config": to_dict(config), **settings})
    return folder


def _values(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Random values, large enough for every layer to matter and for different prompts to get different answers."""
    return rng.normal(0, 1.5 / np.sqrt(shape[-2]) if len(shape) > 1 else 0.3, shape)


def _leaf(values: np.ndarray) -> checkpoints.StreamedLeaf:
    values = values.astype(np.float32)
    return checkpoints.StreamedLeaf(values.shape, values.dtype, lambda: iter([(None, values)]))
