"""Export of a model directory to the layouts of the reference, transformers and diffusers."""

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from ross_jax import checkpoints
from ross_jax.config import UserError, from_dict, nearest
from ross_jax.convert import vision
from ross_jax.convert.dtypes import DTYPES, TAGS
from ross_jax.convert.importing import SCOPES, TABLES, is_finite
from ross_jax.convert.mapping import Piece, expand, raise_all
from ross_jax.convert.safetensors_writer import SafetensorsWriter
from ross_jax.convert.settings import Settings
from ross_jax.convert.sources import ROSS_FAMILIES, read_json
from ross_jax.convert.tensors import TensorFiles, open_tensors
from ross_jax.models.ross import RossConfig, abstract_params
from ross_jax.tree import flatten, unflatten

Progress = Callable[[str], None]

DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
COMPONENTS = (*SCOPES, "regressor", "teacher")
"""Every component that a model can have, in the order of export."""
FOLDERS = {"vision": "vision_tower", "language": "llm", "autoencoder": "vae", "teacher": "teacher"}
"""Component -> its folder in the `components` layout. Projector and denoiser are in `adapters/`."""
_STEMS = {"autoencoder": "diffusion_pytorch_model"}
_ADAPTERS = {"projector": "mm_projector", "denoiser": "mm_inv_projector"}
_GROUP_BYTES = 2**28
_FLOATS = {np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class Component:
    """A component to export.

    Attributes:
      name: name of the component.
      shapes: path -> shape and dtype of the parameter.
      pieces: path -> [(piece, key below the scope, tag of the dtype)].
      unused: key below the scope -> key in `files`, for the tensors that import kept aside.
      files: the tensors that import kept aside, if there are any.
    """

    name: str
    shapes: dict[str, jax.ShapeDtypeStruct]
    pieces: dict[str, list[tuple[Piece, str, str]]]
    unused: dict[str, str]
    files: TensorFiles | None

    def declare(self, scope: str, dtype: str | None) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Lists the tensors to write: key -> (tag of the dtype, shape).

        Args:
          scope: prefix of the keys.
          dtype: tag for all floating-point tensors. None keeps the dtypes of the import.
        """
        infos = {scope + key: (tag, piece.shape) for pieces in self.pieces.values() for piece, key, tag in pieces}
        for key, name in self.unused.items():
            infos[scope + key] = (self.files[name].tag, self.files[name].shape)
        if dtype is None:
            return infos
        return {key: (dtype if DTYPES[tag] in _FLOATS else tag, shape) for key, (tag, shape) in infos.items()}


def read_config(model: Path) -> RossConfig:
    """Reads the config of a model directory."""
    return from_dict(
        RossConfig, checkpoints.read_manifest(model).get("config"), f"{model / checkpoints.MANIFEST}: config"
    )


def _read_foreign(model: Path) -> dict[str, Any]:
    """Reads what import recorded: component -> origin, layout, prefix and keys. Empty for one made by training."""
    read = Settings(checkpoints.read_manifest(model), str(model / checkpoints.MANIFEST))
    foreign = read.inner("foreign")
    parts = {name: foreign.inner(name) for name in COMPONENTS}
    for part in parts.values():
        for name in ("origin", "layout", "prefix"):
            part.text(name, "")
        keys = part.inner("keys")
        for key, tag in keys.values.items():
            if tag not in list(DTYPES):
                keys.refuse(key, "a dtype of safetensors")
    read.check()
    return {name: part.values for name, part in parts.items()}


def _saved_leaves(model: Path, config: RossConfig, names: list[str]) -> dict[str, dict[str, Any]]:
    """Reads shapes and dtypes of the saved parameters: component -> path -> leaf. They must fit the config."""
    saved, expected = checkpoints.model_abstract(model), abstract_params(config)
    leaves, wrong = {}, set()
    for name in names:
        leaves[name] = flatten(saved.get(name, {}))
        both = [{(path, leaf.shape) for path, leaf in flat.items()} for flat in (leaves[name], flatten(expected[name]))]
        wrong |= {f"{name}/{path}" for path, _ in both[0] ^ both[1]}
    if wrong:
        raise UserError(f"{model}: config and parameters differ: {', '.join(sorted(wrong))}")
    return leaves


def _open_component(
    model: Path, name: str, config: Any, leaves: Mapping[str, Any], foreign: Mapping[str, Any], layout: str
) -> Component:
    table = TABLES[name](config)
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    unused = model / "unused" / f"{name}.safetensors"
    files = open_tensors(unused) if unused.is_file() else None
    kept = {key: key for key in files or ()}
    prefix = imported = foreign.get("prefix") or ""
    keys = foreign.get("keys") or {}
    # A full checkpoint has the keys of the libraries that the reference was written for. Those of a component's folder
    # can be older or newer, and a full checkpoint has no place for the text model of SigLIP and CLIP.
    standard = layout == "ross" and foreign.get("layout") in ("vision", "autoencoder")
    if standard and name == "vision":
        prefix = vision.PREFIXES[0]
        kept = {prefix + key.removeprefix(imported): key for key in kept if key.startswith(imported)}
    pieces: dict[str, list[tuple[Piece, str, str]]] = {}
    by_key = {}
    for piece in expand(table, shapes):
        old = piece.alias is not None and imported + piece.alias in keys
        found = piece.alias if old else piece.hf_key
        tag = keys.get(imported + found, TAGS[np.dtype(leaves[piece.path].dtype)])
        pieces.setdefault(piece.path, []).append((piece, prefix + (piece.hf_key if standard else found), tag))
        by_key[piece.hf_key] = piece
    for key, of in table.copies.items():
        if imported + key in keys:
            pieces[by_key[of].path].append((by_key[of], prefix + key, keys[imported + key]))
    return Component(name, leaves, pieces, kept, files)


def _leaves(model: Path, component: Component) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the path and values of every parameter, restored when asked for."""
    for group in _groups(component):
        tree = unflatten({f"{component.name}/{path}": component.shapes[path] for path in group})
        leaves = flatten(checkpoints.restore_model(model, tree))
        for path in group:
            yield path, leaves.pop(f"{component.name}/{path}")


def _groups(component: Component) -> Iterator[list[str]]:
    """Yields paths to restore together. Small parameters come in groups, because every restore takes some time."""
    group, size = [], 0
    for path in component.pieces:
        leaf = component.shapes[path]
        bytes_ = math.prod(leaf.shape) * leaf.dtype.itemsize
        if group and size + bytes_ > _GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(path)
        size += bytes_
    if group:
        yield group


def _write_weights(
    model: Path, folder: Path, stem: str, components: Mapping[str, Component], dtype: str | None, progress: Progress
) -> None:
    """Writes components as one checkpoint. `components`: scope -> component."""
    infos = {
        key: info for scope, component in components.items() for key, info in component.declare(scope, dtype).items()
    }
    if not infos:
        return  # an identity projector
    with SafetensorsWriter(folder, stem, infos) as writer:

        def put(key: str, values: np.ndarray) -> None:
            writer.write(key, _cast(values, infos[key][0], key))

        for scope, component in components.items():
            for path, leaf in _leaves(model, component):
                for piece, key, _ in component.pieces[path]:
                    part = leaf if piece.layer is None else leaf[piece.layer]
                    put(scope + key, np.ascontiguousarray(piece.transform.to_hf(part)))
                progress(f"{component.name}/{path}")
                del leaf, part  # frees the memory before the next is restored
            for key, name in component.unused.items():
                put(scope + key, component.files.read(name))


def _cast(values: np.ndarray, tag: str, key: str) -> np.ndarray:
    if values.dtype == DTYPES[tag]:
        return values
    with np.errstate(over="ignore"):
        cast = values.astype(DTYPES[tag])
    if not is_finite(cast):
        raise UserError(f"{key}: has values that {DTYPES[tag]} cannot hold; choose another --dtype")
    return cast


def _leave_out(model: Path, config: RossConfig, without: Collection[str]) -> RossConfig:
    """Removes the named components from the config."""
    have = [name for name in COMPONENTS if getattr(config, name) is not None]
    unknown = [name for name in without if name not in have]
    if unknown:
        names = ", ".join(f"{name!r}{nearest(name, have)}" for name in unknown)
        raise UserError(f"--without: {model} has no component {names}; it has {', '.join(have)}")
    if without and set(have) <= set(without):
        raise UserError(f"--without: nothing is left of {model}")
    return dataclasses.replace(config, **dict.fromkeys(without))


def _check_layout(model: Path, config: RossConfig, layout: str) -> None:
    """Refuses components that the layout cannot hold."""
    problems = []
    if config.regressor is not None:
        problems.append("foreign layouts have no place for its regressor; leave it out with --without regressor")
    for name, known in {"prediction": "epsilon", "schedule": "cosine", "block": "adaln"}.items():
        found = getattr(config.denoiser, name, known)
        if found != known:
            problems.append(
                f"its denoiser has {name} {found!r}, foreign layouts know only {known!r}; leave it out with "
                "--without denoiser"
            )
    if layout == "ross" and config.teacher is not None:
        problems.append(
            "a full checkpoint has no place for its teacher; use --format components, or leave it out with "
            "--without teacher"
        )
    if layout == "ross" and config.vision is not None and (config.vision.kind == "dinov2" or config.vision.final_norm):
        what = config.vision.kind + (" with final norm" if config.vision.final_norm else "")
        problems.append(f"the reference has no vision tower {what}; use --format components")
    if layout == "ross" and config.autoencoder is not None and config.autoencoder.kind != "kl":
        problems.append(
            "its autoencoder is an AutoencoderTiny; the reference loads only diffusers' AutoencoderKL, so use --format "
            "components"
        )
    if layout == "ross" and config.language is None:
        problems.append("has no language model, so it is no full Ross checkpoint; use --format components")
    raise_all(str(model), [UserError(f"{model}: {problem}") for problem in problems])


def export(
    model: Path,
    output: Path,
    layout: str,
    dtype: str | None = None,
    progress: Progress = lambda _: None,
    without: Collection[str] = (),
) -> None:
    """Writes a model directory in a foreign layout, completely or not at all.

    Args:
      model: model directory, made by import or training.
      output: folder to write. It must not exist.
      layout: `ross`, one checkpoint as the reference saves it, or `components`, a folder for each component.
      dtype: `float32`, `bfloat16` or `float16` for all floating-point tensors. None keeps the dtypes of the import.
      progress: called with a line of text after each parameter.
      without: components to leave out, together with what config.json says about them.

    Raises:
      UserError: nothing to export, components that the layout cannot hold, or an output that cannot be written.
    """
    foreign, config = _read_foreign(model), _leave_out(model, read_config(model), without)
    files = model / "files"
    names = [name for name in COMPONENTS if getattr(config, name) is not None]
    _check_layout(model, config, layout)
    if layout == "ross":
        configs = {"ross": settings_without(ross_settings(files, config, foreign), without)}
        mode = checkpoints.read_manifest(model).get("image_mode")
        written = configs["ross"].get("image_aspect_ratio") or "square"  # the reference's default
        configs["ross"] |= {"image_aspect_ratio": mode} if mode not in (None, written) and config.vision else {}
        if mode == "crop" and config.vision and config.vision.kind != "clip":
            progress("warning: images are cropped here (image_mode 'crop'); the reference squashes them to a square")
    else:
        configs = {name: component_settings(files, name) for name in names if name not in _ADAPTERS}
    saved = _saved_leaves(model, config, names)
    opened = {
        name: _open_component(model, name, getattr(config, name), saved[name], foreign[name], layout) for name in names
    }
    tag = DTYPE_NAMES[dtype] if dtype else None
    with contextlib.ExitStack() as stack:
        for component in opened.values():
            if component.files:
                stack.enter_context(component.files)
        folder = stack.enter_context(checkpoints.complete_directory(output))
        if layout == "ross":
            _write_weights(model, folder, "model", {SCOPES[name]: opened[name] for name in names}, tag, progress)
            _copy_files([files / "ross", files / "language", files / "adapters"], folder)
            _write_config(folder, configs["ross"], dtype)
            return
        for name, component in opened.items():
            adapter = name in _ADAPTERS
            target = folder / ("adapters" if adapter else FOLDERS[name])
            target.mkdir(exist_ok=True)
            stem = _ADAPTERS.get(name) or _STEMS.get(name, "model")
            _write_weights(model, target, stem, {SCOPES[name] if adapter else "": component}, tag, progress)
            if adapter:
                _copy_files([files / "adapters", files / "ross"], target, ["config.json"])
                if without and (target / "config.json").is_file():
                    _write_config(target, settings_without(read_json(target / "config.json"), without), None)
            else:
                _copy_files([files / name, *([files / "ross"] if name == "language" else [])], target)
                _write_config(target, configs[name], dtype)


def _copy_files(folders: list[Path], target: Path, names: Collection[str] | None = None) -> None:
    """Copies extra files: all, or only `names`. Where two folders have a file of the same name, the first one's."""
    for folder in reversed(folders):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if names is None or path.name in names:
                shutil.copyfile(path, target / path.name)


def _write_config(folder: Path, settings: dict[str, Any], dtype: str | None) -> None:
    """Writes config.json with `dtype`, if it has a dtype. A file that says the same already keeps its bytes."""
    for name in ("torch_dtype", "dtype"):
        if dtype and name in settings:
            settings = {**settings, name: dtype}
    path = folder / "config.json"
    if not path.is_file() or read_json(path) != settings:
        path.write_text(json.dumps(settings, indent=2) + "\n")


def component_settings(files: Path, name: str) -> dict[str, Any]:
    """config.json of a component. The language model's can come from a full checkpoint, without the fields of Ross.

    Args:
      files: folder `files` of the model directory.
      name: name of the component.

    Raises:
      SourceError: there is none, because the component was not imported.
    """
    own, full = files / name / "config.json", files / "ross" / "config.json"
    if own.is_file() or not full.is_file() or name != "language":
        return read_json(own)
    settings = read_json(full)
    family = ROSS_FAMILIES.get(str(settings.get("model_type")))
    if family is None:
        raise UserError(f"{full}: model_type {settings.get('model_type')!r} is not that of a full checkpoint")
    architecture = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[family]
    kept = {name: value for name, value in settings.items() if not _is_ross_field(name)}
    return {**kept, "model_type": family, "architectures": [architecture]}


_ROSS_FIELDS = {
    *("_name_or_path", "ross_enable", "use_mm_proj", "use_mm_inv_proj", "freeze_mm_mlp_adapter", "tune_mm_mlp_adapter"),
    *("unfreeze_mm_vision_tower", "image_aspect_ratio", "image_grid_pinpoints", "image_embed_len", "image_mean"),
    *("image_std", "decode_image_size", "tokenizer_model_max_length", "tokenizer_padding_side"),
}


def _is_ross_field(name: str) -> bool:
    return name.startswith("mm_") or name in _ROSS_FIELDS


def ross_settings(files: Path, config: RossConfig, foreign: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a full checkpoint: as imported, or composed of those of the components and the adapters."""
    if foreign["language"].get("layout") == "ross":
        return read_json(files / "ross" / "config.json")
    language, adapters = component_settings(files, "language"), files / "adapters" / "config.json"
    family = f"ross_{language.get('model_type')}"
    if family not in ROSS_FAMILIES:
        raise UserError(f"the reference has no {family}; use --format components")
    settings = {**language, "model_type": family}
    settings["architectures"] = [{"ross_qwen2": "RossQwen2ForCausalLM", "ross_llama": "RossLlamaForCausalLM"}[family]]
    settings |= {"mm_use_im_start_end": False, "mm_use_im_patch_token": False, "mm_patch_merge_type": "flat"}
    settings |= {"image_aspect_ratio": "pad"} if config.vision else {}
    trained = read_json(adapters) if adapters.is_file() else {}
    settings |= {name: value for name, value in trained.items() if _is_ross_field(name) and name != "_name_or_path"}
    if config.vision:
        settings |= {
            "mm_vision_tower": foreign["vision"].get("origin"),
            "mm_vision_select_layer": config.vision.select_layer,
            "mm_vision_select_feature": "patch",
            "mm_hidden_size": config.vision.hidden_size,
            "image_embed_len": config.vision.num_tokens,
            "decode_image_size": config.target_size,
            "image_mean": list(config.image_mean),
            "image_std": list(config.image_std),
        }
    if config.projector:
        settings |= {"use_mm_proj": True, "mm_projector_type": _projector_type(config, foreign)}
    settings["ross_enable"] = bool(config.denoiser)
    if config.denoiser:
        settings |= {
            "use_mm_inv_proj": True,
            "mm_inv_projector_type": f"denoiser_vit{config.denoiser.depth}x",
            "mm_inv_hidden_size": config.denoiser.latent_size,
        }
    if config.autoencoder:
        settings["mm_pixel_decoder"] = foreign["autoencoder"].get("origin")
    return settings


_FIELDS = {
    "vision": ("mm_vision_", "mm_hidden_size", "image_embed_len", "image_mean", "image_std", "decode_image_size"),
    "projector": ("use_mm_proj", "mm_projector_"),
    "denoiser": ("use_mm_inv_proj", "mm_inv_"),
    "autoencoder": ("mm_pixel_decoder",),
}
"""Component -> beginnings of the names of its fields in a full checkpoint's config.json."""


def settings_without(settings: dict[str, Any], without: Collection[str]) -> dict[str, Any]:
    """Removes what a full checkpoint's config.json says about the components left out.

    A regressor takes the denoiser's place. A run that trained one may have started from a checkpoint with a denoiser,
    whose config.json still describes it. `ross_enable` makes the reference compute the reconstruction loss, which needs
    denoiser and autoencoder.
    """
    names = {"denoiser" if name == "regressor" else name for name in without}
    gone = tuple(begin for name in names for begin in _FIELDS.get(name, ()))
    kept = {name: value for name, value in settings.items() if not name.startswith(gone)}
    return kept | {"ross_enable": False} if names & {"denoiser", "autoencoder"} else kept


def _projector_type(config: RossConfig, foreign: Mapping[str, Any]) -> str:
    if config.projector.kind == "identity":
        return "identity"
    numbered = "0.weight" in (foreign["projector"].get("keys") or {})  # mlp1x_gelu of LLaVA is a list of one layer
    depth = config.projector.depth
    return "linear" if depth == 1 and not numbered else f"mlp{depth}x_gelu"
