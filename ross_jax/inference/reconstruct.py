"""Visual outputs, reconstructions from them, and the bounds that reconstructions lie between.

batch ─ visual_outputs ─► float[images, N, E] ─ reconstruct ─► images in [-1, 1]
images ─ target_images ─► images in [-1, 1]                     what a reconstruction is compared with
images ─ autoencode ────► images in [-1, 1]                     upper bound of reconstructions from latents
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped, UInt8

from ross_jax.config import required
from ross_jax.models.layers import apply
from ross_jax.models.ross import Ross, RossConfig, normalise
from ross_jax.objectives.objective import DEFAULT_SAMPLING, Reconstruction, Sampling
from ross_jax.objectives.reconstruction import reconstructor
from ross_jax.objectives.targets import decode, encode, normalised_latents, target_pixels
from ross_jax.training.callback import Callback
from ross_jax.tree import merge

_INPUTS = ("tokens", "positions", "segments", "images", "image_start")


def visual_outputs(
    config: RossConfig, params: Any, batch: Mapping[str, Shaped[Array, "..."]], dtype: str = "float32"
) -> Float[Array, "rows images tokens embed"]:
    """Hidden states of the language model at the image positions of a batch; zeros for empty slots.

    Args:
      config: sizes of the components.
      params: parameters with `vision`, `projector` and `language`.
      batch: `tokens`, `positions`, `segments`, `images` (uint8) and `image_start`.
      dtype: dtype of activations.
    """
    images = normalise(config, batch["images"], dtype)
    names = ("tokens", "positions", "segments")
    arguments = [batch[name] for name in names]
    return apply(Ross(config, dtype), params, *arguments, images, batch["image_start"]).visual_outputs


def reconstruct(
    config: RossConfig,
    params: Any,
    outputs: Float[np.ndarray, "images tokens embed"],
    sampling: Sampling = DEFAULT_SAMPLING,
    seed: int = 0,
    rows: int = 8,
) -> Reconstruction:
    """Reconstructs images from their visual outputs, `rows` at once.

    Args:
      config: sizes of a model that makes images.
      params: parameters with those that its kind of reconstruction needs.
      outputs: visual outputs.
      sampling: how a denoiser samples.
      seed: seed of the noise. An image's noise depends on its index alone.
      rows: images that are computed at once.

    Returns:
      NumPy arrays.
    """
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(np.arange(len(outputs)))
    rows = min(rows, len(outputs))
    parts = []
    for first in range(0, len(outputs), rows):
        # The last rows are computed again where too few are left, so that one program serves all.
        part = np.minimum(np.arange(first, first + rows), len(outputs) - 1)
        parts.append(jax.device_get(_reconstruct(config, params, outputs[part], keys[part], sampling)))
    pixels, latents = zip(*parts, strict=True)
    joined = None if latents[0] is None else np.concatenate(latents)[: len(outputs)]
    return Reconstruction(np.concatenate(pixels)[: len(outputs)], joined)


@partial(jax.jit, static_argnames=("config", "sampling"))
def _reconstruct(config: RossConfig, params: Any, outputs: Array, keys: Array, sampling: Sampling) -> Reconstruction:
    return required(required(reconstructor(config)).reconstruct(params, params, outputs, keys, sampling))


def target_images(
    config: RossConfig, images: UInt8[Array | np.ndarray, "items height width 3"]
) -> Float[Array, "items side side 3"]:
    """Images in [-1, 1] at the size of reconstructions, which are compared with them."""
    return target_pixels(config, normalise(config, jnp.asarray(images)))


def encode_latents(
    config: RossConfig, params: Any, images: UInt8[Array | np.ndarray, "items height width 3"]
) -> Float[Array, "items rows columns channels"]:
    """Mean of each image's posterior, on the scale that models see. `params` needs `autoencoder`."""
    return normalised_latents(config, encode(config, params, normalise(config, jnp.asarray(images))).mean)


def autoencode(
    config: RossConfig, params: Any, images: UInt8[Array | np.ndarray, "items height width 3"]
) -> Float[Array, "items side side 3"]:
    """The autoencoder's own reconstruction in [-1, 1], an upper bound of all others from latents."""
    return jnp.clip(decode(config, params, encode_latents(config, params, images)), -1.0, 1.0)


class ImageDrawer(Callback):
    """Draws images of a training batch beside their reconstructions, for TensorBoard.

    A row of the drawing shows an image, its reconstruction and, if the model has an autoencoder, the autoencoder's own
    reconstruction.
    """

    def __init__(self, config: RossConfig, mesh: Mesh, dtype: str = "float32", count: int = 4, seed: int = 0):
        """Prepares the drawing.

        Args:
          config: sizes of a model that makes images.
          mesh: mesh of the run.
          dtype: dtype of activations.
          count: number of images; fewer are drawn from a batch with fewer slots.
          seed: seed of the noise, which does not change from step to step.
        """
        keys = jax.random.split(jax.random.key(seed), count)
        objective = reconstructor(config)

        def draw(params: Any, frozen: Any, batch: dict[str, Array]) -> UInt8[Array, "height width 3"]:
            tree = merge(params, frozen)
            rows, slots = _first_images(batch, count)
            chosen = {name: batch[name][rows] for name in _INPUTS}
            outputs = visual_outputs(config, tree, chosen, dtype)[jnp.arange(len(rows)), slots]
            made = objective.reconstruct(tree, tree, outputs.astype(jnp.float32), keys[: len(rows)]).pixels
            images = chosen["images"][jnp.arange(len(rows)), slots]
            columns = [target_images(config, images), made]
            if config.autoencoder is not None:
                columns.append(autoencode(config, tree, images))
            pixels = rearrange(jnp.stack(columns), "column row h w c -> (row h) (column w) c")
            return jnp.round((pixels + 1.0) * 127.5).astype(jnp.uint8)

        self._draw = jax.jit(draw, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def images(self, step: int, state: Any, batch: Mapping[str, Array]) -> UInt8[np.ndarray, "height width 3"]:
        """The drawn grid. `state` has `params` and `frozen`."""
        return np.asarray(self._draw(state.params, state.frozen, {name: batch[name] for name in _INPUTS}))


def _first_images(batch: Mapping[str, Array], count: int) -> tuple[Int[Array, " items"], Int[Array, " items"]]:
    """Row and slot of the first `count` images; in a batch with fewer, empty slots follow them."""
    rows, slots = batch["image_start"].shape
    empty = (batch["image_start"] >= batch["tokens"].shape[1]).reshape(-1)
    order = jnp.argsort(empty, stable=True)[: min(count, rows * slots)]
    return order // slots, order % slots
