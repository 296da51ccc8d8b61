"""A tiny KL autoencoder in the FLUX layout, fitted to the demo's training pictures in about a minute on two cores.

The budget is a number of steps, not seconds, so that the same pictures give the same autoencoder on the same machine.
"""

import dataclasses
import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jaxtyping import Array, Float, UInt8
from PIL import Image

from ross_jax.config import to_dict
from ross_jax.convert.autoencoder import table
from ross_jax.convert.mapping import expand
from ross_jax.convert.safetensors_writer import SafetensorsWriter
from ross_jax.demo.once import file_hash, make_once
from ross_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from ross_jax.storage import location
from ross_jax.tree import flatten, unflatten

Progress = Callable[[str], None]
Params = dict[str, Any]

_STEM = "diffusion_pytorch_model"
_FIRST_LOGVAR = -5.0


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """Size of the autoencoder and length of its training.

    Attributes:
      channels: channels of each level, finest first. Each level but the last halves the resolution: 4 levels give
        latents at an eighth of the picture's side.
      latent_channels: values per latent pixel.
      norm_groups: groups of every group norm.
      images: number of training pictures used, from the start of the data set.
      steps: optimizer steps.
      batch: crops per step.
      crop: side of a crop in pixels. Small crops make batches more varied than whole pictures.
      learning_rate: peak of the schedule: linear warmup over a tenth of the steps, then a cosine.
      kl_weight: weight of the KL divergence from a standard normal, in nats per latent value. The mean squared error
        has weight 1.
      seed: seed of initialisation, batches and noise.
    """

    channels: tuple[int, ...] = (8, 16, 32, 64)
    latent_channels: int = 16
    norm_groups: int = 4
    images: int = 3000
    steps: int = 1000
    batch: int = 16
    crop: int = 32
    learning_rate: float = 0.02
    kl_weight: float = 1e-4
    seed: int = 0

    @property
    def architecture(self) -> AutoencoderConfig:
        """The autoencoder's config with scaling factor 1 and shift 0, which `fit` replaces."""
        attends = (False,) * len(self.channels)
        return AutoencoderConfig(
            channels=self.channels,
            layers_per_block=1,
            latent_channels=self.latent_channels,
            norm_groups=self.norm_groups,
            scaling_factor=1.0,
            shift_factor=0.0,
            down_attention=attends,
            up_attention=attends,
            mid_attention=False,
        )


def write_autoencoder(
    folder: str | Path, dataset: str | Path, config: FitConfig | None = None, progress: Progress = lambda _: None
) -> bool:
    """Fits an autoencoder to a data set's training pictures and saves it in diffusers' layout, unless it exists.

    Args:
      folder: receives `config.json` and `diffusion_pytorch_model.safetensors`.
      dataset: folder that `write_dataset` made.
      progress: called with a line about the loss every 100 steps.

    Returns:
      Whether an autoencoder was fitted.

    Raises:
      UserError: `folder` holds something else or cannot be written.
    """
    config = config or FitConfig()
    dataset = location(dataset)
    settings = {**to_dict(config), "content": file_hash(dataset / "pretrain.json", dataset / "stamp.json", __file__)}

    def make(target: Path) -> None:
        records = json.loads((dataset / "pretrain.json").read_text())[: config.images]
        images = load_images([dataset / "images" / record["image"] for record in records])
        architecture, params = fit(images, config, progress)
        save_diffusers(architecture, params, target)

    return make_once(location(folder), settings, make)


