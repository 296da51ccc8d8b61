"""Foreign checkpoints: what a folder or hub id holds, and the settings that it names or points to."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ross_jax.config import UserError, nearest
from ross_jax.convert import language, vision
from ross_jax.convert.tensors import TensorFiles, open_tensors

Kind = Literal["ross", "adapters", "vision", "language", "autoencoder", "teacher"]

ADAPTERS = ("mm_projector", "mm_inv_projector")
"""File stems of what stage 1 saves."""
ROSS_FAMILIES = {
    "ross_qwen2": "qwen2",
    "ross_llama": "llama",
    "llava_qwen": "qwen2",
    "llava_qwen2": "qwen2",
    "llava_llama": "llama",
    "llava": "llama",
}
"""`model_type` of full checkpoints -> the language model's family."""
_PASSED_THROUGH = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
_NOT_PASSED = {"config.json", "model_index.json", "trainer_state.json"}


class SourceError(UserError):
    """A folder that is no checkpoint, or one of a kind that we do not read."""


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened foreign checkpoint.

    Attributes:
      origin: what the user called it.
      settings: parsed config.json; empty for adapters without one.
      files: weights, headers read.
    """

    origin: str
    folder: Path
    kind: Kind
    settings: dict[str, Any]
    files: list[TensorFiles]

    def extra_files(self) -> list[Path]:
        """Files beside the weights that travel along: tokenizer, processor, generation settings."""
        return [path for path in sorted(self.folder.iterdir()) if _travels(path)]


def _is_file(path: Path) -> bool:
    """Whether it is a file that we may see; somebody else's path may also be too long or forbidden here."""
    try:
        return path.is_file()
    except OSError:
        return False


def _travels(path: Path) -> bool:
    weights_index = ".index." in path.name  # also model.safetensors.index.fp16.json
    return path.is_file() and path.suffix in _PASSED_THROUGH and path.name not in _NOT_PASSED and not weights_index


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; errors name file and position."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{path}: no such file") from None
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise SourceError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def open_source(origin: str) -> Source:
    """Opens a folder, or downloads a hub id (`owner/name` or `owner/name/subfolder`) if there is no such folder.

    Raises:
      SourceError: no such path, no checkpoint, or a kind that we do not read.
      TensorError: weights that cannot be read.
    """
    folder = Path(origin)
    try:
        if not folder.exists():
            if not re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w.-]+)?", origin) or origin.startswith("."):
                raise SourceError(f"{origin}: no such folder")
            folder = download(origin)
        return _open_folder(origin, folder)
    except OSError as error:
        raise SourceError(f"{folder}: cannot be read ({error.strerror or error})") from error


def _open_folder(origin: str, folder: Path) -> Source:
    if folder.is_file():
        raise SourceError(f"{origin}: is a file; name the folder that holds it and its config.json")
    if (folder / "model_index.json").is_file() and (folder / "vae").is_dir():
        folder = folder / "vae"  # a whole diffusion pipeline, of which we use the autoencoder
    has_config = (folder / "config.json").is_file()
    settings = read_json(folder / "config.json") if has_config else {}
    adapters = [path for stem in ADAPTERS for path in _adapter(folder, stem)]
    kind = _kind(settings, folder) if has_config or not adapters else "adapters"
    if kind == "ross" and adapters and not _has_weights(folder):
        kind = "adapters"
    files = [open_tensors(path) for path in adapters] if kind == "adapters" else [open_tensors(folder)]
    return Source(origin, folder, kind, settings, files)


def open_teacher(origin: str) -> Source:
    """Opens a vision encoder's folder or hub id as the teacher of reconstruction targets.

    Raises:
      SourceError: as `open_source`, or another kind of checkpoint.
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
    return any(re.match(r"(pytorch_)?model.*\.(safetensors|bin)(\.index\.json)?$", name) for name in names)


def _kind(settings: Mapping[str, Any], folder: Path) -> Kind:
    where = folder / "config.json"
    if not settings:
        raise SourceError(f"{where}: missing or empty; it decides all sizes")
    if settings.get("_class_name") is not None:
        return "autoencoder"
    model_type = settings.get("model_type")
    if not isinstance(model_type, str):
        raise SourceError(f"{where}: model_type is {model_type!r}, expected a string")
    if model_type == "llava" and "text_config" in settings:
        raise SourceError(f"{where}: transformers' own LLaVA layout is not read; use the original liuhaotian/llava one")
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
    """Fetches a hub repository (weights as safetensors where it has them) and returns its folder.

    Raises:
      SourceError: offline, no such repository, or no access to it.
    """
    import huggingface_hub

    owner, name, *subfolder = origin.split("/")
    prefix = f"{subfolder[0]}/" if subfolder else ""
    try:
        files = huggingface_hub.HfApi().list_repo_files(f"{owner}/{name}")
        here = [file.removeprefix(prefix) for file in files if file.startswith(prefix)]
        if "model_index.json" in here and not prefix:
            prefix = "vae/"
            here = [file.removeprefix(prefix) for file in files if file.startswith(prefix)]
        if not here:
            raise FileNotFoundError(f"it has no folder {prefix}")
        weights = ".safetensors" if any(f.endswith(".safetensors") and "/" not in f for f in here) else ".bin"
        suffixes = (weights, *_PASSED_THROUGH)
        wanted = [prefix + file for file in here if "/" not in file and file.endswith(suffixes)]
        root = huggingface_hub.snapshot_download(f"{owner}/{name}", allow_patterns=wanted)
    except Exception as error:  # of the hub's client and of the HTTP library below it, which changes with versions
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(
            f"{origin}: no such folder, and the hub repository of that name could not be fetched ({reason}). "
            "Give a local folder, or go online (and `hf auth login` for gated models)"
        ) from error
    return Path(root) / prefix


def resolve_settings(
    value: Any, checkpoint: Path, known: Mapping[str, dict[str, Any]], given: Path | None, field: str, flag: str
) -> tuple[dict[str, Any], Path | None]:
    """The settings of a component that a full checkpoint's config.json only points to.

    Args:
      value: of the field: a hub id, an absolute path, or one relative to the folder that holds the checkpoint's parent.
      checkpoint: the checkpoint's folder.
      known: settings of published models by hub id.
      given: the folder that the user named instead.
      field, flag: names for messages.

    Returns:
      Settings, and the folder that they were read from, if any.

    Raises:
      SourceError: nothing there; says which flag to use.
    """
    candidates = [given] if given else []
    if not given and isinstance(value, str) and value:
        candidates = [Path(value)] if Path(value).is_absolute() else [checkpoint.resolve().parent.parent / value]
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
