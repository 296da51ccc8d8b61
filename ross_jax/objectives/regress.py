"""Ross^R: an MLP regresses visual outputs to pixels, latents or features of the image (paper section 3.2)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Shaped

from ross_jax.config import required
from ross_jax.models.autoencoder import Posterior
from ross_jax.models.denoiser import normalise_condition
from ross_jax.models.language import FINAL
from ross_jax.models.layers import apply
from ross_jax.models.regressor import Regressor
from ross_jax.models.ross import TARGET_PIXELS, RossConfig
from ross_jax.objectives.objective import (
    DEFAULT_SAMPLING,
    Batch,
    Objective,
    Params,
    Reconstruction,
    Sampling,
    Taps,
    normalised_images,
)
from ross_jax.objectives.targets import (
    autoencoder_settings,
    decode,
    encode,
    group_latents,
    normalised_latents,
    pixel_tokens,
    target_pixels,
    teacher_features,
    teacher_settings,
    tokens_to_pixels,
    ungroup_latents,
)

Distance = Literal["mse", "cosine"]


def token_distance(
    distance: Distance,
    predicted: Float[Array, "*batch tokens channels"],
    target: Float[Array, "*batch tokens channels"],
) -> Float[Array, "*batch"]:
    """Mean over an image's tokens: squared error, averaged over channels; or one minus the cosine."""
    if distance == "mse":
        return jnp.mean(jnp.square(predicted - target), axis=(-2, -1))
    tiny = jnp.finfo(predicted.dtype).tiny
    lengths = jnp.sum(jnp.square(predicted), -1) * jnp.sum(jnp.square(target), -1)
    # Before the root: the gradient of a root at 0 is infinite.
    cosine = jnp.sum(predicted * target, -1) / jnp.sqrt(jnp.maximum(lengths, tiny))
    return jnp.mean(1.0 - cosine, axis=-1)


@dataclasses.dataclass(frozen=True)
class _Regress(Objective):
    """A regressor's predictions, compared with targets token by token.

    Attributes:
      distance: between predicted and true tokens.
      teacher_dtype: of a teacher's activations.
    """

    distance: Distance = "mse"
    teacher_dtype: DTypeLike = jnp.float32

    def predict(
        self, params: Params, visual_outputs: Float[Array, "*items tokens embed"]
    ) -> Float[Array, "*items tokens target"]:
        """The regressor's prediction for each image token, float32."""
        context = normalise_condition(visual_outputs.reshape(-1, *visual_outputs.shape[-2:]))
        predicted = apply(Regressor(required(self.config.regressor)), params["regressor"], context)
        return predicted.reshape(*visual_outputs.shape[:-1], predicted.shape[-1])

    def target_tokens(self, targets: Any) -> Float[Array, "items tokens target"]:
        """Targets as the tokens that the regressor predicts."""
        return targets

    def loss(
        self, params: Params, frozen: Params, taps: Taps, targets: Any, keys: Shaped[Array, "batch images"]
    ) -> Float[Array, "batch images"]:
        """Distance of each image's predicted tokens from its target."""
        predicted = self.predict(params, taps[FINAL])
        return token_distance(self.distance, predicted, self.target_tokens(targets).reshape(predicted.shape))


def _regressor(model: RossConfig, target: str, out_size: int | None) -> dict[str, Any]:
    """Fields of a regressor of such targets."""
    condition_size = model.language and model.language.hidden_size
    return {"target": target, "condition_size": condition_size, "out_size": out_size}


class PixelObjective(_Regress):
    """Ross^R-Pixel: RGB values in [-1, 1] of each image token's 16 x 16 pixels."""

    kind = "pixel"
    title = "Ross^R-Pixel"

    @classmethod
    def requires(cls, model: RossConfig) -> dict[str, dict[str, Any]]:
        """A regressor of pixels."""
        return {"regressor": _regressor(model, "pixels", 3 * TARGET_PIXELS**2)}

    def targets(
        self, frozen: Params, batch: Batch, mask: Bool[Array, " items"] | None = None
    ) -> Float[Array, "items side side 3"]:
        """The image itself, at 16 pixels per token."""
        return target_pixels(self.config, normalised_images(self.config, batch))

    def target_tokens(self, targets: Array) -> Array:
        """Pixels, grouped by token."""
        return pixel_tokens(targets)

    def reconstruct(
        self, params: Params, frozen: Params, visual_outputs: Array, keys: Array, sampling: Sampling = DEFAULT_SAMPLING
    ) -> Reconstruction:
        """The regressed pixels."""
        pixels = tokens_to_pixels(self.predict(params, visual_outputs))
        return Reconstruction(jnp.clip(pixels, -1.0, 1.0), None)


