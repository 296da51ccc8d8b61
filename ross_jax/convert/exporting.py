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
from ross_jax.convert import llava, vision
from ross_jax.convert.dtypes import DTYPES, TAGS
from ross_jax.convert.export_configs import (
    Described,
    adapters_settings,
    component_settings,
    processor_settings,
    ross_settings,
    settings_without,
)
from ross_jax.convert.generation import end_ids
from ross_jax.convert.importing import SCOPES, TABLES, is_finite
from ross_jax.convert.mapping import Piece, expand, raise_all
from ross_jax.convert.safetensors_writer import SafetensorsWriter
from ross_jax.convert.settings import Settings
from ross_jax.convert.sources import read_json
from ross_jax.convert.tensors import TensorFiles, open_tensors
from ross_jax.data.encoders import stop_ids
from ross_jax.data.tokenizer import find_tokenizer, load_tokenizer, save_tokenizer
from ross_jax.directories import complete_directory, write_sums
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
      absent: key below the scope -> values, for tensors that transformers expects and the model never had.
    """

    name: str
    shapes: dict[str, jax.ShapeDtypeStruct]
    pieces: dict[str, list[tuple[Piece, str, str]]]
    unused: dict[str, str]
    files: TensorFiles | None
    absent: dict[str, np.ndarray]

    def declare(self, scope: str, dtype: str | None) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Lists the tensors to write: key -> (tag of the dtype, shape).

        Args:
          scope: prefix of the keys.
          dtype: tag for all floating-point tensors. None keeps the dtypes of the import.
        """
        infos = {scope + key: (tag, piece.shape) for pieces in self.pieces.values() for piece, key, tag in pieces}
        for key, name in self.unused.items():
            infos[scope + key] = (self.files[name].tag, self.files[name].shape)
        for key, values in self.absent.items():
            infos[scope + key] = (next(tag for tag, _ in infos.values()), values.shape)
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
    read = Settings(checkpoints.read_manifest(model, unused=True), str(model / checkpoints.MANIFEST))
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
    absent = {}
    if name in ("vision", "teacher") and not foreign:
        prefix = "" if config.kind == "dinov2" else vision.PREFIXES[0]
        absent = {prefix + key: values for key, values in vision.absent_tensors(config).items()}
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
    return Component(name, leaves, pieces, kept, files, absent)


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
                    values = np.ascontiguousarray(piece.transform.to_hf(part))
                    put(scope + key, _grown(values, infos[scope + key][1]))
                progress(f"{component.name}/{path}")
                del leaf, part  # frees the memory before the next is restored
            for key, name in component.unused.items():
                put(scope + key, component.files.read(name))
            for key, values in component.absent.items():
                put(scope + key, values)


