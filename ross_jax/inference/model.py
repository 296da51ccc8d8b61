"""A model directory as an object that answers questions about images, and reconstructs them.

model = load("runs/demo/denoise/seed0/finetune")
answer = model.ask("photo.jpg", "How many marks?")
model.reconstruct("photo.jpg")[0].save("reconstruction.png")
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from PIL import Image

from ross_jax import checkpoints
from ross_jax.config import UserError, from_dict, required
from ross_jax.convert.generation import end_ids
from ross_jax.data.batches import Batch, expand
from ross_jax.data.conversation import IGNORE, EncodedConversation
from ross_jax.data.encoders import build_image_encoder, build_prompt_encoder, stop_ids
from ross_jax.data.images import ImageConfig, ImageError, encoder_image_config
from ross_jax.data.tokenizer import check_fingerprint, find_tokenizer, load_tokenizer
from ross_jax.evaluation.images import to_uint8
from ross_jax.inference.generate import generate
from ross_jax.inference.prompts import AnyImage, AnyImages, Request, Resized, prompt_batches, read_images
from ross_jax.inference.reconstruct import reconstruct, visual_outputs
from ross_jax.models.ross import RossConfig, abstract_params, normalise
from ross_jax.objectives.objective import DEFAULT_SAMPLING, Sampling
from ross_jax.objectives.reconstruction import reconstructor
from ross_jax.tree import flatten, unflatten

TEXT_COMPONENTS = ("vision", "projector", "language")
RECONSTRUCTION_COMPONENTS = ("denoiser", "regressor", "autoencoder")
"""What reconstruction needs besides; which of them a model has depends on its kind of reconstruction."""
_MULTIPLE = 32
"""Prompts are padded to a multiple of this length, and so is the room for answers: questions share programs."""


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A restored model. Make one with `load`.

    Attributes:
      folder: the model directory.
      config: sizes of the components.
      params: parameters of the components that were loaded.
      image_config: how images are resized; None for a model without a vision encoder.
      template: conversation template; None if the directory does not name one.
      dtype: dtype of activations.
      condition_dropout: share of draws for which the denoiser was trained without visual outputs.
    """

    folder: Path
    config: RossConfig
    params: dict[str, Any]
    image_config: ImageConfig | None
    template: str | None
    dtype: Literal["float32", "bfloat16"] = "float32"
    condition_dropout: float = 0.0

    def ask(
        self,
        images: AnyImages,
        prompt: str,
        *,
        history: Sequence[Sequence[str]] | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        on_text: Callable[[str], None] | None = None,
    ) -> str:
        """Answers a question about images. Arguments are the fields of `Request`.

        Raises:
          UserError: an argument or an image that cannot be used, no template, or a tokenizer that does not fit it.
        """
        drawing = (temperature, top_k, top_p, min_p, repetition_penalty, seed, stop, on_text)
        return self.ask_many([Request(images, prompt, history or (), max_new_tokens, *drawing)])[0]

    def ask_many(self, requests: Sequence[Request], rows: int = 8) -> list[str]:
        """Answers several requests, `rows` at once. Errors are those of `ask`."""
        if not requests:
            return []
        encode = build_prompt_encoder(self._template, self.tokenizer)
        images = [self._read(request.images) for request in requests]
        ids = [encode(request.record(len(own))) for request, own in zip(requests, images, strict=True)]
        tokens, size = (self.config.vision.num_tokens, self.image_config.size) if any(images) else (0, 1)
        prompts = [expand(EncodedConversation(each, np.full_like(each, IGNORE)), tokens) for each in ids]
        limits = [request.max_new_tokens for request in requests]
        room, answers = _rounded(max(limits)), []
        rows = min(rows, len(requests))
        for batch in prompt_batches(prompts, images, rows, tokens, size, _MULTIPLE):
            batch["limits"] = np.zeros(rows, np.int32)
            own = limits[len(answers) : len(answers) + rows]
            batch["limits"][: len(own)] = own
            generated = _generated(self.config, self.params, batch, room, self._stops, self.dtype)
            answers += [self._decode(ids[:length]) for ids, length in zip(*generated, strict=True)][: len(own)]
        return answers

    def visual_outputs(self, images: AnyImages, rows: int = 8) -> Float[np.ndarray, "images tokens embed"]:
        """Hidden states of the language model at the positions of each image's tokens, after its final norm.

        Each image stands alone, in front of an empty question. A causal model's states there do not depend on what
        follows.

        Args:
          images: one image or several.
          rows: images that are computed at once.

        Raises:
          UserError: an image that cannot be used, no template, or a tokenizer that does not fit it.
        """
        encode = build_image_encoder(self._template, self.tokenizer)
        resized = self._read(images)
        if not resized:
            raise ImageError("images: there is none")
        tokens = self.config.vision.num_tokens
        prompts = [expand(encode({"id": "image", "image": "image"}), tokens)] * len(resized)
        own = [[image] for image in resized]
        batches = prompt_batches(prompts, own, min(rows, len(own)), tokens, self.image_config.size)
        outputs = [np.asarray(_visual_outputs(self.config, self.params, batch, self.dtype)) for batch in batches]
        return np.concatenate(outputs)[: len(own), 0].astype(np.float32)

    def reconstruct(
        self, images: AnyImages, sampling: Sampling = DEFAULT_SAMPLING, seed: int = 0, rows: int = 8
    ) -> list[Image.Image]:
        """Reconstructs images from their visual outputs.

        Args:
          images: one image or several.
          sampling: how a denoiser samples. A regressor ignores it.
          seed: seed of the noise. An image's noise depends on its place in the list alone.
          rows: images that are computed at once.

        Raises:
          UserError: the model makes no images, or cannot be guided; errors of `visual_outputs`.
        """
        self.check_reconstruction(sampling)
        outputs = self.visual_outputs(images, rows)
        pixels = reconstruct(self.config, self.params, outputs, sampling, seed, rows).pixels
        return [Image.fromarray(image) for image in to_uint8(pixels)]

    def check_reconstruction(self, sampling: Sampling = DEFAULT_SAMPLING) -> None:
        """Raises UserError if the model cannot reconstruct images in this way."""
        self._check_sees()
        if reconstructor(self.config) is None:
            raise UserError(
                f"{self.folder}: this model makes no images; that takes a denoiser with its autoencoder, or a "
                "regressor of pixels or latents"
            )
        if sampling.guidance != 1.0 and self.config.denoiser is None:
            raise UserError(f"guidance {sampling.guidance:g}: {self.folder} has no denoiser, and only that is guided")

    @cached_property
    def tokenizer(self) -> Any:
        """The directory's tokenizer.

        Raises:
          UserError: the directory has none, it cannot be read, or it is not the one that the model was trained with.
        """
        folder = find_tokenizer(self.folder / "files")
        if folder is None:
            raise UserError(
                f"{self.folder}: has no tokenizer; import it with the tokenizer's files beside the language model's, "
                f"or copy them into {self.folder / 'files' / 'language'}"
            )
        tokenizer = load_tokenizer(folder)
        check_fingerprint(tokenizer, checkpoints.read_manifest(self.folder).get("tokenizer"), f"tokenizer {folder}")
        return tokenizer

    @property
    def _template(self) -> str:
        if self.template is None:
            raise UserError(f"{self.folder}: does not say its conversation template; name one with template=")
        return self.template

    @cached_property
    def _stops(self) -> tuple[int, ...]:
        """Ids that end an answer: those with which training ended answers, and those of the imported model."""
        folders = [self.folder / "files" / name for name in ("language", "ross")]
        imported = [each for folder in folders for each in end_ids(folder)]
        return tuple(dict.fromkeys([*stop_ids(self._template, self.tokenizer), *imported]))

    def _check_sees(self) -> None:
        missing = [name for name in TEXT_COMPONENTS if name not in self.params]
        if missing or self.image_config is None:
            raise UserError(
                f"{self.folder}: no {', '.join(missing)} in the loaded model, so it cannot see images; ask without "
                "images, or import or load these components, too"
            )

    def _read(self, images: AnyImages) -> list[Resized]:
        """Images as the vision encoder takes them, if there are any."""
        if not isinstance(images, AnyImage) and not len(images):
            return []
        self._check_sees()
        return read_images(images, required(self.image_config))

    def _decode(self, ids: np.ndarray) -> str:
        ends = bool(ids.size) and ids[-1] in self._stops
        if ends and not self.tokenizer.decode(ids[-1:]).endswith("\n"):  # the end of `plain` can hold text: `.\n`
            ids = ids[:-1]
        return self.tokenizer.decode(ids, skip_special_tokens=False).strip()


