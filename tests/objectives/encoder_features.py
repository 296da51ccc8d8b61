"""An objective outside the package: hidden states of a layer match the vision encoder's features by cosine."""

import dataclasses

import jax.numpy as jnp

from ross_jax.models.regressor import Regressor
from ross_jax.models.vision import VisionEncoder
from ross_jax.objectives.objective import Objective, normalised_images
from ross_jax.objectives.reconstruction import register
from ross_jax.objectives.regress import token_distance


@register
@dataclasses.dataclass(frozen=True)
class EncoderFeatures(Objective):
    kind = "encoder_features"
    title = "Encoder features"
    layer: int = 1

    @property
    def taps(self):
        return (self.layer,)

    @classmethod
    def requires(cls, model):
        sizes = {"condition_size": model.language.hidden_size, "out_size": model.vision.hidden_size}
        return {"regressor": {"target": "encoder features", **sizes}}

    def targets(self, frozen, batch, mask=None):
        images = normalised_images(self.config, batch)
        return VisionEncoder(self.config.vision).apply({"params": frozen["vision"]}, images)

    def loss(self, params, frozen, taps, targets, keys):
        states = taps[self.layer].reshape(targets.shape[0], -1, taps[self.layer].shape[-1]).astype(jnp.float32)
        predicted = Regressor(self.config.regressor).apply({"params": params["regressor"]}, states)
        return token_distance("cosine", predicted, targets.astype(jnp.float32)).reshape(keys.shape)
