"""An idea of one's own, outside the package: a vision encoder, a denoiser, an objective and a data source."""

import dataclasses
import hashlib
import io
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int
from PIL import Image

from ross_jax.config import extends
from ross_jax.data.samples import LazyImage, Sample
from ross_jax.data.sources import SourceConfig
from ross_jax.models.denoiser import Denoiser, DenoiserConfig, timestep_embedding
from ross_jax.models.regressor import Regressor
from ross_jax.models.vision import VisionConfig
from ross_jax.objectives.objective import Objective, normalised_images
from ross_jax.objectives.reconstruction import register
from ross_jax.objectives.regress import token_distance


# A vision encoder: a config with a kind of its own, and the module that it builds.
@extends(VisionConfig)
@dataclasses.dataclass(frozen=True)
class PatchConfig(VisionConfig):
    kind: Literal["patches"]

    @property
    def extra_tokens(self) -> int:
        return 0  # no class token

    def build(self, dtype: DTypeLike = jnp.float32, remat: str = "none") -> nn.Module:
        return PatchEncoder(self, dtype)


class PatchEncoder(nn.Module):
    """Maps each patch to features by itself."""

    config: PatchConfig
    dtype: DTypeLike = jnp.float32

    def input_spec(self, batch: int = 1) -> tuple[jax.ShapeDtypeStruct, ...]:
        size = self.config.image_size
        return (jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32),)

    @nn.compact
    def __call__(self, images: Float[Array, "batch height width 3"]) -> Float[Array, "batch tokens features"]:
        side = (self.config.patch_size, self.config.patch_size)
        patches = nn.Conv(self.config.hidden_size, side, side, "VALID", dtype=self.dtype, name="patch_embedding")(
            images
        )
        return nn.gelu(patches.reshape(len(images), -1, self.config.hidden_size))


# A denoiser: a block of its own. It has the interface of `Denoiser`, and may replace all or a part of it.
@extends(DenoiserConfig, "block")
@dataclasses.dataclass(frozen=True)
class MeanDenoiserConfig(DenoiserConfig):
    block: Literal["mean"] = "mean"

    def build(self, dtype: DTypeLike = jnp.float32, remat: Any = "none") -> Denoiser:
        return MeanDenoiser(self, dtype, remat)


class MeanDenoiser(Denoiser):
    """Each token sees the mean of all tokens instead of attending to them."""

    def denoise(
        self,
        noised: Float[Array, "batch tokens latent"],
        timesteps: Int[Array, " batch"],
        condition: Float[Array, "batch tokens width"],
        internals: bool = False,
    ) -> Float[Array, "batch tokens latent"]:
        time = self.timestep_out(nn.silu(self.timestep_in(timestep_embedding(timesteps, 256).astype(self.dtype))))
        x = self.latent_embedding(noised.astype(self.dtype)) + condition + time[:, None]
        return self.final(nn.silu(x + x.mean(axis=1, keepdims=True)))


# An objective: what visual outputs are trained to predict, and how far off they are.
@register
@dataclasses.dataclass(frozen=True)
class PatchColour(Objective):
    """A regressor tells the mean colour of each patch from the visual outputs."""

    kind = "patch_colour"
    title = "Colour of each patch"

    @classmethod
    def requires(cls, model):
        return {"regressor": {"target": "colours", "condition_size": model.language.hidden_size, "out_size": 3}}

    def targets(self, frozen, batch, mask=None) -> Float[Array, "images tokens 3"]:
        vision = self.config.vision
        seen = vision.grid * vision.patch_size
        images = normalised_images(self.config, batch)[:, :seen, :seen]
        return reduce(images, "b (h p) (w q) c -> b (h w) c", "mean", p=vision.patch_size, q=vision.patch_size)

    def loss(self, params, frozen, taps, targets, keys):
        (states,) = taps.values()
        states = states.reshape(targets.shape[0], -1, states.shape[-1]).astype(jnp.float32)
        predicted = Regressor(self.config.regressor).apply({"params": params["regressor"]}, states)
        return token_distance("mse", predicted, targets).reshape(keys.shape)


# A data source: a sequence of samples.
@extends(SourceConfig)
@dataclasses.dataclass(frozen=True)
class ColourConfig(SourceConfig):
    kind: Literal["colours"] = "colours"
    count: int = 16

    def open(self, max_image_bytes: int) -> "Colours":
        return Colours(self.count)


class Colours:
    """Pictures of one colour, and the question which one it is. `fingerprint` changes whenever the texts do."""

    NAMES = ("red", "green", "blue")

    def __init__(self, count: int):
        self._count = count
        self.fingerprint = hashlib.sha256(f"colours {count}".encode()).hexdigest()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        name = self.NAMES[index % 3]
        turns = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": name}]
        record = {"id": str(index), "image": f"{name}.png", "conversations": turns}
        return Sample(str(index), record, (LazyImage(f"{name}.png", lambda: self._png(index % 3)),))

    def _png(self, channel: int) -> bytes:
        pixels = np.zeros((32, 32, 3), np.uint8)
        pixels[..., channel] = 255
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG")
        return out.getvalue()
