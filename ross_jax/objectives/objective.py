"""The interface that all reconstruction objectives share."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ross_jax.models.ross import RossConfig

Params = Any

_FIELD = "image_targets"


class Reconstruction(NamedTuple):
    """Pictures made of visual outputs.

    Attributes:
      pixels: in [-1, 1], at 16 pixels per picture token.
      latents: that they were decoded from, on the scale that models see; None where there were none.
    """

    pixels: Float[Array, "items side side 3"]
    latents: Float[Array, "items rows columns channels"] | None


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a denoiser's latents are sampled.

    Attributes:
      sampler: `ddpm`, ancestral, as the reference; `ddim`; `dpm`, DPM-Solver++(2M).
      steps: respaced from the process of training.
      temperature: of the noise that `ddpm` adds at each step.
      guidance: classifier-free; 1 is none. Needs a denoiser that was trained with condition dropout.
    """

    sampler: Literal["ddpm", "ddim", "dpm"] = "ddpm"
    steps: int = 50
    temperature: float = 1.0
    guidance: float = 1.0


DEFAULT_SAMPLING = Sampling()


@dataclasses.dataclass(frozen=True)
class Objective(abc.ABC):
    """A reconstruction objective.

    Keys come per picture, so that no picture's loss depends on its neighbours, on packing or on devices.

    Attributes:
      made_by: the frozen component that the targets cost; None: they are the picture itself.
    """

    target_encoder: ClassVar[Literal["autoencoder", "teacher"] | None] = None
    config: RossConfig

    @abc.abstractmethod
    def targets(
        self, frozen: Params, images: Float[Array, "batch height width 3"], wanted: Bool[Array, " batch"] | None = None
    ) -> Any:
        """What normalised pictures are to be reconstructed to: deterministic, so it can be cached.

        Args:
          wanted: whose loss counts; what others are to become need not be computed. None: everyone's.
        """

    def pack(self, targets: Any) -> dict[str, Any]:
        """Targets, or their shapes, by the fields of a batch that they are put in when they are computed beforehand."""
        leaves = jax.tree_util.tree_leaves_with_path(targets)
        return {_FIELD + "".join(f"_{part.name}" for part in path): leaf for path, leaf in leaves}

    def unpack(self, frozen: Params, batch: Mapping[str, Array]) -> Any | None:
        """The inverse, for a batch `[rows, images, ...]` that has these fields; None for another.

        Args:
          frozen: as for `targets`; only its shapes are looked at.
        """
        if not any(name.startswith(_FIELD) for name in batch):
            return None
        side = self.config.vision.image_size
        shapes = jax.eval_shape(self.targets, frozen, jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32))
        fields = [
            batch[name].astype(leaf.dtype).reshape(-1, *leaf.shape[1:]) for name, leaf in self.pack(shapes).items()
        ]
        return jax.tree.unflatten(jax.tree.structure(shapes), fields)

    @abc.abstractmethod
    def loss(
        self,
        params: Params,
        frozen: Params,
        visual_outputs: Float[Array, "batch images tokens embed"],
        targets: Any,
        keys: Array,
    ) -> Float[Array, "batch images"]:
        """Loss of each picture.

        Args:
          params: trainable tree, with denoiser or regressor.
          frozen: tree, with autoencoder or teacher.
          visual_outputs: of `Ross`.
          targets: of `targets`, for `batch * images` pictures.
          keys: `[batch, images]`.
        """

    @abc.abstractmethod
    def reconstruct(
        self,
        params: Params,
        frozen: Params,
        visual_outputs: Float[Array, "items tokens embed"],
        keys: Array,
        sampling: Sampling = DEFAULT_SAMPLING,
    ) -> Reconstruction | None:
        """Pictures from visual outputs; None where targets cannot be made into one.

        Args:
          keys: `[items]`; only sampling draws anything.
        """
