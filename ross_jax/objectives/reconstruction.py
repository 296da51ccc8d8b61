"""The reconstruction objectives of the paper, behind one interface, and how their losses are reduced.

kind            J               target                                   distance
pixel           MLP             RGB pixels                               MSE, cosine
latent          MLP             latents, or a vision encoder's features  MSE, cosine
latent2pixel    MLP, decoder    RGB pixels                               MSE
denoise         denoiser        latents                                  MSE of what it predicts
none            -               -                                        - (LLaVA)
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ross_jax.models.layers import RematPolicy
from ross_jax.models.ross import RossConfig
from ross_jax.objectives.denoise import DenoiseObjective
from ross_jax.objectives.objective import Objective
from ross_jax.objectives.regress import (
    Distance,
    FeatureObjective,
    Latent2PixelObjective,
    LatentObjective,
    PixelObjective,
)

Kind = Literal["denoise", "pixel", "latent", "latent2pixel", "none"]


@dataclasses.dataclass(frozen=True)
class ReconstructionConfig:
    """The second loss. What reads the visual outputs, and how large it is, is `model.denoiser` or `model.regressor`.

    Attributes:
      kind: as above.
      weight: of the loss in the sum.
      draws: (t, epsilon) draws per picture, of `denoise`.
      distance: of `pixel` and `latent`.
      condition_dropout: share of draws in which `denoise` is not told the visual outputs; guidance needs some, 0.1 say.
      dtype: of the denoiser's activations; the reference's are float32.
      remat: what the backward pass through the denoiser computes again. On TPU `full`, the default, is faster than
        `none`, since it costs less to compute than to read back; `attention` is a little faster still.
      compat: `official` averages as the reference does, over text-only rows too.
    """

    kind: Kind = "denoise"
    weight: float = 1.0
    draws: int = 4
    distance: Distance = "mse"
    condition_dropout: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: RematPolicy = "full"
    compat: Literal["default", "official"] = "default"

    def __post_init__(self):
        if self.draws < 1:
            raise ValueError(f"draws {self.draws} must be at least 1")
        if not 0.0 <= self.condition_dropout < 1.0:
            raise ValueError(f"condition_dropout {self.condition_dropout} must be in [0, 1)")
        if self.condition_dropout and self.kind != "denoise":
            raise ValueError(f"condition_dropout is of kind 'denoise', not {self.kind!r}")
        if self.distance != "mse" and self.kind not in ("pixel", "latent"):
            raise ValueError(f"distance {self.distance!r} is of kinds 'pixel' and 'latent', not {self.kind!r}")

    def check(self, config: RossConfig) -> None:
        """Raises ValueError if the model lacks what this kind needs."""
        needed = {
            "denoise": ("denoiser", "autoencoder"),
            "pixel": ("regressor",),
            "latent": ("regressor",),
            "latent2pixel": ("regressor", "autoencoder"),
            "none": (),
        }[self.kind]
        missing = [name for name in needed if getattr(config, name) is None]
        if config.regressor and "regressor" in needed:
            targets = {"pixel": ("pixels",), "latent": ("latents", "features"), "latent2pixel": ("latents",)}[self.kind]
            target = config.regressor.target
            if target not in targets:
                expected = " or ".join(map(repr, targets))
                raise ValueError(f"reconstruction.kind {self.kind!r} needs regressor.target {expected}, not {target!r}")
            source = {"latents": "autoencoder", "features": "teacher"}.get(target)
            if source and getattr(config, source) is None and source not in missing:
                missing.append(source)
        if missing:
            raise ValueError(f"model has no {', '.join(missing)}, which reconstruction.kind {self.kind!r} needs")


def make_objective(
    config: RossConfig, settings: ReconstructionConfig, dtype: DTypeLike = "float32"
) -> Objective | None:
    """The objective of a run; None for `none`.

    Args:
      dtype: of a teacher's activations.
    """
    if settings.kind == "none":
        return None
    if settings.kind == "denoise":
        return DenoiseObjective(config, settings.draws, settings.condition_dropout, settings.dtype, settings.remat)
    if settings.kind == "latent2pixel":
        return Latent2PixelObjective(config)
    return _regression(config, settings.distance, dtype)


def _regression(config: RossConfig, distance: Distance = "mse", dtype: DTypeLike = "float32") -> Objective:
    kinds = {"pixels": PixelObjective, "latents": LatentObjective, "features": FeatureObjective}
    return kinds[config.regressor.target](config, distance, dtype)


def reconstructor(config: RossConfig) -> Objective | None:
    """An objective for its `reconstruct` alone: what a model's own config says of it; None if it makes no pictures."""
    if config.denoiser is not None and config.autoencoder is not None:
        return DenoiseObjective(config)
    if config.regressor is None or config.regressor.target == "features":
        return None
    return _regression(config)


def image_mean(losses: Float[Array, "*items"], real: Float[Array, "*items"]) -> Float[Array, ""]:
    """Mean over the pictures that exist; 0 without any."""
    return jnp.sum(losses * real) / jnp.maximum(jnp.sum(real), 1.0)


def official_mean(losses: Float[Array, "*items"], real: Float[Array, "*items"], draws: int = 4) -> Float[Array, ""]:
    """The reference's reduction (`compat = "official"`): text-only rows count too, as soon as one picture exists."""
    images = draws * jnp.sum(real)
    return jnp.mean(losses) * images / (images + 1e-6)
