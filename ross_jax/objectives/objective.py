"""The interface of objectives that supervise hidden states at image positions.

An objective is one class in one file, listed in `reconstruction.OBJECTIVES` or added by `reconstruction.register`.
`README.md` shows how to write one.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from ross_jax.config import Range
from ross_jax.models.language import FINAL
from ross_jax.models.ross import RossConfig, normalise

Params = Any
Batch = Mapping[str, Shaped[Array, "..."]]
"""A batch as `ross_jax.data.batches` lays it out."""
Taps = Mapping[int, Float[Array, "batch images tokens embed"]]
"""Hidden states at the image positions, by layer as `LanguageModel` counts them; zeros in empty slots."""

_FIELD = "image_targets"


class Reconstruction(NamedTuple):
    """Images made from visual outputs.

    Attributes:
      pixels: in [-1, 1], at 16 pixels per image token.
      latents: what the pixels were decoded from, on the scale that models see; None without latents.
    """

    pixels: Float[Array | np.ndarray, "items side side 3"]
    latents: Float[Array | np.ndarray, "items rows columns channels"] | None


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a denoiser's latents are sampled.

    Attributes:
      sampler: `ddpm`, ancestral, as the reference; `ddim`; `dpm`, DPM-Solver++(2M).
      steps: respaced from the process of training.
      temperature: factor of the noise that `ddpm` adds at each step.
      guidance: classifier-free; 1 is none. Needs a denoiser that was trained with condition dropout.
    """

    sampler: Literal["ddpm", "ddim", "dpm"] = "ddpm"
    steps: Annotated[int, Range(1, 1000)] = 50
    temperature: Annotated[float, Range(0.0, 100.0)] = 1.0
    guidance: Annotated[float, Range(-100.0, 100.0)] = 1.0


DEFAULT_SAMPLING = Sampling()


@dataclasses.dataclass(frozen=True)
class Objective(abc.ABC):
    """An objective on hidden states at image positions.

    A subclass is a frozen dataclass. Its fields beyond `config` are its settings: `build` fills them from the fields of
    `config.reconstruction` with the same names, and from `config.reconstruction.options`.

    Attributes:
      kind: name in `config.reconstruction.kind`.
      title: name in tables.
      target_encoder: frozen component whose outputs are the targets, which `launch/cache.py` can then store. None:
        targets are never cached.
      taps: layers that `loss` reads: 0 the embeddings, k the output of k layers, `FINAL` the final norm's output. May
        be a property.
      noise_levels: passes through the denoiser per image; 0 without one.
      config: sizes of the model's components.
    """

    kind: ClassVar[str]
    title: ClassVar[str]
    target_encoder: ClassVar[Literal["autoencoder", "teacher"] | None] = None
    taps: ClassVar[tuple[int, ...]] = (FINAL,)
    noise_levels: ClassVar[int] = 0
    config: RossConfig

    @classmethod
    @abc.abstractmethod
    def requires(cls, model: RossConfig) -> dict[str, dict[str, Any]]:
        """Components that the model must have.

        Example for a regressor of pixels: `{"regressor": {"target": "pixels", "condition_size": 64, "out_size": 768}}`.

        Args:
          model: its other components, which the sizes follow from.

        Returns:
          Component -> its fields whose values the objective and the rest of the model fix.
        """

    @classmethod
    def settings(cls) -> set[str]:
        """Names of the settings that the objective reads."""
        return {field.name for field in dataclasses.fields(cls)} - {"config"}

    @classmethod
    def build(cls, model: RossConfig, settings: Mapping[str, Any]) -> "Objective":
        """The objective with those of the settings that it reads."""
        names = cls.settings()
        return cls(model, **{name: value for name, value in settings.items() if name in names})

    @abc.abstractmethod
    def targets(self, frozen: Params, batch: Batch, mask: Bool[Array, " items"] | None = None) -> Any:
        """Targets of the images of a batch: deterministic, so they can be cached.

        Args:
          frozen: tree with the target encoder.
          batch: with `images`, uint8, and `image_start`; a data set may bring fields of its own.
          mask: bool[batch * images]. Targets are only computed where True. None computes all.

        Returns:
          Arrays with a leading axis of batch * images.
        """

    def target_settings(self) -> dict[str, Any]:
        """Everything that targets depend on beside images and parameters; a cache of targets is compared by it."""
        return {}

    def pack(self, targets: Any) -> dict[str, Any]:
        """Targets, or their shapes, by the fields of a batch that carry them when they come from a cache."""
        leaves = jax.tree_util.tree_leaves_with_path(targets)
        return {_FIELD + "".join(f"_{part.name}" for part in path): leaf for path, leaf in leaves}

    def unpack(self, frozen: Params, batch: Batch) -> Any | None:
        """The inverse of `pack`, for a batch `[rows, images, ...]` with these fields; None for a batch without.

        Args:
          frozen: as for `targets`; only its shapes are read.
        """
        if not any(name.startswith(_FIELD) for name in batch):
            return None
        side = self.config.vision.image_size
        images = jax.ShapeDtypeStruct((*batch["image_start"].shape, side, side, 3), jnp.uint8)
        shapes = jax.eval_shape(self.targets, frozen, {**batch, "images": images})
        fields = [batch[name].astype(leaf.dtype).reshape(leaf.shape) for name, leaf in self.pack(shapes).items()]
        return jax.tree.unflatten(jax.tree.structure(shapes), fields)

    @abc.abstractmethod
    def loss(
        self, params: Params, frozen: Params, taps: Taps, targets: Any, keys: Shaped[Array, "batch images"]
    ) -> Float[Array, "batch images"]:
        """Loss of each image, independent of its neighbours, of packing and of devices.

        Args:
          params: tree with the head (denoiser or regressor).
          frozen: tree with the target encoder.
          taps: the layers of `self.taps`.
          targets: what `targets` returns.
          keys: a random key per image.
        """

    def reconstruct(
        self,
        params: Params,
        frozen: Params,
        visual_outputs: Float[Array, "items tokens embed"],
        keys: Shaped[Array, " items"],
        sampling: Sampling = DEFAULT_SAMPLING,
    ) -> Reconstruction | None:
        """Images from visual outputs; None if the objective cannot make any.

        Args:
          keys: a random key per image; only sampling draws from it.
        """
        return None


def normalised_images(config: RossConfig, batch: Batch) -> Float[Array, "items height width 3"]:
    """The vision encoder's input of every slot; zeros, the mean colour, in empty slots, as the reference has them."""
    images = normalise(config, batch["images"])
    real = batch["image_start"] < batch["tokens"].shape[1]
    return jnp.where(real[..., None, None, None], images, 0.0).reshape(-1, *images.shape[2:])
