"""A model directory as an object that answers questions about images, and reconstructs them.

model = load("runs/demo/denoise/seed0/finetune")
answer = model.ask("photo.jpg", "How many marks?")
model.reconstruct("photo.jpg")[0].save("reconstruction.png")
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float
from PIL import Image

from ross_jax import checkpoints
from ross_jax.config import UserError, from_dict, required
from ross_jax.convert.generation import end_ids
from ross_jax.convert.sources import read_json
from ross_jax.data.batches import expand
from ross_jax.data.conversation import IGNORE, EncodedConversation
from ross_jax.data.encoders import build_image_encoder, build_prompt_encoder, stop_ids
from ross_jax.data.images import ImageConfig, ImageError, encoder_image_config
from ross_jax.data.tokenizer import check_fingerprint, find_tokenizer, load_tokenizer
from ross_jax.evaluation.images import to_uint8
from ross_jax.inference.chat import Chat
from ross_jax.inference.engine import Engine, Prompt, make_engine
from ross_jax.inference.generate import Decoding
from ross_jax.inference.prompts import AnyImage, AnyImages, Request, Resized, prompt_batches, read_images
from ross_jax.inference.reconstruct import reconstruct, visual_outputs
from ross_jax.inference.text import Answer
from ross_jax.models.quantization import Kind, check_quantization, is_quantised
from ross_jax.models.quantization import quantize as quantize_kernel
from ross_jax.models.ross import RossConfig, abstract_params
from ross_jax.objectives.objective import DEFAULT_SAMPLING, Sampling
from ross_jax.objectives.reconstruction import reconstructor
from ross_jax.sharding import MeshConfig, make_mesh, parameter_shardings
from ross_jax.storage import location
from ross_jax.tree import flatten, unflatten

TEXT_COMPONENTS = ("vision", "projector", "language")
RECONSTRUCTION_COMPONENTS = ("denoiser", "regressor", "autoencoder")
"""What reconstruction needs besides; which of them a model has depends on its kind of reconstruction."""


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
      mesh: devices over which parameters, and rows of `ask_many`, are split. None: the default device alone.
      mesh_config: its rules.
    """

    folder: Path
    config: RossConfig
    params: dict[str, Any]
    image_config: ImageConfig | None
    template: str | None
    dtype: Literal["float32", "bfloat16"] = "float32"
    condition_dropout: float = 0.0
    mesh: Mesh | None = None
    mesh_config: MeshConfig | None = None

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

    def ask_many(
        self,
        requests: Sequence[Request],
        rows: int = 8,
        on_answer: Callable[[int, str], None] | None = None,
        on_error: Callable[[int, UserError], None] | None = None,
    ) -> list[str]:
        """Answers several requests, `rows` at once; a row that has finished takes the next request.

        Args:
          rows: requests that are answered at once; on a mesh rounded up to a multiple of its replicas.
          on_answer: receives a request's number and its answer as soon as it is complete.
          on_error: receives the number of a request that cannot be used, and why. Its answer is empty, and the others
            are answered. None: the error is raised.

        Raises:
          UserError: as `ask`.
        """
        prepared, numbers = [], []
        for i, request in enumerate(requests):
            try:
                prepared.append(self.prepare(request))
                numbers.append(i)
            except UserError as error:
                if on_error is None:
                    raise
                on_error(i, error)

        def receive(number: int, ids: list[int], ended: bool) -> bool:
            answer = prepared[number][1]
            ended = answer.receive(ids, ended) or ended
            if ended and on_answer:
                on_answer(numbers[number], answer.text)
            return ended

        self.engine.run([prompt for prompt, _ in prepared], rows, receive)
        answers = dict(zip(numbers, (answer.text for _, answer in prepared), strict=True))
        return [answers.get(i, "") for i in range(len(requests))]

    def chat(self) -> Chat:
        """A conversation that keeps its keys and values between turns."""
        return Chat(self)

    def prepare(self, request: Request) -> tuple[Prompt, Answer]:
        """A request's prompt with room for its images, and the answer to come. Errors are those of `ask`."""
        images = self._read(request.images)
        ids = build_prompt_encoder(self._template, self.tokenizer)(request.record(len(images)))
        self._check_ids(ids)
        count = self.config.vision.num_tokens if images else 0
        expanded = expand(EncodedConversation(ids, np.full_like(ids, IGNORE)), count)
        limit, length = request.max_new_tokens, len(expanded.tokens)
        if self.context is not None:
            if length >= self.context:
                raise UserError(
                    f"the prompt has {length} tokens, {count * len(images)} of them for {len(images)} image(s), and "
                    f"the model was trained with at most {self.context}; shorten the question or its history"
                )
            limit = min(limit, self.context - length)
        answer = Answer(self.tokenizer, self._stops, request.stop, request.on_text)
        tokens = np.asarray(expanded.tokens)
        starts = [int(start) for start in expanded.image_start]
        return Prompt(tokens, starts, images, limit, request.drawing, answer.watched), answer

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
        encoded = encode({"id": "image", "image": "image"})
        self._check_ids(encoded.input_ids)
        prompts = [expand(encoded, tokens)] * len(resized)
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

    @cached_property
    def engine(self) -> Engine:
        """The parameters that answer, ready to generate."""
        params = {name: tree for name, tree in self.params.items() if name in TEXT_COMPONENTS}
        return make_engine(Decoding(self.config, self.dtype, self._stops), params, self.mesh, self.mesh_config)

    @cached_property
    def context(self) -> int | None:
        """Longest prompt and answer, in tokens, for which the language model was trained; None if no file says it.

        The files of an imported language model say it. One that was trained from the beginning has seen rows so long.
        """
        for name in ("language", "ross"):
            path = self.folder / "files" / name / "config.json"
            if path.is_file():
                found = read_json(path).get("max_position_embeddings")
                if isinstance(found, int) and found > 0:
                    return found
        return checkpoints.read_manifest(self.folder).get("context")

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

    def _check_ids(self, ids: np.ndarray) -> None:
        known = self.config.language.vocab_size
        if ids.max(initial=0) >= known:
            raise UserError(
                f"{self.folder}: its tokenizer gives id {ids.max()}, but its language model embeds {known}; import the "
                "model with its own tokenizer"
            )

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


