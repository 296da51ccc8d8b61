"""Ross^R: an MLP regresses visual outputs to what is known of the picture (paper section 3.2)."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ross_jax.models.autoencoder import Posterior
from ross_jax.models.denoiser import normalise_condition
from ross_jax.models.regressor import Regressor
from ross_jax.objectives.objective import DEFAULT_SAMPLING, Objective, Params, Reconstruction, Sampling
from ross_jax.objectives.targets import (
    decode,
    encode,
    group_latents,
    normalised_latents,
    pixel_tokens,
    target_pixels,
    teacher_features,
    tokens_to_pixels,
    ungroup_latents,
)

Distance = Literal["mse", "cosine"]


def token_distance(
    distance: Distance,
    predicted: Float[Array, "*batch tokens channels"],
    target: Float[Array, "*batch tokens channels"],
) -> Float[Array, "*batch"]:
    """Mean over a picture's tokens: squared error, averaged over channels; or one minus the cosine."""
    if distance == "mse":
        return jnp.mean(jnp.square(predicted - target), axis=(-2, -1))
    tiny = jnp.finfo(predicted.dtype).tiny
    lengths = jnp.sum(jnp.square(predicted), -1) * jnp.sum(jnp.square(target), -1)
    # Before the root: the gradient of a root at 0 is infinite.
    cosine = jnp.sum(predicted * target, -1) / jnp.sqrt(jnp.maximum(lengths, tiny))
    return jnp.mean(1.0 - cosine, axis=-1)


@dataclasses.dataclass(frozen=True)
class _Regress(Objective):
    """What all regressions share. Their model has a regressor, and what its targets are made by.

    Attributes:
      distance: between predicted and true tokens.
      dtype: of a teacher's activations.
    """

    distance: Distance = "mse"
    dtype: DTypeLike = jnp.float32

    def predict(
        self, params: Params, visual_outputs: Float[Array, "*items tokens embed"]
    ) -> Float[Array, "*items tokens target"]:
        """What the regressor says of each picture token, float32."""
        context = normalise_condition(visual_outputs.reshape(-1, *visual_outputs.shape[-2:]))
        predicted = Regressor(self.config.regressor).apply({"params": params["regressor"]}, context)
        return predicted.reshape(*visual_outputs.shape[:-1], predicted.shape[-1])

    def _compare(self, params: Params, visual_outputs: Array, target: Float[Array, "items tokens target"], keys: Array):
        predicted = self.predict(params, visual_outputs)
        return token_distance(self.distance, predicted, target.reshape(predicted.shape)).reshape(keys.shape)


class PixelObjective(_Regress):
    """Ross^R-Pixel: RGB values in [-1, 1] of each picture token's 16 x 16 pixels."""

    def targets(
        self, frozen: Params, images: Float[Array, "batch height width 3"], wanted: Bool[Array, " batch"] | None = None
    ) -> Float[Array, "batch side side 3"]:
        """The picture itself, at 16 pixels per token."""
        return target_pixels(self.config, images)

    def loss(self, params: Params, frozen: Params, visual_outputs: Array, targets: Array, keys: Array) -> Array:
        """Loss of each picture."""
        return self._compare(params, visual_outputs, pixel_tokens(targets), keys)

    def reconstruct(
        self, params: Params, frozen: Params, visual_outputs: Array, keys: Array, sampling: Sampling = DEFAULT_SAMPLING
    ):
        """The regressed pixels."""
        pixels = tokens_to_pixels(self.predict(params, visual_outputs))
        return Reconstruction(jnp.clip(pixels, -1.0, 1.0), None)


class LatentObjective(_Regress):
    """Ross^R-Latent with a KL autoencoder: the mean of its posterior, on the denoiser's scale."""

    target_encoder = "autoencoder"

    def targets(
        self, frozen: Params, images: Float[Array, "batch height width 3"], wanted: Bool[Array, " batch"] | None = None
    ) -> Posterior:
        """The posterior of each normalised picture."""
        return encode(self.config, frozen, images, wanted)

    def loss(self, params: Params, frozen: Params, visual_outputs: Array, targets: Posterior, keys: Array) -> Array:
        """Loss of each picture."""
        latents = normalised_latents(self.config, targets.mean)
        return self._compare(params, visual_outputs, group_latents(latents, self.config.latent_window), keys)

    def latents(
        self, params: Params, visual_outputs: Float[Array, "items tokens embed"]
    ) -> Float[Array, "items rows columns channels"]:
        """The regressed latents."""
        return ungroup_latents(self.predict(params, visual_outputs), self.config.latent_window)

    def reconstruct(
        self, params: Params, frozen: Params, visual_outputs: Array, keys: Array, sampling: Sampling = DEFAULT_SAMPLING
    ):
        """The regressed latents, decoded."""
        latents = self.latents(params, visual_outputs)
        return Reconstruction(jnp.clip(decode(self.config, frozen, latents), -1.0, 1.0), latents)


class Latent2PixelObjective(LatentObjective):
    """Ross^R-Latent2Pixel: regressed latents go through the frozen decoder, and its pixels are compared."""

    target_encoder = None

    def targets(
        self, frozen: Params, images: Float[Array, "batch height width 3"], wanted: Bool[Array, " batch"] | None = None
    ) -> Float[Array, "batch side side 3"]:
        """The picture itself, at 16 pixels per token."""
        return target_pixels(self.config, images)

    def loss(self, params: Params, frozen: Params, visual_outputs: Array, targets: Array, keys: Array) -> Array:
        """Loss of each picture."""
        outputs = visual_outputs.reshape(-1, *visual_outputs.shape[2:])
        pixels = decode(self.config, frozen, self.latents(params, outputs), remat=True)
        return jnp.mean(jnp.square(pixels - targets), axis=(1, 2, 3)).reshape(keys.shape)


class FeatureObjective(_Regress):
    """Ross^R-Latent with a vision encoder: its layer-normalised features. They cannot be made into a picture."""

    target_encoder = "teacher"

    def targets(
        self, frozen: Params, images: Float[Array, "batch height width 3"], wanted: Bool[Array, " batch"] | None = None
    ) -> Array:
        """The teacher's features of each normalised picture."""
        return teacher_features(self.config, frozen, images, self.dtype)

    def loss(self, params: Params, frozen: Params, visual_outputs: Array, targets: Array, keys: Array) -> Array:
        """Loss of each picture."""
        return self._compare(params, visual_outputs, targets, keys)

    def reconstruct(
        self, params: Params, frozen: Params, visual_outputs: Array, keys: Array, sampling: Sampling = DEFAULT_SAMPLING
    ):
        """None: features are no picture."""
        return None
