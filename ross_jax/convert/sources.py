"""Opens foreign checkpoints: finds out what a folder or hub id holds, and reads its settings."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ross_jax import checkpoints
from ross_jax.config import UserError, nearest
from ross_jax.convert import language, recognise, vision
from ross_jax.convert.tensors import TensorFiles, open_tensors
from ross_jax.directories import check_sums
from ross_jax.hub import SECONDS, is_hub_id, say_asked
from ross_jax.json_text import load_json
from ross_jax.storage import location

Kind = Literal["ross", "adapters", "vision", "language", "autoencoder", "teacher", "llava"]

ADAPTERS = ("mm_projector", "mm_inv_projector")
"""File names, without suffix, of the adapters that stage 1 of the reference saves."""
ROSS_FAMILIES = {
    "ross_qwen2": "qwen2",
    "ross_llama": "llama",
    "llava_qwen": "qwen2",
    "llava_qwen2": "qwen2",
    "llava_llama": "llama",
    "llava": "llama",
}
"""`model_type` of full checkpoints -> family of the language model."""
_PASSED_THROUGH = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
_NOT_PASSED = {"config.json", "model_index.json", "trainer_state.json"}


_LLAVA = "LlavaForConditionalGeneration"
_LORA = re.compile(r"\blora_(A|B|E|embedding_[AB])\b")


class SourceError(UserError):
    """A folder that is no checkpoint, or a checkpoint of a kind that is not supported."""


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened foreign checkpoint.

    Attributes:
      origin: folder or hub id as the user named it.
      folder: where its files are.
      kind: what it holds: one component, the adapters of stage 1, a full checkpoint ("ross"), or transformers' LLaVA.
      settings: parsed config.json. Empty for adapters without one.
      files: opened weights.
      within: "llava" for a component of transformers' LLaVA, which has no folder of its own.
      contents: name -> JSON object, for files that such a component would have.
      copied: its share of the extra files.
      template: conversation template, if the folder tells it.
    """

    origin: str
    folder: Path
    kind: Kind
    settings: dict[str, Any]
    files: list[TensorFiles]
    within: str = ""
    contents: Mapping[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    copied: Sequence[Path] = ()
    template: str | None = None

    def extra_files(self) -> list[Path]:
        """Files that import and export copy: tokenizer, processor, generation settings."""
        if self.within:
            return list(self.copied)
        templates = sorted(self.folder.glob("additional_chat_templates/*.jinja"))
        return [path for path in sorted(self.folder.iterdir()) if _travels(path)] + templates


def _is_file(path: Path) -> bool:
    """Whether a file is there. False for paths that this system forbids: they may come from another machine."""
    try:
        return path.is_file()
    except OSError:
        return False


def _travels(path: Path) -> bool:
    weights_index = ".index." in path.name  # also model.safetensors.index.fp16.json
    return path.is_file() and path.suffix in _PASSED_THROUGH and path.name not in _NOT_PASSED and not weights_index


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      SourceError: no such file, or not a JSON object. Names the file and the position.
    """
    try:
        if recognise.pointers([path]):
            raise SourceError(f"{path}: not valid JSON but a git-lfs pointer; {recognise.FETCH}")
        value = load_json(path)
    except FileNotFoundError:
        raise SourceError(f"{path}: no such file") from None
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise SourceError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise SourceError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def open_source(origin: str) -> Source:
    """Opens a folder. If there is none of that name, downloads the hub id `owner/name` or `owner/name/subfolder`.

    Raises:
      SourceError: no such path, no checkpoint, or a kind that is not supported.
      TensorError: weights that cannot be read.
      DamagedError: a file is not the one that the folder's `SHA256SUMS` lists.
    """
    folder = location(origin)
    try:
        if not folder.exists():
            if not is_hub_id("/".join(origin.split("/")[:2])) or origin.count("/") > 2:
                raise SourceError(f"{origin}: no such folder")
            say_asked(origin)
            folder = download(origin)
        return _open_folder(origin, folder)
    except OSError as error:
        raise SourceError(f"{folder}: cannot be read ({error.strerror or error})") from error


def _open_folder(origin: str, folder: Path) -> Source:
    if folder.is_file():
        raise SourceError(f"{origin}: {recognise.of_file(folder)}")
    if (folder / checkpoints.MANIFEST).is_file():
        raise SourceError(
            f"{origin}: is a model directory of this package already; load it, or train from it with config.init"
        )
    if (folder / "model_index.json").is_file() and (folder / "vae").is_dir():
        folder = folder / "vae"  # the autoencoder of a diffusion pipeline
    check_sums(folder)
    has_config = (folder / "config.json").is_file()
    wrong = recognise.deltas(folder)
    if wrong:
        raise SourceError(f"{origin}: {wrong}")
    settings = read_json(folder / "config.json") if has_config else {}
    adapters = [path for stem in ADAPTERS for path in _adapter(folder, stem)]
    if not adapters and not _has_weights(folder):
        wrong = recognise.something_else(folder)
        if wrong:
            raise SourceError(f"{origin}: {wrong}")
    kind = _kind(settings, folder) if has_config or not adapters else "adapters"
    if kind == "ross" and adapters and not _has_weights(folder):
        kind = "adapters"
    files = [open_tensors(path) for path in adapters] if kind == "adapters" else [open_tensors(folder)]
    source = Source(origin, folder, kind, settings, files)
    pointers = recognise.pointers(source.extra_files())
    if pointers:
        raise SourceError(f"{folder}: git-lfs pointers, not the files: {', '.join(pointers)}; {recognise.FETCH}")
    unmerged = [key for each in files for key in each if _LORA.search(key)]
    if unmerged:
        raise SourceError(
            f"{origin}: holds unmerged LoRA deltas, such as {unmerged[0]}; merge them into the model first"
        )
    return source


def open_teacher(origin: str) -> Source:
    """Opens the vision encoder whose features are reconstruction targets.

    Raises:
      SourceError: as `open_source`, or a checkpoint that is no vision encoder.
    """
    source = open_source(origin)
    if source.kind != "vision":
        raise SourceError(f"--teacher {origin}: is a {source.kind} checkpoint; expected one of SigLIP, CLIP or DINOv2")
    return dataclasses.replace(source, kind="teacher")


def _adapter(folder: Path, stem: str) -> list[Path]:
    found = [folder / f"{stem}{suffix}" for suffix in (".safetensors", ".bin")]
    return [path for path in found if path.is_file()][:1]


def _has_weights(folder: Path) -> bool:
    names = [path.name for path in folder.iterdir()]
    return any(re.match(r"(diffusion_)?(pytorch_)?model.*\.(safetensors|bin)(\.index\.json)?$", name) for name in names)


def _kind(settings: Mapping[str, Any], folder: Path) -> Kind:
    where = folder / "config.json"
    if not settings:
        raise SourceError(f"{where}: missing or empty; it decides all sizes")
    if settings.get("_class_name") is not None:
        return "autoencoder"
    model_type = settings.get("model_type")
    if not isinstance(model_type, str):
        raise SourceError(f"{where}: model_type is {model_type!r}, expected a string")
    if model_type == "llava" and ("text_config" in settings or _LLAVA in str(settings.get("architectures"))):
        return "llava"
    if model_type in ROSS_FAMILIES:
        return "ross"
    if model_type in language.FAMILIES:
        return "language"
    if model_type in vision.model_types():
        return "vision"
    known = [*ROSS_FAMILIES, *language.FAMILIES, *vision.model_types()]
    raise SourceError(
        f"{where}: model_type {model_type!r} is not supported{nearest(model_type, known)}; expected one of {known}"
    )


def download(origin: str) -> Path:
    """Downloads a repository of the hub and returns its folder. Of safetensors and .bin weights, the former.

    Raises:
      SourceError: offline, no such repository, or no access to it.
    """
    import huggingface_hub

    owner, name, *subfolder = origin.split("/")
    prefix = f"{subfolder[0]}/" if subfolder else ""
    try:
        # `list_repo_files` would retry for half a minute where there is no connection.
        found = huggingface_hub.HfApi().model_info(f"{owner}/{name}", timeout=SECONDS).siblings or ()
        files = [file.rfilename for file in found]
        here = [file.removeprefix(prefix) for file in files if file.startswith(prefix)]
        if "model_index.json" in here and not prefix:
            prefix = "vae/"
            here = [file.removeprefix(prefix) for file in files if file.startswith(prefix)]
        if not here:
            raise FileNotFoundError(f"it has no folder {prefix}")
        weights = ".safetensors" if any(f.endswith(".safetensors") and "/" not in f for f in here) else ".bin"
        suffixes = (weights, *_PASSED_THROUGH)
        names = [prefix + file for file in here if "/" not in file and file.endswith(suffixes)]
        root = huggingface_hub.snapshot_download(f"{owner}/{name}", allow_patterns=names)
    except Exception as error:  # the hub's client and its HTTP library raise errors of many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(
            f"{origin}: no such folder, and the hub repository of that name could not be fetched ({reason}). "
            "Give a local folder, or go online (and `hf auth login` for gated models)"
        ) from error
    return Path(root) / prefix


def resolve_settings(
    value: Any, checkpoint: Path, known: Mapping[str, dict[str, Any]], given: Path | None, field: str, flag: str
) -> tuple[dict[str, Any], Path | None]:
    """Finds the settings of a component that the config.json of a full checkpoint points to.

    Args:
      value: value of the field: a hub id, an absolute path, or a path relative to the checkpoint's grandparent folder.
      checkpoint: folder of the checkpoint.
      known: settings of published models by hub id.
      given: folder that the user named instead.
      field: name of the field, for messages.
      flag: name of the flag, for messages.

    Returns:
      The settings, and the folder they are from. None for published settings.

    Raises:
      SourceError: no settings found. Says which flag to use.
    """
    candidates = [given] if given else []
    if not given and isinstance(value, str) and value:
        # Export lays folders inside the checkpoint, which may have been moved since.
        candidates = [checkpoint.resolve().parent.parent / value, checkpoint / Path(value).name]
    for folder in (place for candidate in candidates for place in (candidate, candidate / "vae")):
        if _is_file(folder / "config.json"):
            return read_json(folder / "config.json"), folder
    if given:
        raise SourceError(f"{flag} {given}: no config.json there")
    if isinstance(value, str) and value in known:
        return known[value], None
    raise SourceError(
        f"{checkpoint / 'config.json'}: {field} is {value!r}, which is neither a folder here nor a known hub id"
        f"{nearest(str(value), known)}; pass {flag} DIR, a folder with its config.json"
    )
