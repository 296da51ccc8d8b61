"""Evaluation during training: reconstructs and scores images that the run does not train on."""

import importlib.util
import logging
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt8

from ross_jax.config import ConfigError
from ross_jax.data.batches import Batch, expand
from ross_jax.data.encoders import build_image_encoder
from ross_jax.data.images import decode, decode_official, preprocess
from ross_jax.data.sources import open_sources
from ross_jax.data.tokenizer import load_tokenizer
from ross_jax.evaluation.during_training import BenchmarkEvaluator
from ross_jax.evaluation.images import psnr, ssim, to_uint8
from ross_jax.inference.prompts import prompt_batches
from ross_jax.inference.reconstruct import ImageDrawer, autoencode, encode_latents, target_images, visual_outputs
from ross_jax.objectives.reconstruction import find_objective, reconstructor
from ross_jax.sharding import batch_sharding
from ross_jax.training.callback import Callback
from ross_jax.training.recipe import RunConfig
from ross_jax.tree import merge

logger = logging.getLogger(__name__)

_INPUTS = ("tokens", "positions", "segments", "images", "image_start")


def read_images(config: RunConfig) -> list[UInt8[np.ndarray, "side side 3"]]:
    """Images of `config.evaluation`, resized for the vision encoder: the first image of each sample that has one.

    Raises:
      ConfigError: no sample has an image.
      UserError: a source or an image cannot be read.
    """
    source, _ = open_sources(config.evaluation.sources, limits=config.data.limits)
    read = decode_official if config.text.compat == "official" else decode
    count = min(config.evaluation.count, len(source))
    found = [image for i in range(count) for image in source[i * len(source) // count].images[:1]]
    if not found:
        raise ConfigError("config.evaluation.sources: none of the samples that were looked at has an image")
    return [preprocess(read(image.read(), image.name), config.images, image.name) for image in found]


def _batches(config: RunConfig, images: list[np.ndarray], rows: int) -> list[Batch]:
    """Batches in which each image follows an empty question, as in training without text."""
    text, tokens = config.text, config.model.vision.num_tokens
    encode = build_image_encoder(text.template, load_tokenizer(text.tokenizer), text.compat)
    prompt = expand(encode({"id": "image", "image": "image"}), tokens)
    own = [(image,) for image in images]
    return list(prompt_batches([prompt] * len(own), own, rows, tokens, config.images.size))


class ReconstructionEvaluator(Callback):
    """Reconstructs and scores the same images from the same noise at every call.

    All processes must call it at the same steps. Each process reads all images; the mesh's replicas share the work.
    """

    def __init__(self, config: RunConfig, mesh: Mesh, seed: int = 0):
        """Reads the images, with the errors of `read_images`. `seed` is the seed of the noise."""
        settings, model = config.evaluation, config.model
        objective, key = reconstructor(model), jax.random.key(seed)
        replicas = mesh.shape["data"] * mesh.shape["fsdp"]
        rows = -(-settings.rows // replicas) * replicas
        images = read_images(config)
        split = batch_sharding(mesh)

        def place(values: np.ndarray) -> jax.Array:
            return jax.make_array_from_callback(values.shape, split, lambda index: values[index])

        self._batches = [
            {name: place(batch[name]) for name in _INPUTS} | {"number": place(np.arange(rows) + rows * i)}
            for i, batch in enumerate(_batches(config, images, rows))
        ]
        self._count, self._shown = len(images), settings.shown
        self._bounds: dict[str, np.ndarray] | None = None
        self._has_ssim = importlib.util.find_spec("skimage") is not None
        if not self._has_ssim:
            logger.info("evaluation: no SSIM, scikit-image is not installed; `pip install -e '.[demo]'`")

        def bounds(params: Any, frozen: Any, batch: dict[str, Array]) -> dict[str, Array]:
            tree, images = merge(params, frozen), batch["images"][:, 0]
            found = {"images": target_images(model, images)}
            if model.autoencoder is not None:
                found["latents"] = encode_latents(model, tree, images)
                found["autoencoder"] = autoencode(model, tree, images)
            return found

        def reconstruct(params: Any, frozen: Any, batch: dict[str, Array]) -> dict[str, Array]:
            tree = merge(params, frozen)
            outputs = visual_outputs(model, tree, batch, config.step.dtype)[:, 0].astype(jnp.float32)
            keys = jax.vmap(partial(jax.random.fold_in, key))(batch["number"])
            made = objective.reconstruct(tree, tree, outputs, keys, settings.sampling)
            return {"pixels": made.pixels} | ({} if made.latents is None else {"latents": made.latents})

        everywhere = NamedSharding(mesh, PartitionSpec())
        self._compute_bounds = jax.jit(bounds, out_shardings=everywhere)
        self._reconstruct = jax.jit(reconstruct, out_shardings=everywhere)

    def _run(self, function: Any, state: Any) -> dict[str, Float[np.ndarray, "images ..."]]:
        parts = [jax.device_get(function(state.params, state.frozen, batch)) for batch in self._batches]
        return {name: np.concatenate([part[name] for part in parts])[: self._count] for name in parts[0]}

    def evaluate(self, state: Any) -> tuple[dict[str, float], UInt8[np.ndarray, "height width 3"]]:
        """Computes mean scores and a grid with the columns image, reconstruction and autoencoder (if there is one).

        Args:
          state: an object with the parameter trees `params` and `frozen`, such as a `TrainState`.

        Returns:
          Scores, and the grid. `psnr`: PSNR of reconstructions in dB. `ssim`: their SSIM, if scikit-image is installed.
          `psnr_autoencoder`, `ssim_autoencoder`: scores of the autoencoder's output, an upper bound. `latent_error`:
          mean squared error of the latents, if the model predicts latents.
        """
        if self._bounds is None:  # computed once, because the autoencoder is frozen
            self._bounds = self._run(self._compute_bounds, state)
        made = self._run(self._reconstruct, state)
        originals = to_uint8(self._bounds["images"])
        columns = {"": to_uint8(made["pixels"])}
        scores = {}
        if "autoencoder" in self._bounds:
            columns["_autoencoder"] = to_uint8(self._bounds["autoencoder"])
        if "latents" in made:
            scores["latent_error"] = float(np.square(made["latents"] - self._bounds["latents"]).mean())
        for name, pixels in columns.items():
            scores[f"psnr{name}"] = float(psnr(pixels, originals).mean())
            if self._has_ssim:
                scores[f"ssim{name}"] = float(ssim(pixels, originals).mean())
        shown = [pixels[: self._shown] for pixels in (originals, *columns.values())]
        return scores, rearrange(np.stack(shown), "column row h w c -> (row h) (column w) c")


def make_callbacks(config: RunConfig, mesh: Mesh, folder: Path | None = None) -> list[Callback]:
    """What `config.loop` asks for: images for TensorBoard, evaluations, and benchmarks.

    Args:
      folder: the run's directory, which benchmarks need.
    """
    callbacks: list[Callback] = []
    trains = find_objective(config.reconstruction.kind) is not None
    if config.loop.images and trains and reconstructor(config.model) is not None:
        callbacks.append(ImageDrawer(config.model, mesh, config.step.dtype))
    if config.loop.evaluate:
        callbacks.append(ReconstructionEvaluator(config, mesh))
    if config.loop.benchmark and folder is not None:
        callbacks.append(BenchmarkEvaluator(config, folder))
    return callbacks
