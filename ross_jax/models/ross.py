"""Ross: the composition. Pictures and text to hidden states, and the visual outputs among them.

Nothing here belongs to the reconstruction loss; denoiser and autoencoder are its own (`ross_jax.objectives`), and only
their configs and parameters live beside the model's.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from ross_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from ross_jax.models.denoiser import Denoiser, DenoiserConfig
from ross_jax.models.language import LanguageConfig, LanguageModel
from ross_jax.models.layers import RematPolicy
from ross_jax.models.projector import Projector, ProjectorConfig
from ross_jax.models.regressor import Regressor, RegressorConfig
from ross_jax.models.tiny_autoencoder import TinyAutoencoder, TinyAutoencoderConfig
from ross_jax.models.vision import VisionConfig, VisionEncoder

TARGET_PIXELS = 16
"""Pixels per picture token, along a side, in what the reconstruction targets see."""


@dataclasses.dataclass(frozen=True)
class RossConfig:
    """The components of a model. One that is absent has no parameters: LLaVA has nothing that reconstructs.

    Attributes:
      denoiser, regressor: what reads the visual outputs; at most one of them.
      autoencoder, teacher: frozen, of what the targets are made.
      image_mean, image_std: of the vision encoder's normalisation, in [0, 1] units.
      teacher_mean, teacher_std: of the teacher's.
    """

    vision: VisionConfig | None = None
    projector: ProjectorConfig | None = None
    language: LanguageConfig | None = None
    denoiser: DenoiserConfig | None = None
    autoencoder: AutoencoderConfig | TinyAutoencoderConfig | None = None
    regressor: RegressorConfig | None = None
    teacher: VisionConfig | None = None
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    teacher_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    teacher_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

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
            "regressor.out_size": (self.regressor and self.regressor.out_size),
            "channels of the autoencoder's latents per picture token": self.latent_size,
            "teacher.hidden_size": (self.teacher and self.teacher.hidden_size),
            "channels of a token's pixels": 3 * TARGET_PIXELS**2,
        }

        def same(left: str, right: str):
            if None not in (sizes[left], sizes[right]) and sizes[left] != sizes[right]:
                raise ValueError(f"{left} is {sizes[left]} but {right} is {sizes[right]}")

        same("projector.in_size", "vision.hidden_size")
        same("projector.out_size", "language.hidden_size")
        same("denoiser.condition_size", "language.hidden_size")
        same("denoiser.grid", "vision.grid")
        same("denoiser.latent_size", "channels of the autoencoder's latents per picture token")
        if self.regressor:
            same("regressor.condition_size", "language.hidden_size")
            of_target = {
                "pixels": "channels of a token's pixels",
                "latents": "channels of the autoencoder's latents per picture token",
                "features": "teacher.hidden_size",
            }
            same("regressor.out_size", of_target[self.regressor.target])
        if self.denoiser and self.regressor:
            raise ValueError("a model has a denoiser or a regressor, not both")

    @property
    def latent_window(self) -> int | None:
        """Latents per picture token, along a side; None without an autoencoder.

        Raises:
          ValueError: a picture token is smaller than a latent.
        """
        if self.autoencoder is None:
            return None
        if TARGET_PIXELS % self.autoencoder.downsampling:
            raise ValueError(
                f"autoencoder.downsampling is {self.autoencoder.downsampling}, which does not divide the "
                f"{TARGET_PIXELS} pixels of a picture token"
            )
        return TARGET_PIXELS // self.autoencoder.downsampling

    @property
    def latent_size(self) -> int | None:
        """Values of a latent token: those of a window, all channels; None without an autoencoder."""
        return self.autoencoder and self.autoencoder.latent_channels * self.latent_window**2

    @property
    def target_size(self) -> int:
        """Side, in pixels, of the picture that the reconstruction targets are made of."""
        return self.vision.grid * TARGET_PIXELS


class RossOutput(NamedTuple):
    """What `Ross` computes.

    Attributes:
      hidden: final-norm hidden states, input of the text loss.
      visual_outputs: those at the image positions; zeros in empty slots.
      internals: on request: `vision_hidden_states`, `features`, `projected`, `embeddings`, `hidden_states`.
    """

    hidden: Float[Array, "batch seq embed"]
    visual_outputs: Float[Array, "batch images tokens embed"]
    internals: dict[str, Any] | None


def normalise(
    config: RossConfig, images: UInt8[Array, "*batch height width 3"], dtype: DTypeLike = jnp.float32
) -> Float[Array, "*batch height width 3"]:
    """uint8 pictures to the encoder's input."""
    mean, std = jnp.asarray(config.image_mean, jnp.float32), jnp.asarray(config.image_std, jnp.float32)
    return ((images.astype(jnp.float32) / 255.0 - mean) / std).astype(dtype)


