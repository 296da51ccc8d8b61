"""Pictures from visual outputs: the denoiser samples latents, the autoencoder decodes them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped, UInt8

from ross_jax.models.autoencoder import Autoencoder
from ross_jax.models.ross import Ross, RossConfig, normalise
from ross_jax.objectives.diffusion import Diffusion, make_diffusion
from ross_jax.objectives.reconstruction import DenoiseObjective, target_pixels, ungroup_latents
from ross_jax.tree import merge

STEPS = 50
"""Sampling steps, respaced from the process of training."""
_DRAWN = ("tokens", "positions", "segments", "images", "image_start")


def visual_outputs(
    config: RossConfig, params: Any, batch: Mapping[str, Shaped[Array, "..."]], dtype: str = "float32"
) -> Float[Array, "rows images tokens embed"]:
    """What the language model holds at the positions of a batch's pictures; zeros for empty slots.

    Args:
      params: with `vision`, `projector`, `language`.
      batch: with `tokens`, `positions`, `segments`, `images` (uint8), `image_start`.
    """
    images = normalise(config, batch["images"], dtype)
    names = ("tokens", "positions", "segments")
    arguments = [batch[name] for name in names]
    return Ross(config, dtype).apply({"params": params}, *arguments, images, batch["image_start"]).visual_outputs


def sample_pixels(
    config: RossConfig,
    params: Any,
    outputs: Float[Array, "items tokens embed"],
    key: Array,
    process: Diffusion | None = None,
    temperature: float = 1.0,
) -> Float[Array, "items side side 3"]:
    """Pictures in [-1, 1], sampled given visual outputs by ancestral sampling of `STEPS` steps.

    Args:
      params: with `denoiser` and `autoencoder`.
      key: of all noise.
      process: another one than the respaced process of training.
      temperature: of the noise added at each step.
    """
    process = process or make_diffusion(respacing=str(STEPS))
    objective = DenoiseObjective(config)
    shape = (len(outputs), config.denoiser.num_tokens, config.denoiser.latent_size)
    first, rest = jax.random.split(key)
    initial, noise = jax.random.normal(first, shape), jax.random.normal(rest, (process.steps, *shape))
    tokens = objective.reconstruct(params, outputs.astype(jnp.float32), initial, noise, process, temperature)
    return decode_latents(config, params, ungroup_latents(tokens, objective.window))


def decode_latents(
    config: RossConfig, params: Any, latents: Float[Array, "items height width channels"]
) -> Float[Array, "items side side 3"]:
    """Pictures in [-1, 1] of latents on the denoiser's scale."""
    module = Autoencoder(config.autoencoder)
    pixels = module.apply({"params": params["autoencoder"]}, module.denormalise(latents), method="decode")
    return jnp.clip(pixels, -1.0, 1.0)


def autoencode(
    config: RossConfig, params: Any, images: UInt8[Array, "items height width 3"]
) -> tuple[Float[Array, "items side side 3"], Float[Array, "items side side 3"]]:
    """What a reconstruction is held against, in [-1, 1]: the pictures at the autoencoder's size, and what it makes of
    them (the ceiling of any reconstruction), from the posterior's mean."""
    pixels = target_pixels(config, normalise(config, images))
    posterior = Autoencoder(config.autoencoder).apply({"params": params["autoencoder"]}, pixels, method="encode")
    module = Autoencoder(config.autoencoder)
    return pixels, decode_latents(config, params, module.normalise(posterior.mean))


class PictureDrawer:
    """Draws some pictures of a training batch beside their reconstruction, for TensorBoard.

    One row for each: picture, reconstruction from its visual outputs, the autoencoder's own. The arguments of a call
    are those of the training loop's hooks: (step, state, batch), the state with `params` and `frozen`.
    """

    def __init__(self, config: RossConfig, mesh: Mesh, dtype: str = "float32", count: int = 4, seed: int = 0):
        """Args: dtype of activations; at most `count` pictures; seed of the noise, the same at every step."""
        key = jax.random.key(seed)

        def draw(params: Any, frozen: Any, batch: dict[str, Array]) -> UInt8[Array, "height width 3"]:
            tree = merge(params, frozen)
            rows, slots = _first_pictures(batch, count)
            chosen = {name: batch[name][rows] for name in _DRAWN}
            outputs = visual_outputs(config, tree, chosen, dtype)[jnp.arange(len(rows)), slots]
            made = sample_pixels(config, tree, outputs, key)
            original, ceiling = autoencode(config, tree, chosen["images"][jnp.arange(len(rows)), slots])
            pixels = rearrange(jnp.stack([original, made, ceiling]), "column row h w c -> (row h) (column w) c")
            return jnp.round((pixels + 1.0) * 127.5).astype(jnp.uint8)

        self._draw = jax.jit(draw, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, step: int, state: Any, batch: Mapping[str, Array]) -> UInt8[np.ndarray, "height width 3"]:
        return np.asarray(self._draw(state.params, state.frozen, {name: batch[name] for name in _DRAWN}))


def _first_pictures(batch: Mapping[str, Array], count: int) -> tuple[Int[Array, " items"], Int[Array, " items"]]:
    """Row and slot of the first `count` pictures; where a batch has fewer, of empty slots after them."""
    rows, slots = batch["image_start"].shape
    empty = (batch["image_start"] >= batch["tokens"].shape[1]).reshape(-1)
    order = jnp.argsort(empty, stable=True)[: min(count, rows * slots)]
    return order // slots, order % slots
