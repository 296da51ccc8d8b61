"""Visual outputs of pictures, and the bounds that a reconstruction from them lies between."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped, UInt8

from ross_jax.data.batches import expand
from ross_jax.data.encoders import build_image_encoder
from ross_jax.inference.model import Model
from ross_jax.inference.prompts import Images, prompt_batches
from ross_jax.models.ross import Ross, RossConfig, normalise
from ross_jax.objectives.reconstruction import reconstructor
from ross_jax.objectives.targets import decode, encode, normalised_latents, target_pixels
from ross_jax.training.callback import Callback
from ross_jax.tree import merge

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


def outputs_of_images(
    model: Model, images: Images, rows: int = 8, template: str | None = None, dtype: str = "float32"
) -> Float[np.ndarray, "images tokens embed"]:
    """Visual outputs of pictures on their own, each behind an empty question, as in training without a text loss.

    Args:
      model: with vision encoder, projector and language model.
      images: resized to the encoder's size.
      rows: pictures that are computed at once.
      template: of the conversation; None: the model's own.
      dtype: of activations.

    Raises:
      UserError: no template, a tokenizer that does not fit.
    """
    encode = build_image_encoder(model.choose_template(template), model.tokenizer())
    vision = model.config.vision
    prompts = [expand(encode({"id": "picture", "image": "picture"}), vision.num_tokens)] * len(images)
    run = jax.jit(lambda params, batch: visual_outputs(model.config, params, batch, dtype)[:, 0])
    batches = prompt_batches(prompts, [[each] for each in images], rows, vision.num_tokens, vision.image_size)
    return np.concatenate([np.asarray(run(model.params, batch)) for batch in batches])[: len(images)]


def target_images(
    config: RossConfig, images: UInt8[Array | np.ndarray, "items height width 3"]
) -> Float[Array, "items side side 3"]:
    """The pictures in [-1, 1] at the autoencoder's size: what a reconstruction is held against."""
    return target_pixels(config, normalise(config, jnp.asarray(images)))


def encode_latents(
    config: RossConfig, params: Any, images: UInt8[Array | np.ndarray, "items height width 3"]
) -> Float[Array, "items rows columns channels"]:
    """The mean of each picture's posterior, on the scale that models see. `params` with `autoencoder`."""
    return normalised_latents(config, encode(config, params, normalise(config, jnp.asarray(images))).mean)


def autoencode(
    config: RossConfig, params: Any, images: UInt8[Array | np.ndarray, "items height width 3"]
) -> Float[Array, "items side side 3"]:
    """The autoencoder's own reconstruction in [-1, 1], the ceiling of any other from latents."""
    return jnp.clip(decode(config, params, encode_latents(config, params, images)), -1.0, 1.0)


class ImageDrawer(Callback):
    """Draws some images of a training batch beside their reconstruction, for TensorBoard.

    One row per image: the image, its reconstruction from visual outputs, and the autoencoder's if the model has one.
    """

    def __init__(self, config: RossConfig, mesh: Mesh, dtype: str = "float32", count: int = 4, seed: int = 0):
        """Args: dtype of activations; at most `count` pictures; seed of the noise, the same at every step."""
        keys = jax.random.split(jax.random.key(seed), count)
        objective = reconstructor(config)

        def draw(params: Any, frozen: Any, batch: dict[str, Array]) -> UInt8[Array, "height width 3"]:
            tree = merge(params, frozen)
            rows, slots = _first_images(batch, count)
            chosen = {name: batch[name][rows] for name in _DRAWN}
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
        return np.asarray(self._draw(state.params, state.frozen, {name: batch[name] for name in _DRAWN}))


def _first_images(batch: Mapping[str, Array], count: int) -> tuple[Int[Array, " items"], Int[Array, " items"]]:
    """Row and slot of the first `count` pictures; where a batch has fewer, of empty slots after them."""
    rows, slots = batch["image_start"].shape
    empty = (batch["image_start"] >= batch["tokens"].shape[1]).reshape(-1)
    order = jnp.argsort(empty, stable=True)[: min(count, rows * slots)]
    return order // slots, order % slots
