"""A tiny model and batches for the tests of training."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ross_jax.lora import LoraConfig
from ross_jax.models.autoencoder import AutoencoderConfig
from ross_jax.models.denoiser import DenoiserConfig
from ross_jax.models.language import LanguageConfig
from ross_jax.models.projector import ProjectorConfig
from ross_jax.models.regressor import RegressorConfig
from ross_jax.models.ross import RossConfig
from ross_jax.models.vision import VisionConfig
from ross_jax.objectives.loss import make_loss
from ross_jax.objectives.reconstruction import ReconstructionConfig
from ross_jax.sharding import MeshConfig, batch_sharding, make_mesh
from ross_jax.training.optimizer import OptimizerConfig, learning_rates, make_optimizer
from ross_jax.training.state import (
    FreezeConfig,
    abstract_tree,
    init_components,
    init_factors,
    split,
    state_shardings,
)
from ross_jax.training.step import compile_step, make_state, make_train_step
from ross_jax.tree import merge

CONFIG = RossConfig(
    vision=VisionConfig("siglip", 28, 14, 32, 48, 2, 4, "gelu_tanh", 1e-6),
    projector=ProjectorConfig("mlp", 32, 64),
    language=LanguageConfig(96, 64, 128, 2, 8, 4, 8, 1e4, 1e-6, qkv_bias=True),
    denoiser=DenoiserConfig(64, 64, 2, 32, 2, num_heads=4),
    autoencoder=AutoencoderConfig((8, 8, 8), 1, 4, 4, 0.5, 0.1, (False,) * 3, (False,) * 3, False),
)
_TEACHER = VisionConfig("clip", 30, 15, 24, 40, 2, 2, "quick_gelu", 1e-5, -1)


def _regressing(target: str, size: int, **parts) -> RossConfig:
    return dataclasses.replace(CONFIG, denoiser=None, regressor=RegressorConfig(target, 64, size, 48), **parts)


MODELS = {
    "denoise": CONFIG,
    "pixel": _regressing("pixels", 768, autoencoder=None),
    "latent": _regressing("latents", 64),
    "latent of a teacher": _regressing("features", 24, autoencoder=None, teacher=_TEACHER),
    "latent2pixel": _regressing("latents", 64),
    "none": CONFIG,
}
"""Name -> model. The first word of a name is the kind of reconstruction."""
COUNT = CONFIG.vision.num_tokens
RANDOM = ("vision", "projector", "language", "autoencoder", "teacher")
"""`init_random` of runs that begin with nothing."""
ONE_DEVICE, DENOISE = MeshConfig(1, 1, 1), ReconstructionConfig()
STAGE2 = FreezeConfig(
    (r"language/.*", r"projector/.*", r"(denoiser|regressor)/.*"), dtype="float32", autoencoder_dtype="float32"
)


def make_batch(rows: int = 8, length: int = 24, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of two conversations of 10 positions, then padding. Rows have two, one and no images in turn."""
    rng = np.random.default_rng(seed)
    batch = {
        "tokens": rng.integers(1, 96, (rows, length)).astype(np.int32),
        "targets": rng.integers(1, 96, (rows, length)).astype(np.int32),
        "segments": np.repeat([[1] * 10 + [2] * 10 + [0] * (length - 20)], rows, 0).astype(np.int32),
        "images": rng.integers(0, 256, (rows, 2, 28, 28, 3)).astype(np.uint8),
        "image_start": np.full((rows, 2), length, np.int32),
        "image_ids": np.zeros((rows, 2), np.uint32),
    }
    batch["positions"] = np.where(batch["segments"] == 2, np.arange(length) - 10, np.arange(length)).astype(np.int32)
    batch["targets"][rng.random((rows, length)) < 0.5] = -100
    batch["targets"][batch["segments"] == 0] = -100
    for row in range(rows):
        for slot, start in list(enumerate((2, 11)))[: (2, 1, 0)[row % 3]]:
            batch["image_start"][row, slot] = start
            batch["image_ids"][row, slot] = 1 + 2 * row + slot
            batch["tokens"][row, start : start + COUNT] = 0
            batch["targets"][row, start : start + COUNT - 1] = -100
    return batch


@functools.cache
def _initial(config: RossConfig, freeze: FreezeConfig, updates: LoraConfig, seed: int):
    """Initial parameters as NumPy arrays, computed on one device."""
    tree, key = (
        abstract_tree(config, freeze, make_mesh(ONE_DEVICE, jax.devices()[:1]), None, updates),
        jax.random.key(seed),
    )
    made = merge(init_components(config, tree, tree, key), init_factors(tree, updates, key))
    return {name: jax.tree.map(np.asarray, made.get(name, {})) for name in tree}


def _place(params, tree):
    return jax.tree.map(lambda leaf, spec: jax.device_put(leaf, spec.sharding, may_alias=False), params, tree)


class Run:
    """A compiled training step and its state on a mesh."""

    def __init__(
        self,
        mesh: MeshConfig = ONE_DEVICE,
        devices: int = 1,
        accumulate: int = 1,
        freeze: FreezeConfig = STAGE2,
        reconstruction: ReconstructionConfig = DENOISE,
        remat: str = "none",
        dtype: str = "float32",
        learning_rate: float = 1e-3,
        seed: int = 0,
        text_weight: float = 1.0,
        config: RossConfig = CONFIG,
        supervised: int | None = None,
        platform: str | None = None,
        sources: int = 0,
        updates: LoraConfig | None = None,
    ):
        self.mesh = make_mesh(mesh, jax.devices(platform)[:devices])
        key = jax.random.key(seed)
        updates = updates or LoraConfig()
        freeze = freeze.with_updates(config, updates)
        self.tree = abstract_tree(config, freeze, self.mesh, None, updates)
        made = _place(_initial(config, freeze, updates, seed), self.tree)
        settings = OptimizerConfig(learning_rate, ((r"denoiser/.*", learning_rate / 10),))
        optimizer = make_optimizer(settings, steps=10)
        params, frozen = split(made, freeze)
        shapes = jax.eval_shape(lambda p, f: make_state(p, f, optimizer), params, frozen)
        self.shardings = state_shardings(shapes, self.tree, self.mesh)
        self.state = jax.jit(lambda p, f: make_state(p, f, optimizer), out_shardings=self.shardings)(params, frozen)
        text = {"text_weight": text_weight, "chunk": 32, "supervised": supervised, "sources": sources}
        loss = make_loss(config, reconstruction, dtype, remat, updates.dropout, **text)
        step = make_train_step(loss, optimizer, jax.random.fold_in(key, 1), accumulate, learning_rates(settings, 10))
        self.step = compile_step(step, self.shardings, batch_sharding(self.mesh))

    def run(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Runs one step, replaces the state, and returns the metrics: numbers, and arrays of sums by source."""
        with jax.set_mesh(self.mesh):
            placed = jax.device_put({k: jnp.asarray(v) for k, v in batch.items()}, batch_sharding(self.mesh))
            self.state, metrics = self.step(self.state, placed)
        return {name: np.asarray(value) if value.ndim else float(value) for name, value in metrics.items()}