def load_images(paths: list[Path]) -> UInt8[np.ndarray, "items height width 3"]:
    """Reads pictures of equal size into one array."""
    return np.stack([np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB")) for path in paths])


def to_float(images: Array | np.ndarray) -> Float[Array, "items height width 3"]:
    """Maps uint8 pictures to [-1, 1]."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1.0


def fit(
    images: UInt8[np.ndarray, "items height width 3"], config: FitConfig, progress: Progress = lambda _: None
) -> tuple[AutoencoderConfig, Params]:
    """Fits an autoencoder.

    Returns:
      The config, with shift and scaling factors that give normalised latents mean 0 and variance 1 over the pictures,
      and the parameters.
    """
    module = Autoencoder(config.architecture)
    schedule = optax.cosine_onecycle_schedule(config.steps, config.learning_rate, 0.1, 20, 100)
    # Muon converges in fewer steps than Adam.
    muon = optax.contrib.muon(schedule, adam_b2=0.98, muon_weight_dimension_numbers=_muon_dimensions)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), muon)

    def loss_of(params: Params, images: Array, key: Array):
        posterior = module.apply({"params": params}, images, method="encode")
        latents = posterior.sample(jax.random.normal(key, posterior.mean.shape))
        error = jnp.mean(jnp.square(module.apply({"params": params}, latents, method="decode") - images))
        variance = jnp.exp(posterior.logvar)
        divergence = 0.5 * jnp.mean(jnp.square(posterior.mean) + variance - 1.0 - posterior.logvar)
        return error + config.kl_weight * divergence, error

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, state: optax.OptState, crops: Array, key: Array):
        gradients, error = jax.grad(loss_of, has_aux=True)(params, to_float(crops), key)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, error

    init_key, noise_key = jax.random.split(jax.random.key(config.seed))
    params = _gentle_start(module.init(init_key, jnp.zeros((1, config.crop, config.crop, 3)))["params"])
    state = optimizer.init(params)
    rng = np.random.default_rng(config.seed)
    for i in range(config.steps):
        crops = _random_crops(images, config.batch, config.crop, rng)
        params, state, error = step(params, state, crops, jax.random.fold_in(noise_key, i))
        if (i + 1) % 100 == 0 or i + 1 == config.steps:
            progress(f"autoencoder: step {i + 1} of {config.steps}, mean squared error {float(error):.4f}")
    return _scaled(config.architecture, params, images), params


def _muon_dimensions(params: Params) -> Params:
    """Tells Muon to treat each kernel [3, 3, in, out] as a matrix [3 * 3 * in, out], and leaves vectors to Adam."""
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3)
    return jax.tree.map(lambda leaf: matrix if leaf.ndim == 4 else None, params)


def _gentle_start(params: Params) -> Params:
    """Makes residual blocks start as the identity and the posterior with little noise, which speeds up training."""
    flat = {path: leaf * 0 if "/conv2/" in path else leaf for path, leaf in flatten(params).items()}
    kernel, bias = flat["encoder/conv_out/kernel"], flat["encoder/conv_out/bias"]
    latent = bias.shape[0] // 2
    flat["encoder/conv_out/kernel"] = kernel.at[..., latent:].set(0.0)
    flat["encoder/conv_out/bias"] = bias.at[latent:].set(_FIRST_LOGVAR)
    return unflatten(flat)


def _random_crops(images: np.ndarray, batch: int, crop: int, rng: np.random.Generator) -> np.ndarray:
    chosen = rng.integers(len(images), size=batch)
    tops, lefts = rng.integers(images.shape[1] - crop + 1, size=(2, batch))
    return np.stack(
        [images[i, t : t + crop, s : s + crop] for i, t, s in zip(chosen, tops, lefts, strict=True)],
    )


def _scaled(architecture: AutoencoderConfig, params: Params, images: np.ndarray) -> AutoencoderConfig:
    encode = jax.jit(lambda x: Autoencoder(architecture).apply({"params": params}, to_float(x), method="encode"))
    posteriors = [encode(images[i : i + 64]) for i in range(0, min(len(images), 512) // 64 * 64 or 1, 64)]
    mean = np.concatenate([np.asarray(p.mean, np.float64) for p in posteriors])
    noise = np.concatenate([np.exp(np.asarray(p.logvar, np.float64)) for p in posteriors])
    deviation = float(np.sqrt(mean.var() + noise.mean()))
    return dataclasses.replace(architecture, scaling_factor=1.0 / deviation, shift_factor=float(mean.mean()))


def save_diffusers(architecture: AutoencoderConfig, params: Params, folder: Path) -> None:
    """Writes `config.json` and `diffusion_pytorch_model.safetensors` (float32) in the layout of AutoencoderKL."""
    (folder / "config.json").write_text(json.dumps(diffusers_settings(architecture), indent=2) + "\n")
    leaves = flatten(params)
    pieces = expand(table(architecture), {path: leaf.shape for path, leaf in leaves.items()})
    with SafetensorsWriter(folder, _STEM, {piece.hf_key: ("F32", piece.shape) for piece in pieces}) as writer:
        for piece in pieces:
            values = piece.transform.to_hf(np.asarray(leaves[piece.path], np.float32))
            writer.write(piece.hf_key, np.ascontiguousarray(values))


def diffusers_settings(architecture: AutoencoderConfig) -> dict[str, Any]:
    """The contents of diffusers' `config.json` for an autoencoder."""
    down = ["AttnDownEncoderBlock2D" if attends else "DownEncoderBlock2D" for attends in architecture.down_attention]
    up = ["AttnUpDecoderBlock2D" if attends else "UpDecoderBlock2D" for attends in architecture.up_attention]
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": list(architecture.channels),
        "down_block_types": down,
        "up_block_types": up,
        "latent_channels": architecture.latent_channels,
        "layers_per_block": architecture.layers_per_block,
        "mid_block_add_attention": architecture.mid_attention,
        "norm_num_groups": architecture.norm_groups,
        "scaling_factor": architecture.scaling_factor,
        "shift_factor": architecture.shift_factor,
        "use_quant_conv": architecture.quant_conv,
        "use_post_quant_conv": architecture.post_quant_conv,
    }
