"""What reconstruction is held against: pixels, the autoencoder's latents, a teacher's features; token by token."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ross_jax.models.autoencoder import Posterior
from ross_jax.models.layers import layer_norm
from ross_jax.models.ross import TARGET_PIXELS, RossConfig, build_autoencoder
from ross_jax.models.vision import VisionEncoder
from ross_jax.objectives.objective import Params
from ross_jax.sharding import partition

PIXELS_AT_ONCE = 2**16
"""Pixels that the autoencoder sees at once on a device, unless a picture alone has more."""
FEATURE_EPS = 1e-6
"""Epsilon of the affine-free LayerNorm on a teacher's features."""


def target_pixels(
    config: RossConfig, images: Float[Array, "batch height width 3"]
) -> Float[Array, "batch side side 3"]:
    """Normalised pictures back to [-1, 1], resized bilinearly without antialiasing to 16 pixels per picture token."""
    return _resize(_unit_pixels(config, images), config.target_size)


def _unit_pixels(config: RossConfig, images: Float[Array, "batch height width 3"]):
    mean, std = jnp.asarray(config.image_mean, jnp.float32), jnp.asarray(config.image_std, jnp.float32)
    return jnp.clip((images.astype(jnp.float32) * std + mean) * 2.0 - 1.0, -1.0, 1.0)


def _resize(images: Float[Array, "batch height width channels"], size: int):
    shape = (images.shape[0], size, size, images.shape[-1])
    return jax.image.resize(images, shape, "linear", antialias=False)


def group_latents(
    latents: Float[Array, "*batch height width channels"], size: int
) -> Float[Array, "*batch tokens latent"]:
    """Windows of `size` x `size` latents as tokens, row by row; channel index is `c * size^2 + row * size + column`."""
    return rearrange(latents, "... (h i) (w j) c -> ... (h w) (c i j)", i=size, j=size)


def ungroup_latents(
    tokens: Float[Array, "*batch tokens latent"], size: int
) -> Float[Array, "*batch height width channels"]:
    """The inverse of `group_latents` for a square picture."""
    side = round(tokens.shape[-2] ** 0.5)
    return rearrange(tokens, "... (h w) (c i j) -> ... (h i) (w j) c", h=side, i=size, j=size)


def pixel_tokens(pixels: Float[Array, "*batch side side 3"]) -> Float[Array, "*batch tokens values"]:
    """Pictures as one token per 16 x 16 pixels, grouped as latents are."""
    return group_latents(pixels, TARGET_PIXELS)


def tokens_to_pixels(tokens: Float[Array, "*batch tokens values"]) -> Float[Array, "*batch side side 3"]:
    """The inverse of `pixel_tokens`."""
    return ungroup_latents(tokens, TARGET_PIXELS)


def encode(
    config: RossConfig,
    params: Params,
    images: Float[Array, "batch height width 3"],
    wanted: Bool[Array, " batch"] | None = None,
) -> Posterior:
    """The autoencoder's posterior of normalised pictures, computed in the type of its weights.

    Args:
      params: with `autoencoder`.
      wanted: whose is looked at; others may be zeros, which take no time. None: everyone's.
    """
    module = build_autoencoder(config.autoencoder, _dtype(params))

    def run(autoencoder: Params, images: Array) -> Posterior:
        return module.apply({"params": autoencoder}, target_pixels(config, images), method="encode")

    return _few_at_once(config, run, params["autoencoder"], images, wanted)


def normalised_latents(
    config: RossConfig, latents: Float[Array, "*batch rows columns channels"]
) -> Float[Array, "*batch rows columns channels"]:
    """Raw latents on the scale that models see."""
    return build_autoencoder(config.autoencoder).normalise(latents)


def decode(
    config: RossConfig, params: Params, latents: Float[Array, "batch rows columns channels"], remat: bool = False
) -> Float[Array, "batch side side 3"]:
    """Pictures, about [-1, 1], of latents on the scale that models see; computed as by `encode`."""
    module = build_autoencoder(config.autoencoder, _dtype(params), remat)

    def run(autoencoder: Params, latents: Array) -> Array:
        return module.apply({"params": autoencoder}, module.denormalise(latents), method="decode")

    return _few_at_once(config, run, params["autoencoder"], latents)


def _dtype(params: Params) -> DTypeLike:
    return jax.tree.leaves(params["autoencoder"])[0].dtype


def _few_at_once(
    config: RossConfig,
    run: Callable[[Params, Array], Any],
    autoencoder: Params,
    items: Array,
    wanted: Array | None = None,
) -> Any:
    """`run(autoencoder, items)`, a few items after another, on each device its own; zeros if none of them is wanted.

    A picture fills a device. XLA for TPU cuts several, but fewer than eight, into strips with borders, which takes
    nearly three times as long, twice as long to compile, and sixteen times the memory.
    """
    most = max(1, PIXELS_AT_ONCE // config.target_size**2)

    def some(autoencoder: Params, items: Array, wanted: Array | None) -> Any:
        if wanted is None:
            return run(autoencoder, items)
        made = jax.eval_shape(run, autoencoder, items)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), made)
        return jax.lax.cond(wanted.any(), run, lambda *_: zeros, autoencoder, items)

    def local(autoencoder: Params, items: Array, wanted: Array | None) -> Any:
        count = items.shape[0]
        at_once = next((n for n in range(min(most, count), 0, -1) if count % n == 0), count)
        if at_once == count:
            return some(autoencoder, items, wanted)
        parts = jax.tree.map(lambda x: x.reshape(-1, at_once, *x.shape[1:]), (items, wanted))
        outputs = jax.lax.map(lambda part: some(autoencoder, *part), parts)
        return jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), outputs)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(autoencoder, items, wanted)
    split = partition(items.shape[:1], ("images",), mesh)
    specs = (jax.sharding.PartitionSpec(), split, split)
    return jax.shard_map(local, in_specs=specs, out_specs=split, check_vma=False)(autoencoder, items, wanted)


def teacher_features(
    config: RossConfig, params: Params, images: Float[Array, "batch height width 3"], dtype: Any = jnp.bfloat16
) -> Float[Array, "batch tokens features"]:
    """A teacher's features of normalised pictures, on the encoder's grid, float32 and layer-normalised.

    The teacher sees the picture at its own size; where its grid is another one, features are resized bilinearly.

    Args:
      params: with `teacher`.
      dtype: of the teacher's activations.
    """
    teacher, grid = config.teacher, config.vision.grid
    mean, std = jnp.asarray(config.teacher_mean, jnp.float32), jnp.asarray(config.teacher_std, jnp.float32)
    pixels = jax.image.resize(
        (_unit_pixels(config, images) + 1.0) / 2.0,
        (images.shape[0], teacher.image_size, teacher.image_size, 3),
        "linear",
    )
    features = VisionEncoder(teacher, dtype).apply({"params": params["teacher"]}, (pixels - mean) / std)
    features = rearrange(features.astype(jnp.float32), "b (h w) c -> b h w c", h=teacher.grid)
    if teacher.grid != grid:
        features = _resize(features, grid)
    return layer_norm(FEATURE_EPS, jnp.float32, affine=False).apply({}, rearrange(features, "b h w c -> b (h w) c"))
