"""Export: a model directory back to the layouts of the reference, transformers and diffusers."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from ross_jax import checkpoints
from ross_jax.config import UserError, freeze
from ross_jax.convert.importing import SCOPES, TABLES
from ross_jax.convert.mapping import Piece, expand, flatten, unflatten
from ross_jax.convert.safetensors_writer import SafetensorsWriter
from ross_jax.convert.sources import ROSS_FAMILIES
from ross_jax.convert.tensors import DTYPES, TAGS, TensorFiles, open_tensors
from ross_jax.models.ross import RossConfig, abstract_params

Progress = Callable[[str], None]

DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
FOLDERS = {"vision": "vision_tower", "language": "llm", "autoencoder": "vae"}
"""Folder of each component in the `components` layout; projector and denoiser are `adapters/`."""
_STEMS = {"autoencoder": "diffusion_pytorch_model"}
_ADAPTERS = {"projector": "mm_projector", "denoiser": "mm_inv_projector"}
_GROUP_BYTES = 2**28
_FLOATS = {np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class Component:
    """A component about to be exported.

    Attributes:
      pieces: our path -> [(piece, key below the scope, dtype tag)].
      copies: (key, our path) of duplicates, whole leaves.
      unused: tensors kept aside, or None.
      prefix: of the keys below the scope.
    """

    name: str
    prefix: str
    shapes: dict[str, jax.ShapeDtypeStruct]
    pieces: dict[str, list[tuple[Piece, str, str]]]
    unused: TensorFiles | None

    def declare(self, scope: str, dtype: str | None) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Every key to write -> (dtype tag, shape)."""
        infos = {scope + key: (tag, piece.shape) for pieces in self.pieces.values() for piece, key, tag in pieces}
        for key, info in (self.unused or {}).items():
            infos[scope + key] = (info.tag, info.shape)
        if dtype is None:
            return infos
        return {key: (dtype if DTYPES[tag] in _FLOATS else tag, shape) for key, (tag, shape) in infos.items()}


def read_config(model: Path) -> RossConfig:
    """The config of a model directory."""
    return freeze(RossConfig, checkpoints.read_manifest(model)["config"], f"{model / checkpoints.MANIFEST}: config")


def _open_component(model: Path, name: str, config: RossConfig, foreign: Mapping[str, Any]) -> Component:
    table = TABLES[name](getattr(config, name))
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(config)[name]).items()}
    saved = flatten(checkpoints.abstract(model / "params").get(name, {})) if shapes else {}
    if saved.keys() != shapes.keys():
        raise UserError(f"{model}: {name}: leaves and config differ: {sorted(saved.keys() ^ shapes.keys())}")
    prefix, keys = foreign.get("prefix", ""), foreign.get("keys", {})
    pieces: dict[str, list[tuple[Piece, str, str]]] = {}
    paths = {}
    for piece in expand(table, shapes):
        alias = piece.alias is not None and prefix + piece.alias in keys
        key = prefix + (piece.alias if alias else piece.key)
        tag = keys.get(key, TAGS[np.dtype(saved[piece.path].dtype)])
        pieces.setdefault(piece.path, []).append((piece, key, tag))
        paths[piece.key] = piece
    for key, of in table.copies.items():
        if prefix + key in keys:
            pieces[paths[of].path].append((paths[of], prefix + key, keys[prefix + key]))
    unused = model / "unused" / f"{name}.safetensors"
    return Component(name, prefix, saved, pieces, open_tensors(unused) if unused.is_file() else None)


def _groups(component: Component) -> Iterator[list[str]]:
    """Paths to restore together: small leaves in groups, as each restore has a price; large ones alone."""
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


def _write_component(
    model: Path,
    component: Component,
    scope: str,
    writer: SafetensorsWriter,
    infos: Mapping[str, Any],
    progress: Progress,
) -> None:
    for group in _groups(component):
        tree = unflatten({f"{component.name}/{path}": component.shapes[path] for path in group})
        leaves = flatten(checkpoints.restore(model / "params", tree))
        for path in group:
            leaf = leaves.pop(f"{component.name}/{path}")
            for piece, key, _ in component.pieces[path]:
                ours = leaf if piece.layer is None else leaf[piece.layer]
                values = np.ascontiguousarray(piece.transform.to_theirs(ours))
                writer.write(scope + key, values.astype(DTYPES[infos[scope + key][0]], copy=False))
            progress(f"{component.name}/{path}")
            del leaf, ours, values  # before the next is restored: two of the largest would not fit the bound
    for key, info in (component.unused or {}).items():
        if infos[scope + key][0] == info.tag:
            writer.write_raw(scope + key, component.unused.read_raw(key))
        else:
            writer.write(scope + key, component.unused.read(key).astype(DTYPES[infos[scope + key][0]]))