def scatter_images(
    embeddings: Float[Array, "batch seq embed"],
    projected: Float[Array, "batch images tokens embed"],
    image_start: Int[Array, "batch images"],
) -> Float[Array, "batch seq embed"]:
    """Writes each picture's tokens over its place in the row; a picture that does not fit writes nothing.

    Args:
      image_start: of each picture; the row's length where the slot is empty. Pictures of a row do not overlap.
    """
    return _write(embeddings, projected.astype(embeddings.dtype), image_start)


# A picture is one piece, not an index per token, for which TPUs need many times the code. All of it goes row by row:
# each row only touches itself, so that sharding the batch needs no communication. Writing and reading are each other's
# derivatives; those that JAX finds are compiled into strips of columns.


@jax.custom_vjp
def _write(embeddings: Array, images: Array, image_start: Array) -> Array:
    if images.shape[2] > embeddings.shape[1]:
        return embeddings
    piece = jax.lax.ScatterDimensionNumbers((1, 2), inserted_window_dims=(), scatter_dims_to_operand_dims=(0,))
    write = functools.partial(jax.lax.scatter, dimension_numbers=piece, mode="drop", unique_indices=True)
    return jax.vmap(write)(embeddings, image_start[..., None], images)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def gather_images(
    hidden: Float[Array, "batch seq embed"], image_start: Int[Array, "batch images"], tokens: int
) -> Float[Array, "batch images tokens embed"]:
    """Reads the hidden states at each picture's place; zeros for those that `scatter_images` does not write."""
    last = hidden.shape[1] - tokens
    if last < 0:
        return jnp.zeros((*image_start.shape, tokens, hidden.shape[-1]), hidden.dtype)

    def read(row: Array, start: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(row, start, tokens)

    images = jax.vmap(jax.vmap(read, (None, 0)))(hidden, jnp.minimum(image_start, last))
    return jnp.where((image_start <= last)[..., None, None], images, 0)


def _write_forward(embeddings: Array, images: Array, image_start: Array):
    return _write(embeddings, images, image_start), (images, image_start)


def _write_backward(residuals: tuple[Array, Array], gradient: Array):
    images, image_start = residuals
    tokens, length = images.shape[2], gradient.shape[1]
    offset = jnp.arange(length) - image_start[..., None]
    covered = ((offset >= 0) & (offset < tokens) & (image_start <= length - tokens)[..., None]).any(axis=1)
    return jnp.where(covered[..., None], 0, gradient), gather_images(gradient, image_start, tokens), None


def _gather_forward(hidden: Array, image_start: Array, tokens: int):
    return gather_images(hidden, image_start, tokens), (hidden, image_start)


def _gather_backward(tokens: int, residuals: tuple[Array, Array], gradient: Array):
    hidden, image_start = residuals
    return _write(jnp.zeros_like(hidden), gradient, image_start), None


_write.defvjp(_write_forward, _write_backward)
gather_images.defvjp(_gather_forward, _gather_backward)


class Ross(nn.Module):
    """Vision encoder, projector and language model as one function of (parameters, batch)."""

    config: RossConfig
    dtype: DTypeLike = jnp.float32
    remat: RematPolicy = "none"

    def input_spec(self, batch: int = 1, images: int = 1, length: int | None = None):
        """Shapes of the arguments of `__call__`."""
        vision = self.config.vision
        ids = jax.ShapeDtypeStruct((batch, length or images * vision.num_tokens + 2), jnp.int32)
        pixels = jax.ShapeDtypeStruct((batch, images, vision.image_size, vision.image_size, 3), jnp.float32)
        return (ids, ids, ids, pixels, jax.ShapeDtypeStruct((batch, images), jnp.int32))

    def setup(self):
        cfg = self.config
        # Where the encoder is frozen nothing of it is kept for a backward pass, so nothing is recomputed either.
        self.vision = VisionEncoder(cfg.vision, self.dtype, self.remat)
        self.projector = Projector(cfg.projector, self.dtype)
        self.language = LanguageModel(cfg.language, self.dtype, self.remat)

    def encode_images(
        self, images: Float[Array, "batch images height width 3"]
    ) -> Float[Array, "batch images tokens embed"]:
        """Projected tokens of each picture."""
        features = self.vision(images.reshape(-1, *images.shape[2:]))
        return self._by_row(self.projector(features), images)

    def project(self, features: Float[Array, "batch images tokens width"]) -> Float[Array, "batch images tokens embed"]:
        """The same of features that the vision encoder has computed before."""
        return self._by_row(self.projector(features.reshape(-1, *features.shape[2:])), features)

    def _by_row(self, projected: Float[Array, "images tokens embed"], images: Array):
        # No -1 for the tokens: a batch without pictures would leave it undecided.
        return projected.reshape(*images.shape[:2], *projected.shape[1:])

    def embed(
        self,
        tokens: Int[Array, "batch seq"],
        projected: Float[Array, "batch images tokens embed"],
        image_start: Int[Array, "batch images"],
    ) -> Float[Array, "batch seq embed"]:
        """Embeddings of text with the pictures in their places."""
        return scatter_images(self.language.embed(tokens), projected, image_start)

    def logits(self, hidden: Float[Array, "... embed"]) -> Float[Array, "... vocab"]:
        """Next-token scores, float32."""
        return self.language.logits(hidden)

    def head_kernel(self) -> Float[Array, "embed vocab"]:
        """What `logits` multiplies with."""
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
    ) -> RossOutput:
        """Runs the model on a batch as design and `ross_jax.data` lay it out.

        Args:
          tokens: text ids; anything at image positions.
          positions, segments: of the decoder.
          images: normalised pictures; what an empty slot holds is ignored.
          image_start: where each picture's tokens begin; the row's length where the slot is empty.
          internals: also return what the components computed.
          features: of the vision encoder, which is then not run, and `images` not looked at.
        """
        count = self.config.vision.num_tokens
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
        output = self.language(embeddings, positions, segments, hidden_states=internals)
        visual_outputs = gather_images(output.hidden, image_start, count)
        if not internals:
            return RossOutput(output.hidden, visual_outputs, None)
        collected |= {"embeddings": embeddings, "hidden_states": output.hidden_states}
        return RossOutput(output.hidden, visual_outputs, collected)