class LatentObjective(_Regress):
    """Ross^R-Latent: the mean of the autoencoder's posterior, on the denoiser's scale.

    A model whose regressor predicts a teacher's features has the same kind; `build` gives it a `FeatureObjective`.
    """

    kind = "latent"
    title = "Ross^R-Latent"
    target_encoder = "autoencoder"

    @classmethod
    def requires(cls, model: RossConfig) -> dict[str, dict[str, Any]]:
        """An autoencoder and a regressor of its latents; or a teacher and a regressor of its features."""
        if _regresses_features(model):
            features = model.teacher and model.teacher.hidden_size
            return {"teacher": {}, "regressor": _regressor(model, "features", features)}
        return {"autoencoder": {}, "regressor": _regressor(model, "latents", model.latent_size)}

    @classmethod
    def build(cls, model: RossConfig, settings: Mapping[str, Any]) -> Objective:
        """The objective for the targets that the model's regressor predicts."""
        if cls is LatentObjective and _regresses_features(model):
            return FeatureObjective.build(model, settings)
        return super().build(model, settings)

    def targets(self, frozen: Params, batch: Batch, mask: Bool[Array, " items"] | None = None) -> Posterior:
        """The autoencoder's posterior of each image."""
        return encode(self.config, frozen, normalised_images(self.config, batch), mask)

    def target_settings(self) -> dict[str, Any]:
        """The autoencoder, and the size of the images that it sees."""
        return autoencoder_settings(self.config)

    def target_tokens(self, targets: Posterior) -> Array:
        """The posterior's mean as latent tokens."""
        return group_latents(normalised_latents(self.config, targets.mean), required(self.config.latent_window))

    def latents(
        self, params: Params, visual_outputs: Float[Array, "items tokens embed"]
    ) -> Float[Array, "items rows columns channels"]:
        """The regressed latents."""
        return ungroup_latents(self.predict(params, visual_outputs), required(self.config.latent_window))

    def reconstruct(
        self, params: Params, frozen: Params, visual_outputs: Array, keys: Array, sampling: Sampling = DEFAULT_SAMPLING
    ) -> Reconstruction:
        """The regressed latents, decoded."""
        latents = self.latents(params, visual_outputs)
        return Reconstruction(jnp.clip(decode(self.config, frozen, latents), -1.0, 1.0), latents)


class Latent2PixelObjective(LatentObjective):
    """Ross^R-Latent2Pixel: the frozen decoder turns regressed latents into pixels, which are compared.

    The distance is always the mean squared error.
    """

    kind = "latent2pixel"
    title = "Ross^R-Latent2Pixel"
    target_encoder = None

    @classmethod
    def settings(cls) -> set[str]:
        """Names of the settings that the objective reads."""
        return super().settings() - {"distance"}

    @classmethod
    def requires(cls, model: RossConfig) -> dict[str, dict[str, Any]]:
        """An autoencoder, and a regressor of its latents."""
        return {"autoencoder": {}, "regressor": _regressor(model, "latents", model.latent_size)}

    def targets(
        self, frozen: Params, batch: Batch, mask: Bool[Array, " items"] | None = None
    ) -> Float[Array, "items side side 3"]:
        """The image itself, at 16 pixels per token."""
        return target_pixels(self.config, normalised_images(self.config, batch))

    def target_settings(self) -> dict[str, Any]:
        """Nothing: the targets are the images."""
        return {}

    def loss(
        self, params: Params, frozen: Params, taps: Taps, targets: Array, keys: Shaped[Array, "batch images"]
    ) -> Float[Array, "batch images"]:
        """Mean squared error of each image's decoded pixels."""
        outputs = taps[FINAL].reshape(-1, *taps[FINAL].shape[2:])
        pixels = decode(self.config, frozen, self.latents(params, outputs), remat=True)
        return jnp.mean(jnp.square(pixels - targets), axis=(1, 2, 3)).reshape(keys.shape)


class FeatureObjective(_Regress):
    """Ross^R-Latent with a vision encoder: its layer-normalised features. They cannot be made into an image."""

    kind = LatentObjective.kind
    title = LatentObjective.title
    target_encoder = "teacher"

    @classmethod
    def requires(cls, model: RossConfig) -> dict[str, dict[str, Any]]:
        """A teacher, and a regressor of its features."""
        return LatentObjective.requires(model)

    def targets(
        self, frozen: Params, batch: Batch, mask: Bool[Array, " items"] | None = None
    ) -> Float[Array, "items tokens features"]:
        """The teacher's features of each image."""
        return teacher_features(self.config, frozen, normalised_images(self.config, batch), self.teacher_dtype)

    def target_settings(self) -> dict[str, Any]:
        """The teacher, its normalisation, and the grid and type of its features."""
        return teacher_settings(self.config, self.teacher_dtype)


def _regresses_features(model: RossConfig) -> bool:
    """Whether a model's regressor predicts a teacher's features; without a regressor, whether it has a teacher."""
    return model.teacher is not None if model.regressor is None else model.regressor.target == "features"
