"""The Ross model: maps images and text to hidden states. The visual outputs are the hidden states at image positions.

`RossConfig` also lists the components that only supervision uses: denoiser, regressor, autoencoder and teacher. Their
configs and parameters live beside the model's, and `ross_jax.objectives` runs them.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from ross_jax.config import Finite, Positive
from ross_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from ross_jax.models.denoiser import DenoiserConfig
from ross_jax.models.image_tokens import scatter_images
from ross_jax.models.language import FINAL, ImagePlaces, LanguageConfig, LanguageModel
from ross_jax.models.layers import RematPolicy
from ross_jax.models.projector import Projector, ProjectorConfig
from ross_jax.models.regressor import Regressor, RegressorConfig
from ross_jax.models.tiny_autoencoder import TinyAutoencoder, TinyAutoencoderConfig
from ross_jax.models.vision import VisionConfig

TARGET_PIXELS = 16
"""Pixels per image token, along a side, of the images that reconstruction targets are made of."""
HEADS = ("denoiser", "regressor")
"""Components that read hidden states at image positions. They train, and compute in float32 unless told otherwise."""
TARGET_ENCODERS = ("autoencoder", "teacher")
"""Components that compute reconstruction targets. They never train."""


@dataclasses.dataclass(frozen=True)
class RossConfig:
    """The components of a model. Absent components have no parameters: LLaVA has neither heads nor target encoders.

    Attributes:
      denoiser, regressor: heads that read the visual outputs; at most one of them.
      autoencoder, teacher: frozen target encoders.
      image_mean, image_std: normalisation of the vision encoder's input, in [0, 1] units.
      teacher_mean, teacher_std: normalisation of the teacher's input.
      image_resample: number of Pillow's filter with which images are resized; 2 is bilinear, 3 bicubic.
    """

    vision: VisionConfig | None = None
    projector: ProjectorConfig | None = None
    language: LanguageConfig | None = None
    denoiser: DenoiserConfig | None = None
    autoencoder: AutoencoderConfig | TinyAutoencoderConfig | None = None
    regressor: RegressorConfig | None = None
    teacher: VisionConfig | None = None
    image_mean: tuple[Finite, Finite, Finite] = (0.5, 0.5, 0.5)
    image_std: tuple[Positive, Positive, Positive] = (0.5, 0.5, 0.5)
    teacher_mean: tuple[Finite, Finite, Finite] = (0.5, 0.5, 0.5)
    teacher_std: tuple[Positive, Positive, Positive] = (0.5, 0.5, 0.5)
    image_resample: Literal[0, 1, 2, 3, 4, 5] = 3

    def __post_init__(self):
        sizes = {
            "projector.in_size": (self.projector and self.projector.in_size),
            "vision.hidden_size": (self.vision and self.vision.hidden_size),
            "projector.out_size": (self.projector and self.projector.out_size),
            "language.hidden_size": (self.language and self.language.hidden_size),
            "denoiser.condition_size": (self.denoiser and self.denoiser.condition_size),
            "regressor.condition_size": (self.regressor and self.regressor.condition_size),
            "denoiser.grid": (self.denoiser and self.denoiser.grid),
            "vision.grid": (self.vision and self.vision.grid),
            "denoiser.latent_size": (self.denoiser and self.denoiser.latent_size),
            "channels of the autoencoder's latents per image token": self.latent_size,
        }

        def same(left: str, right: str):
            if None not in (sizes[left], sizes[right]) and sizes[left] != sizes[right]:
                raise ValueError(f"{left} is {sizes[left]} but {right} is {sizes[right]}")

        same("projector.in_size", "vision.hidden_size")
        same("projector.out_size", "language.hidden_size")
        same("denoiser.condition_size", "language.hidden_size")
        same("denoiser.grid", "vision.grid")
        same("denoiser.latent_size", "channels of the autoencoder's latents per image token")
        same("regressor.condition_size", "language.hidden_size")
        if self.denoiser and self.regressor:
            raise ValueError("a model has a denoiser or a regressor, not both")

    @property
    def latent_window(self) -> int | None:
        """Latents per image token, along a side; None without an autoencoder.

        Raises:
          ValueError: an image token is smaller than a latent.
        """
        if self.autoencoder is None:
            return None
        if TARGET_PIXELS % self.autoencoder.downsampling:
            raise ValueError(
                f"autoencoder.downsampling is {self.autoencoder.downsampling}, which does not divide the "
                f"{TARGET_PIXELS} pixels of an image token"
            )
        return TARGET_PIXELS // self.autoencoder.downsampling

    @property
    def latent_size(self) -> int | None:
        """Values of a latent token: all channels of a window of latents; None without an autoencoder."""
        return self.autoencoder and self.autoencoder.latent_channels * self.latent_window**2

    @property
    def target_size(self) -> int:
        """Side, in pixels, of the image that reconstruction targets are made of."""
        return self.vision.grid * TARGET_PIXELS


class RossOutput(NamedTuple):
    """Output of `Ross`.

    Attributes:
      hidden: output of the final norm, input of the text loss.
      taps: requested tap -> hidden states at the image positions; zeros in empty slots.
      internals: on request: `vision_hidden_states`, `features`, `projected`, `embeddings`, `hidden_states`.
    """

    hidden: Float[Array, "batch seq embed"]
    taps: dict[int, Float[Array, "batch images tokens embed"]]
    internals: dict[str, Any] | None

    @property
    def visual_outputs(self) -> Float[Array, "batch images tokens embed"]:
        """Hidden states at the image positions, behind the final norm."""
        return self.taps[FINAL]


def normalise(
    config: RossConfig, images: UInt8[Array, "*batch height width 3"], dtype: DTypeLike = jnp.float32
) -> Float[Array, "*batch height width 3"]:
    """The vision encoder's input from uint8 images: `(images / 255 - mean) / std`, in float32.

    Equals the Hugging Face processors bit for bit.
    """
    pixels = images.astype(jnp.float32)
    # XLA turns division by a constant into multiplication by its rounded reciprocal, so the divisors depend on pixels.
    unit = 255 + 0 * pixels
    mean, std = jnp.asarray(config.image_mean, jnp.float32), jnp.asarray(config.image_std, jnp.float32) + 0 * pixels
    return ((pixels / unit - mean) / std).astype(dtype)


class Ross(nn.Module):
    """Vision encoder, projector and language model as one function of (parameters, batch).

    Attributes:
      dropout: of low-rank updates, as in `models.layers.Dense`.
    """

    config: RossConfig
    dtype: DTypeLike = jnp.float32
    remat: RematPolicy = "none"
    dropout: float = 0.0

    def input_spec(self, batch: int = 1, images: int = 1, length: int | None = None):
        """Shapes of the arguments of `__call__`."""
        vision = self.config.vision
        ids = jax.ShapeDtypeStruct((batch, length or images * vision.num_tokens + 2), jnp.int32)
        pixels = jax.ShapeDtypeStruct((batch, images, vision.image_size, vision.image_size, 3), jnp.float32)
        return (ids, ids, ids, pixels, jax.ShapeDtypeStruct((batch, images), jnp.int32))

    def setup(self):
        cfg = self.config
        # Remat costs a frozen encoder nothing, because a frozen encoder has no backward pass.
        self.vision = cfg.vision.build(self.dtype, self.remat)
        self.projector = Projector(cfg.projector, self.dtype, self.dropout)
        self.language = LanguageModel(cfg.language, self.dtype, self.remat, dropout=self.dropout)

    def encode_images(
        self, images: Float[Array, "batch images height width 3"]
    ) -> Float[Array, "batch images tokens embed"]:
        """Projected tokens of each image."""
        features = self.vision(images.reshape(-1, *images.shape[2:]))
        return self._by_row(self.projector(features), images)

    def project(self, features: Float[Array, "batch images tokens width"]) -> Float[Array, "batch images tokens embed"]:
        """Projects precomputed vision features."""
        return self._by_row(self.projector(features.reshape(-1, *features.shape[2:])), features)

    def _by_row(self, projected: Float[Array, "images tokens embed"], images: Array):
        # No -1 for the tokens: a batch without images would leave it undecided.
        return projected.reshape(*images.shape[:2], *projected.shape[1:])

    def embed(
        self,
        tokens: Int[Array, "batch seq"],
        projected: Float[Array, "batch images tokens embed"],
        image_start: Int[Array, "batch images"],
    ) -> Float[Array, "batch seq embed"]:
        """Embeddings of the text, with the projected images in their places."""
        return scatter_images(self.language.embed(tokens), projected, image_start)

    def logits(self, hidden: Float[Array, "... embed"]) -> Float[Array, "... vocab"]:
        """Next-token scores, float32."""
        return self.language.logits(hidden)

    def head_kernel(self) -> Float[Array, "embed vocab"]:
        """The matrix that `logits` multiplies with."""
        return self.language.head_kernel()

    def __call__(
        self,
        tokens: Int[Array, "batch seq"],
        positions: Int[Array, "batch seq"],
        segments: Int[Array, "batch seq"],
        images: Float[Array, "batch images height width 3"] | None,
        image_start: Int[Array, "batch images"],
        internals: bool = False,
        features: Float[Array, "batch images tokens width"] | None = None,
        taps: tuple[int, ...] = (FINAL,),
    ) -> RossOutput:
        """Runs the model on a batch.

        Args:
          tokens: text ids; anything at image positions.
          positions: rotary position inside the segment.
          segments: conversation number, 0 = padding.
          images: normalised images; the content of empty slots is ignored.
          image_start: index of each image's first token; the row's length if the slot is empty.
          internals: also return the outputs of inner components.
          features: precomputed vision features. The encoder is then not run, and `images` not read.
          taps: numbers of the hidden states that are returned at the image positions, counted as in `LanguageModel`.
        """
        collected = {}
        if features is not None:
            projected = self.project(features)
        elif internals:
            features, states = self.vision(images.reshape(-1, *images.shape[2:]), hidden_states=True)
            projected = self._by_row(self.projector(features), images)
            collected = {"vision_hidden_states": states, "features": features, "projected": projected}
        else:
            projected = self.encode_images(images)
        embeddings = self.embed(tokens, projected, image_start)
        places = ImagePlaces(image_start, self.config.vision.num_tokens)
        output = self.language(embeddings, positions, segments, hidden_states=internals, taps=taps, places=places)
        if not internals:
            return RossOutput(output.hidden, output.taps, None)
        collected |= {"embeddings": embeddings, "hidden_states": output.hidden_states}
        return RossOutput(output.hidden, output.taps, collected)


def build_autoencoder(
    config: AutoencoderConfig | TinyAutoencoderConfig, dtype: DTypeLike = jnp.float32, remat: bool = False
) -> Autoencoder | TinyAutoencoder:
    """The module of an autoencoder. Both kinds have the same interface."""
    return {"kl": Autoencoder, "tiny": TinyAutoencoder}[config.kind](config, dtype, remat)


def components(config: RossConfig) -> dict[str, nn.Module]:
    """The module of every component that the config has, by its name in the parameter tree."""
    builders = {
        "vision": lambda config: config.build(),
        "projector": Projector,
        "language": LanguageModel,
        "denoiser": lambda config: config.build(),
        "autoencoder": build_autoencoder,
        "regressor": Regressor,
        "teacher": lambda config: config.build(),
    }
    return {name: build(getattr(config, name)) for name, build in builders.items() if getattr(config, name) is not None}


def abstract_params(config: RossConfig, dtype: DTypeLike = jnp.float32) -> dict[str, Any]:
    """Shapes of the whole parameter tree, `{component: {...: ShapeDtypeStruct}}`. Allocates nothing."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), _shapes(config))


@functools.cache
def _shapes(config: RossConfig) -> dict[str, Any]:
    """Shapes of all parameters. Cached, because tracing init takes seconds."""
    initialised = {
        name: jax.eval_shape(module.init, jax.random.key(0), *module.input_spec())
        for name, module in components(config).items()
    }
    return {name: variables.get("params", {}) for name, variables in initialised.items()}