_visual_outputs = jax.jit(visual_outputs, static_argnames=("config", "dtype"))


def load(
    folder: str | Path,
    components: tuple[str, ...] | None = None,
    template: str | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    mesh: MeshConfig | None = None,
    quantize: Kind | None = None,
    devices: Sequence[Any] | None = None,
) -> Model:
    """Restores a model.

    Args:
      folder: a model directory, or the directory of a run, of which the latest step is taken.
      components: names of the components to load. None: those that answer and, where the model has them, those that
        reconstruct.
      template: conversation template. None: the one that the model was trained with.
      dtype: dtype of parameters and activations. None: parameters as they are stored, activations in float32.
      mesh: splits the parameters over devices. None: the first device of this process alone.
      quantize: `int8` or `fp8`: the language model's matrices are kept in 8 bits; needs qwix. None: they are not.
      devices: those of the mesh. None: all, of all processes.

    Raises:
      ConfigError: a mesh that does not fit the devices.
      UserError: no model there, or one without such a component; qwix is not installed.
    """
    folder = location(folder)
    check_quantization(quantize)
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
    shapes = {path: leaf for path, leaf in flatten(abstract_params(config)).items() if path.split("/")[0] in loaded}
    made = None if mesh is None else make_mesh(mesh, devices)
    if made is None:
        shardings = dict.fromkeys(shapes, jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    else:
        shardings = parameter_shardings(shapes, made, mesh)
    leaves = {
        path: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype or stored[path].dtype), sharding=shardings[path])
        for path, leaf in shapes.items()
    }
    params = _restore(folder, leaves, quantize)
    how = (config.image_mean, config.image_std, manifest.get("image_mode", "pad"), config.image_resample)
    images = config.vision and encoder_image_config(config.vision.kind, config.vision.image_size, *how)
    dropout = manifest.get("reconstruction", {}).get("condition_dropout", 0.0)
    settings = (template or manifest.get("template"), dtype or "float32", dropout, made, mesh)
    return Model(folder, config, params, images, *settings)


def _restore(folder: Path, leaves: dict[str, jax.ShapeDtypeStruct], kind: Kind | None) -> dict[str, Any]:
    """Parameters. Those that are quantised are restored one after another, so that one at most has its full size."""
    alone = {path: leaf for path, leaf in leaves.items() if kind and is_quantised(path)}
    params = flatten(checkpoints.restore_model(folder, unflatten({p: x for p, x in leaves.items() if p not in alone})))
    for path, leaf in alone.items():
        restored = flatten(checkpoints.restore_model(folder, unflatten({path: leaf})))
        params[path] = quantize_kernel(restored.pop(path), required(kind))
    return unflatten(params)