def _grown(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Adds rows for new tokens: the mean of all rows, whose score never exceeds the largest score."""
    if values.shape == shape:
        return values
    mean = values.mean(axis=0, dtype=np.float32).astype(values.dtype)
    return np.concatenate([values, np.broadcast_to(mean, (shape[0] - len(values), shape[1]))])


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
    if layout == "llava":
        raise_all(str(model), [UserError(f"{model}: {problem}") for problem in llava.problems(config)])
        return
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
    elif layout == "ross":
        language = config.language
        if language.rope_scaling and language.qkv_bias and not language.out_bias:
            problems.append("the reference's Qwen2 does not scale rotary frequencies; use --format components")
        if language.head_dim * language.num_heads != language.hidden_size and not language.qk_norm:
            problems.append(
                f"its language model has {language.num_heads} heads of {language.head_dim} in width "
                f"{language.hidden_size}, which the reference cannot have; use --format components"
            )
    siglip = layout == "ross" and config.vision is not None and config.vision.kind == "siglip"
    if siglip and config.vision.layers_used != config.vision.num_layers - 1:
        problems.append(
            f"the reference always takes SigLIP's hidden state -2, this model {config.vision.select_layer}; use "
            "--format components"
        )
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
      layout: `ross`, one checkpoint as the reference saves it, `components`, a folder for each component,
        or `llava`, transformers' `LlavaForConditionalGeneration`.
      dtype: `float32`, `bfloat16` or `float16` for all floating-point tensors. None keeps the dtypes of the import.
      progress: called with a line of text after each parameter.
      without: components to leave out, together with what config.json says about them.

    Raises:
      UserError: nothing to export, components that the layout cannot hold, or an output that cannot be written.
    """
    foreign, config = _read_foreign(model), _leave_out(model, read_config(model), without)
    if layout == "llava":  # answers need no more
        config = dataclasses.replace(config, **dict.fromkeys(set(COMPONENTS) - set(llava.SCOPES)))
    names = [name for name in COMPONENTS if getattr(config, name) is not None]
    _check_layout(model, config, layout)
    saved = _saved_leaves(model, config, names)
    opened = {
        name: _open_component(model, name, getattr(config, name), saved[name], foreign[name], layout) for name in names
    }
    with contextlib.ExitStack() as stack:
        for component in opened.values():
            if component.files:
                stack.enter_context(component.files)
        described = _describe(model, config, foreign, saved)
        if layout == "llava":
            _write_llava(stack.enter_context(complete_directory(output)), model, described, opened, dtype, progress)
            return
        folders = _folders_inside(described, output.resolve(), layout)
        pointers = {name: str(path) for name, path in folders.items()}
        parts = [name for name in (folders if layout == "ross" else names) if name not in _ADAPTERS]
        configs = {name: component_settings(described, name) for name in parts}
        if layout == "ross":
            configs["ross"] = settings_without(ross_settings(described, pointers), without)
            if described.image_mode == "crop" and config.vision and config.vision.kind != "clip":
                progress(
                    "warning: images are cropped here (image_mode 'crop'); the reference squashes them to a square"
                )
        else:
            configs["adapters"] = adapters_settings(described, pointers, without)
        folder = stack.enter_context(complete_directory(output))
        writer = _Writer(model, described, opened, configs, dtype, progress)
        if layout == "ross":
            writer.write_full(folder)
        elif any(name in _ADAPTERS for name in names):
            writer.write_adapters(folder / "adapters")
        for name in parts:
            writer.write_component(name, folder / (folders[name].name if layout == "ross" else FOLDERS[name]))
        for each in [folder] if layout == "ross" else list(folder.iterdir()):  # folders that are read on their own
            write_sums(each, (path for path in each.rglob("*") if path.is_file()))


def _write_llava(
    folder: Path,
    model: Path,
    described: Described,
    opened: Mapping[str, Component],
    dtype: str | None,
    progress: Progress,
) -> None:
    """Writes transformers' LLaVA: weights, config, tokenizer, processor and generation settings."""
    config, files, found = described.config, described.files, find_tokenizer(described.files)
    if found is None:
        raise UserError(
            f"{model}: has no tokenizer, and --format llava writes one; import the model with its tokenizer"
        )
    _copy_files([files / "language", files / "ross"], folder, ["generation_config.json"])
    template = checkpoints.read_manifest(model).get("template")
    if template is None:
        progress("warning: the model does not say its conversation template; the chat template is the tokenizer's own")
    tokenizer = load_tokenizer(found)
    ends = [] if template is None else list(stop_ids(template, tokenizer))
    ends += [each for name in ("language", "ross") for each in end_ids(files / name) if each not in ends]
    image_id = llava.write_tokenizer(tokenizer, template, folder)
    generation = folder / "generation_config.json"
    kept_settings = read_json(generation) if generation.is_file() else {}
    pad = {} if tokenizer.pad_token_id is None else {"pad_token_id": tokenizer.pad_token_id}
    generation.write_text(json.dumps({**kept_settings, **pad, "eos_token_id": ends or None}, indent=2) + "\n")
    components, rows = {}, max(config.language.vocab_size, image_id + 1)
    for name, scope in llava.SCOPES.items():
        pieces = {path: [_llava_piece(name, each, rows) for each in all_] for path, all_ in opened[name].pieces.items()}
        below = {key.removeprefix(vision.PREFIXES[0]): old for key, old in opened[name].unused.items()}
        kept = {
            vision.PREFIXES[0] + k: old for k, old in below.items() if k.startswith(("encoder.", "post_layernorm."))
        }
        components[scope] = dataclasses.replace(opened[name], pieces=pieces, unused=kept if name == "vision" else {})
    _write_weights(model, folder, "model", components, DTYPE_NAMES[dtype] if dtype else None, progress)
    text, tower = component_settings(described, "language"), component_settings(described, "vision")
    tower = tower.get("vision_config") or tower
    tower = {**tower, "model_type": f"{config.vision.kind}_vision_model"}
    _write_config(folder, llava.settings(config, text, tower, image_id), dtype)
    llava.write_processor(config, described.image_mode, folder)
    write_sums(folder, (path for path in folder.rglob("*") if path.is_file()))


def _llava_piece(name: str, entry: tuple[Piece, str, str], rows: int) -> tuple[Piece, str, str]:
    piece, key, tag = entry
    if name == "vision":
        key = vision.PREFIXES[0] + key.removeprefix(vision.PREFIXES[0])
    if name == "projector":
        return piece, llava.PROJECTOR_KEYS[key[:2]] + key[2:], tag
    if piece.path in ("embedding", "head") and name == "language":
        piece = dataclasses.replace(piece, shape=(rows, piece.shape[1]))
    return piece, key, tag


def _describe(
    model: Path, config: RossConfig, foreign: Mapping[str, Any], saved: Mapping[str, dict[str, Any]]
) -> Described:
    files, tokens = model / "files", {}
    tokenizer = find_tokenizer(files)
    if config.language is not None and not foreign["language"] and tokenizer is not None:
        loaded = load_tokenizer(tokenizer)
        tokens = {f"{name}_token_id": getattr(loaded, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    dtypes = {name: str(next(iter(leaves.values())).dtype) for name, leaves in saved.items() if leaves}
    manifest = checkpoints.read_manifest(model)
    trained = "reconstruction" in manifest
    return Described(files, config, foreign, dtypes, manifest.get("image_mode"), trained, tokens)


def _folders_inside(model: Described, output: Path, layout: str) -> dict[str, Path]:
    """Folders of the export that its config.json points to: component -> path, for what has no other place.

    These are components that were never imported, and towers whose place the reference would not recognise: it takes a
    path with `clip` for CLIP, and else needs `siglip` in it.
    """
    folders, vision_config = {}, model.config.vision
    if vision_config is not None and not model.came_with("vision", "ross"):
        kind, origin = vision_config.kind, str(model.foreign["vision"].get("origin", "")).lower()
        if kind not in origin or (kind == "siglip" and "clip" in origin):
            folders["vision"] = output / (FOLDERS["vision"] if layout == "components" else f"{kind}_vision_tower")
            if kind == "siglip" and "clip" in str(output).lower():
                folders["vision"] = Path(folders["vision"].name)  # for a reference that runs in the checkpoint's folder
    if model.config.autoencoder is not None and not model.foreign["autoencoder"]:
        folders["autoencoder"] = output / FOLDERS["autoencoder"]
    return folders


@dataclasses.dataclass(frozen=True)
class _Writer:
    """Writes the folders of an export.

    Attributes:
      configs: component, `ross` or `adapters` -> config.json. None for adapters keeps what import found.
    """

    model: Path
    described: Described
    opened: Mapping[str, Component]
    configs: Mapping[str, dict[str, Any] | None]
    dtype: str | None
    progress: Progress

    def write_full(self, folder: Path) -> None:
        files = self.described.files
        self._write_weights(folder, "model", {SCOPES[name]: component for name, component in self.opened.items()})
        _copy_files([files / "ross", files / "language", files / "adapters"], folder)
        _copy_tokenizer(files, folder)
        _write_config(folder, self.configs["ross"], self.dtype)

    def write_adapters(self, folder: Path) -> None:
        folder.mkdir()
        for name, stem in _ADAPTERS.items():
            if name in self.opened:
                self._write_weights(folder, stem, {SCOPES[name]: self.opened[name]})
        _copy_files([self.described.files / "adapters", self.described.files / "ross"], folder, ["config.json"])
        if self.configs["adapters"] is not None:
            _write_config(folder, self.configs["adapters"], None)

    def write_component(self, name: str, folder: Path) -> None:
        files = self.described.files
        folder.mkdir()
        self._write_weights(folder, _STEMS.get(name, "model"), {"": self.opened[name]})
        _copy_files([files / name, *([files / "ross"] if name == "language" else [])], folder)
        if name == "language":
            _copy_tokenizer(files, folder)
        processor = processor_settings(self.described, name)
        if processor is not None:
            (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
        _write_config(folder, self.configs[name], self.dtype)

    def _write_weights(self, folder: Path, stem: str, components: Mapping[str, Component]) -> None:
        tag = DTYPE_NAMES[self.dtype] if self.dtype else None
        _write_weights(self.model, folder, stem, components, tag, self.progress)


def _copy_files(folders: list[Path], target: Path, names: Collection[str] | None = None) -> None:
    """Copies extra files: all, or only `names`. Where two folders have a file of the same name, the first one's."""
    for folder in reversed(folders):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.is_file() and (names is None or path.name in names):
                shutil.copyfile(path, target / path.name)


def _copy_tokenizer(files: Path, target: Path) -> None:
    """Copies the model's tokenizer, in place of what other sources of the model had beside their weights."""
    folder = find_tokenizer(files)
    if folder is not None:
        save_tokenizer(folder, target)


def _write_config(folder: Path, settings: dict[str, Any], dtype: str | None) -> None:
    """Writes config.json with `dtype`, if it has a dtype. A file that says the same already keeps its bytes."""
    for name in ("torch_dtype", "dtype"):
        if dtype and name in settings:
            settings = {**settings, name: dtype}
    path = folder / "config.json"
    if not path.is_file() or read_json(path) != settings:
        path.write_text(json.dumps(settings, indent=2) + "\n")
