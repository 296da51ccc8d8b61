"""Pictures from visual outputs: the denoiser samples latents, the autoencoder decodes them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped, UInt8

from ross_jax.data.conversation import IMAGE_MARKER
from ross_jax.data.encoders import build_prompt_encoder
from ross_jax.inference.model import Model
from ross_jax.inference.prompts import Pictures, expand_prompt, prompt_batches
from ross_jax.models.ross import Ross, RossConfig, build_autoencoder, normalise
from ross_jax.objectives.diffusion import make_diffusion, sample_ancestral
from ross_jax.objectives.reconstruction import DenoiseObjective, target_pixels, ungroup_latents
from ross_jax.objectives.samplers import sample_ddim, sample_dpm
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


def outputs_of_pictures(
    model: Model, pictures: Pictures, rows: int = 8, template: str | None = None, dtype: str = "float32"
) -> Float[np.ndarray, "pictures tokens embed"]:
    """Visual outputs of pictures on their own: an empty question, of which only what stands before the picture counts.

    Args:
      model: with vision encoder, projector and language model.
      pictures: resized to the encoder's size.
      rows: pictures that are computed at once.
      template: of the conversation; None: the model's own.
      dtype: of activations.

    Raises:
      UserError: no template, a tokenizer that does not fit.
    """
    encode = build_prompt_encoder(model.choose_template(template), model.tokenizer())
    record = {"id": "picture", "image": "picture", "conversations": [{"from": "human", "value": IMAGE_MARKER}]}
    prompts = [expand_prompt(model, encode, record, [picture]) for picture in pictures]
    vision = model.config.vision
    run = jax.jit(lambda params, batch: visual_outputs(model.config, params, batch, dtype)[:, 0])
    batches = prompt_batches(prompts, [[each] for each in pictures], rows, vision.num_tokens, vision.image_size)
    return np.concatenate([np.asarray(run(model.params, batch)) for batch in batches])[: len(pictures)]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How latents are sampled.

    Attributes:
      sampler: `ddpm`, ancestral, as the reference; `ddim`; `dpm`, DPM-Solver++(2M).
      steps: respaced from the process of training.
      temperature: of the noise that `ddpm` adds at each step.
    """

    sampler: Literal["ddpm", "ddim", "dpm"] = "ddpm"
    steps: int = 50
    temperature: float = 1.0


def sample_latents(
    config: RossConfig, params: Any, outputs: Float[Array, "items tokens embed"], key: Array, sampling: Sampling
) -> Float[Array, "items height width channels"]:
    """Latents on the denoiser's scale, sampled given visual outputs. One scan.

    Args:
      params: with `denoiser`.
      key: of all noise.

    Raises:
      ConfigError: a number of steps that the process cannot be respaced to.
    """
    process = make_diffusion(respacing=str(sampling.steps))
    objective = DenoiseObjective(config)
    predict = objective.predictor(params, outputs.astype(jnp.float32))
    shape = (len(outputs), config.denoiser.num_tokens, config.denoiser.latent_size)
    first, rest = jax.random.split(key)
    initial = jax.random.normal(first, shape)
    if sampling.sampler == "ddpm":
        noise = jax.random.normal(rest, (process.steps, *shape))
        tokens = sample_ancestral(process, predict, initial, noise, sampling.temperature)[-1]
    else:
        tokens = {"ddim": sample_ddim, "dpm": sample_dpm}[sampling.sampler](process, predict, initial)
    return ungroup_latents(tokens, objective.window)


def sample_pixels(
    config: RossConfig,
    params: Any,
    outputs: Float[Array, "items tokens embed"],
    key: Array,
    sampling: Sampling = Sampling(),
) -> Float[Array, "items side side 3"]:
    """Pictures in [-1, 1]: `sample_latents`, decoded. `params` with `denoiser` and `autoencoder`."""
    return decode_latents(config, params, sample_latents(config, params, outputs, key, sampling))


def decode_latents(
    config: RossConfig, params: Any, latents: Float[Array, "items height width channels"]
) -> Float[Array, "items side side 3"]:
    """Pictures in [-1, 1] of latents on the denoiser's scale."""
    module = build_autoencoder(config.autoencoder)
    pixels = module.apply({"params": params["autoencoder"]}, module.denormalise(latents), method="decode")
    return jnp.clip(pixels, -1.0, 1.0)


def target_pictures(
    config: RossConfig, images: UInt8[Array | np.ndarray, "items height width 3"]
) -> Float[Array, "items side side 3"]:
    """The pictures in [-1, 1] at the autoencoder's size: what a reconstruction is held against."""
    return target_pixels(config, normalise(config, jnp.asarray(images)))


def encode_latents(
    config: RossConfig, params: Any, images: UInt8[Array | np.ndarray, "items height width 3"]
) -> Float[Array, "items rows columns channels"]:
    """The mean of each picture's posterior, on the denoiser's scale. `params` with `autoencoder`."""
    module = build_autoencoder(config.autoencoder)
    pixels = target_pictures(config, images)
    return module.normalise(module.apply({"params": params["autoencoder"]}, pixels, method="encode").mean)


def autoencode(
    config: RossConfig, params: Any, images: UInt8[Array | np.ndarray, "items height width 3"]
) -> Float[Array, "items side side 3"]:
    """The autoencoder's own reconstruction in [-1, 1], the ceiling of any other."""
    return decode_latents(config, params, encode_latents(config, params, images))


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
            images = chosen["images"][jnp.arange(len(rows)), slots]
            columns = [target_pictures(config, images), made, autoencode(config, tree, images)]
            pixels = rearrange(jnp.stack(columns), "column row h w c -> (row h) (column w) c")
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