def export(
    model: Path, output: Path, layout: str, dtype: str | None = None, progress: Progress = lambda _: None
) -> None:
    """Writes a model directory in a foreign layout; complete, or not at all.

    Args:
      model: made by import or training.
      output: must not exist.
      layout: `ross`, one checkpoint as the reference saves it, or `components`, a folder for each.
      dtype: `float32`, `bfloat16` or `float16` for every floating tensor; default: as imported.

    Raises:
      UserError: nothing to export, or an output that cannot be written.
    """
    manifest, config = checkpoints.read_manifest(model), read_config(model)
    foreign = manifest.get("foreign", {})
    names = [name for name in SCOPES if getattr(config, name) is not None]
    opened = {name: _open_component(model, name, config, foreign.get(name, {})) for name in names}
    tag = DTYPE_NAMES[dtype] if dtype else None
    if layout == "ross" and "language" not in opened:
        raise UserError(f"{model}: has no language model, so it is no full Ross checkpoint; use --format components")
    with checkpoints.complete_directory(output) as folder:
        files = model / "files"
        if layout == "ross":
            infos = {key: info for name, c in opened.items() for key, info in c.declare(SCOPES[name], tag).items()}
            with SafetensorsWriter(folder, "model", infos) as writer:
                for name, component in opened.items():
                    _write_component(model, component, SCOPES[name], writer, infos, progress)
            _copy_files([files / "ross", files / "language"], folder)
            _write_config(folder, ross_settings(files, config, foreign), dtype)
            return
        for name, component in opened.items():
            adapter = name in _ADAPTERS
            target = folder / ("adapters" if adapter else FOLDERS[name])
            target.mkdir(exist_ok=True)
            scope = SCOPES[name] if adapter else ""
            stem = _ADAPTERS.get(name) or _STEMS.get(name, "model")
            infos = component.declare(scope, tag)
            if infos:
                with SafetensorsWriter(target, stem, infos) as writer:
                    _write_component(model, component, scope, writer, infos, progress)
            if adapter:
                if (files / "ross" / "config.json").is_file():
                    shutil.copyfile(files / "ross" / "config.json", target / "config.json")
            else:
                _copy_files([files / name, *([files / "ross"] if name == "language" else [])], target)
                _write_config(target, component_settings(files, name), dtype)


def _copy_files(folders: list[Path], target: Path) -> None:
    """Passengers; of two with the same name the first folder's."""
    for folder in reversed(folders):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            shutil.copyfile(path, target / path.name)


def _write_config(folder: Path, settings: dict[str, Any] | None, dtype: str | None) -> None:
    """Writes config.json; one that is already there and says the same keeps its bytes."""
    if settings is None:
        raise UserError(f"{folder.name}: there is no config.json to write; the model was not imported from one")
    for name in ("torch_dtype", "dtype"):
        if dtype and name in settings:
            settings = {**settings, name: dtype}
    path = folder / "config.json"
    if not path.is_file() or json.loads(path.read_text()) != settings:
        path.write_text(json.dumps(settings, indent=2) + "\n")


def component_settings(files: Path, name: str) -> dict[str, Any] | None:
    """A component's own config.json; the language model's is the full checkpoint's without the fields of Ross."""
    own, whole = files / name / "config.json", files / "ross" / "config.json"
    if own.is_file():
        return json.loads(own.read_text())
    if name != "language" or not whole.is_file():
        return None
    settings = json.loads(whole.read_text())
    family = ROSS_FAMILIES[settings["model_type"]]
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


def ross_settings(files: Path, config: RossConfig, foreign: Mapping[str, Any]) -> dict[str, Any] | None:
    """The full checkpoint's config.json: the one imported, or one composed of the components'."""
    whole = files / "ross" / "config.json"
    if whole.is_file() and foreign.get("language", {}).get("layout") == "ross":
        return json.loads(whole.read_text())
    language = component_settings(files, "language")
    if language is None:
        return None
    settings = {**language, "model_type": f"ross_{language['model_type']}"}
    settings["architectures"] = [f"Ross{name}" for name in language.get("architectures", [])]
    settings |= {"mm_use_im_start_end": False, "mm_use_im_patch_token": False, "mm_patch_merge_type": "flat"}
    if config.vision:
        settings |= {
            "mm_vision_tower": foreign.get("vision", {}).get("origin"),
            "mm_vision_select_layer": config.vision.select_layer,
            "mm_vision_select_feature": "patch",
            "mm_hidden_size": config.vision.hidden_size,
            "image_embed_len": config.vision.num_tokens,
            "decode_image_size": config.target_size,
            "image_mean": list(config.image_mean),
            "image_std": list(config.image_std),
            "image_aspect_ratio": "pad",
        }
    if config.projector:
        depth = config.projector.depth
        kind = "identity" if config.projector.kind == "identity" else "linear" if depth == 1 else f"mlp{depth}x_gelu"
        settings |= {"use_mm_proj": True, "mm_projector_type": kind}
    settings["ross_enable"] = bool(config.denoiser)
    if config.denoiser:
        settings |= {
            "use_mm_inv_proj": True,
            "mm_inv_projector_type": f"denoiser_vit{config.denoiser.depth}x",
            "mm_inv_hidden_size": config.denoiser.latent_size,
        }
    if config.autoencoder:
        settings["mm_pixel_decoder"] = foreign.get("autoencoder", {}).get("origin")
    return settings
