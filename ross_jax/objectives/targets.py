"""Targets of the objectives: pixels, the autoencoder's latents, a teacher's features; token by token."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ross_jax.config import required, to_dict
from ross_jax.models.autoencoder import Posterior
from ross_jax.models.layers import apply, layer_norm
from ross_jax.models.ross import TARGET_PIXELS, RossConfig, build_autoencoder
from ross_jax.objectives.objective import Params
from ross_jax.sharding import partition

PIXELS_AT_ONCE = 2**16
"""Most pixels that the autoencoder sees at once on a device, unless a single image has more."""
FEATURE_EPS = 1e-6
"""Epsilon of the affine-free LayerNorm on a teacher's features."""


def target_pixels(
    config: RossConfig, images: Float[Array, "batch height width 3"]
) -> Float[Array, "batch side side 3"]:
    """Normalised images back to [-1, 1], resized bilinearly without antialiasing to 16 pixels per image token."""
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
    """The inverse of `group_latents` for a square image."""
    side = round(tokens.shape[-2] ** 0.5)
    return rearrange(tokens, "... (h w) (c i j) -> ... (h i) (w j) c", h=side, i=size, j=size)


def pixel_tokens(pixels: Float[Array, "*batch side side 3"]) -> Float[Array, "*batch tokens values"]:
    """Images as one token per 16 x 16 pixels, grouped as latents are."""
    return group_latents(pixels, TARGET_PIXELS)


def tokens_to_pixels(tokens: Float[Array, "*batch tokens values"]) -> Float[Array, "*batch side side 3"]:
    """The inverse of `pixel_tokens`."""
    return ungroup_latents(tokens, TARGET_PIXELS)


def encode(
    config: RossConfig,
    params: Params,
    images: Float[Array, "batch height width 3"],
    mask: Bool[Array, " batch"] | None = None,
) -> Posterior:
    """The autoencoder's posterior of normalised images, computed in the type of its weights.

    Args:
      params: with `autoencoder`.
      mask: posteriors are only computed where True, and may be zeros elsewhere. None computes all.
    """
    module = build_autoencoder(required(config.autoencoder), _dtype(params))

    def run(autoencoder: Params, images: Array) -> Posterior:
        return apply(module, autoencoder, target_pixels(config, images), method="encode")

    return _few_at_once(config, run, params["autoencoder"], images, mask)


def normalised_latents(
    config: RossConfig, latents: Float[Array, "*batch rows columns channels"]
) -> Float[Array, "*batch rows columns channels"]:
    """Raw latents on the scale that models see."""
    return build_autoencoder(required(config.autoencoder)).normalise(latents)


def decode(
    config: RossConfig, params: Params, latents: Float[Array, "batch rows columns channels"], remat: bool = False
) -> Float[Array, "batch side side 3"]:
    """Images, about [-1, 1], from latents on the scale that models see; computed in the type of the weights."""
    module = build_autoencoder(required(config.autoencoder), _dtype(params), remat)

    def run(autoencoder: Params, latents: Array) -> Array:
        return apply(module, autoencoder, module.denormalise(latents), method="decode")

    return _few_at_once(config, run, params["autoencoder"], latents)


def _dtype(params: Params) -> DTypeLike:
    return jax.tree.leaves(params["autoencoder"])[0].dtype


def _few_at_once(
    config: RossConfig,
    run: Callable[[Params, Array], Any],
    autoencoder: Params,
    items: Array,
    mask: Array | None = None,
) -> Any:
    """`run(autoencoder, items)`, a few items at a time, each device its own items; zeros if all of them are masked.

    One image fills a device. XLA for TPU would cut two to seven images into strips with borders, which takes nearly
    three times as long, twice as long to compile, and sixteen times the memory.
    """
    most = max(1, PIXELS_AT_ONCE // config.target_size**2)

    def some(autoencoder: Params, items: Array, mask: Array | None) -> Any:
        if mask is None:
            return run(autoencoder, items)
        made = jax.eval_shape(run, autoencoder, items)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), made)
        return jax.lax.cond(mask.any(), run, lambda *_: zeros, autoencoder, items)

    def local(autoencoder: Params, items: Array, mask: Array | None) -> Any:
        count = items.shape[0]
        at_once = next((n for n in range(min(most, count), 0, -1) if count % n == 0), count)
        if at_once == count:
            return some(autoencoder, items, mask)
        parts = jax.tree.map(lambda x: x.reshape(-1, at_once, *x.shape[1:]), (items, mask))
        outputs = jax.lax.map(lambda part: some(autoencoder, *part), parts)
        return jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), outputs)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(autoencoder, items, mask)
    split = partition(items.shape[:1], ("images",), mesh)
    specs = (jax.sharding.PartitionSpec(), split, split)
    return jax.shard_map(local, in_specs=specs, out_specs=split, check_vma=False)(autoencoder, items, mask)


def teacher_features(
    config: RossConfig, params: Params, images: Float[Array, "batch height width 3"], dtype: Any = jnp.bfloat16
) -> Float[Array, "batch tokens features"]:
    """A teacher's features of normalised images, on the encoder's grid, float32 and layer-normalised.

    The teacher sees the image at its own size. Features on another grid are resized bilinearly.

    Args:
      params: with `teacher`.
      dtype: of the teacher's activations.
    """
    teacher, grid = required(config.teacher), config.vision.grid
    mean, std = jnp.asarray(config.teacher_mean, jnp.float32), jnp.asarray(config.teacher_std, jnp.float32)
    pixels = jax.image.resize(
        (_unit_pixels(config, images) + 1.0) / 2.0,
        (images.shape[0], teacher.image_size, teacher.image_size, 3),
        "linear",
    )
    features = apply(teacher.build(dtype), params["teacher"], (pixels - mean) / std)
    features = rearrange(features.astype(jnp.float32), "b (h w) c -> b h w c", h=teacher.grid)
    if teacher.grid != grid:
        features = _resize(features, grid)
    return apply(layer_norm(FEATURE_EPS, jnp.float32, affine=False), {}, rearrange(features, "b h w c -> b (h w) c"))


def autoencoder_settings(config: RossConfig) -> dict[str, Any]:
    """Everything that `encode` depends on beside images and parameters."""
    return {"autoencoder": to_dict(config.autoencoder), "pixels": config.target_size}


def teacher_settings(config: RossConfig, dtype: DTypeLike) -> dict[str, Any]:
    """Everything that `teacher_features` depends on beside images and parameters."""
    normalisation = {"mean": to_dict(config.teacher_mean), "std": to_dict(config.teacher_std)}
    activations = str(jnp.dtype(dtype))
    return {"teacher": to_dict(config.teacher), **normalisation, "grid": config.vision.grid, "activations": activations}