@partial(jax.jit, static_argnames=("config", "max_new_tokens", "stops", "dtype"))
def _answer(
    config: RossConfig, params: Any, batch: dict[str, Array], max_new_tokens: int, stops: tuple[int, ...], dtype: str
) -> tuple[Int[Array, "batch new"], Int[Array, " batch"]]:
    """Ids and their number. `batch["limits"]` has each row's own limit."""
    images = normalise(config, batch["images"])
    prompts = (batch["tokens"], batch["segments"], images, batch["image_start"])
    result = generate(config, params, *prompts, max_new_tokens, stops, dtype, limits=batch["limits"])
    return result.tokens, result.lengths


def _generated(config: RossConfig, params: Any, batch: Batch, room: int, *settings: Any) -> list[np.ndarray]:
    """The results of `_answer`.

    Raises:
      UserError: the devices' memory cannot hold the keys and values of prompts and answers.
    """
    try:
        return [np.asarray(each) for each in _answer(config, params, batch, room, *settings)]
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        rows, length = batch["tokens"].shape
        raise UserError(
            f"not enough memory for {rows} prompt(s) of {length} tokens and answers of up to {room}; lower "
            "max_new_tokens or rows, or take dtype bfloat16"
        ) from error


def _rounded(length: int) -> int:
    return -(-length // _MULTIPLE) * _MULTIPLE


_visual_outputs = jax.jit(visual_outputs, static_argnames=("config", "dtype"))


def load(
    folder: str | Path,
    components: tuple[str, ...] | None = None,
    template: str | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
) -> Model:
    """Restores a model on the default device.

    Args:
      folder: a model directory, or the directory of a run, of which the latest step is taken.
      components: names of the components to load. None: those that answer and, where the model has them, those that
        reconstruct.
      template: conversation template. None: the one that the model was trained with.
      dtype: dtype of parameters and activations. None: parameters as they are stored, activations in float32.

    Raises:
      UserError: no model there, or one without such a component.
    """
    folder = Path(folder)
    manifest = checkpoints.read_manifest(folder)
    config = from_dict(RossConfig, manifest["config"], f"{folder}: config")
    missing = [name for name in components or ("language",) if getattr(config, name) is None]
    if missing:
        names = ", ".join(missing)
        raise UserError(
            f"{folder}: this model has no {names}; import it together with a checkpoint that holds {names}: "
            "launch/convert.py import --from ... --from ..."
        )
    loaded = TEXT_COMPONENTS + RECONSTRUCTION_COMPONENTS if components is None else components
    stored = flatten(checkpoints.model_abstract(folder))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    leaves = {
        path: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype or stored[path].dtype), sharding=device)
        for path, leaf in flatten(abstract_params(config)).items()
        if path.split("/")[0] in loaded
    }
    params = checkpoints.restore_model(folder, unflatten(leaves))
    how = (config.image_mean, config.image_std, manifest.get("image_mode", "pad"), config.image_resample)
    images = config.vision and encoder_image_config(config.vision.kind, config.vision.image_size, *how)
    dropout = manifest.get("reconstruction", {}).get("condition_dropout", 0.0)
    return Model(folder, config, params, images, template or manifest.get("template"), dtype or "float32", dropout)