def build_autoencoder(
    config: AutoencoderConfig | TinyAutoencoderConfig, dtype: DTypeLike = jnp.float32, remat: bool = False
) -> Autoencoder | TinyAutoencoder:
    """The module of either kind; their interface is the same."""
    return {"kl": Autoencoder, "tiny": TinyAutoencoder}[config.kind](config, dtype, remat)


def components(config: RossConfig) -> dict[str, nn.Module]:
    """The module of every component that the config has, by its name in the parameter tree."""
    builders = {
        "vision": VisionEncoder,
        "projector": Projector,
        "language": LanguageModel,
        "denoiser": Denoiser,
        "autoencoder": build_autoencoder,
        "regressor": Regressor,
        "teacher": VisionEncoder,
    }
    return {name: build(getattr(config, name)) for name, build in builders.items() if getattr(config, name) is not None}


def abstract_params(config: RossConfig, dtype: DTypeLike = jnp.float32) -> dict[str, Any]:
    """Shapes of the whole parameter tree, nothing allocated: `{component: {...: ShapeDtypeStruct}}`."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), _shapes(config))


@functools.cache
def _shapes(config: RossConfig) -> dict[str, Any]:
    """Of all parameters, which take seconds to find out."""
    made = {
        name: jax.eval_shape(module.init, jax.random.key(0), *module.input_spec())
        for name, module in components(config).items()
    }
    return {name: variables.get("params", {}) for name, variables in made.items()}
