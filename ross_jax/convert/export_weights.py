"""Weights of an export: components of a model directory under the names of a foreign layout."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from ross_jax import checkpoints, console
from ross_jax.config import UserError
from ross_jax.convert import vision
from ross_jax.convert.dtypes import DTYPES, TAGS
from ross_jax.convert.importing import TABLES, is_finite
from ross_jax.convert.mapping import Piece, expand
from ross_jax.convert.safetensors_writer import SafetensorsWriter
from ross_jax.convert.tensors import TensorFiles, open_tensors
from ross_jax.convert.torch_writer import TorchWriter
from ross_jax.models.ross import RossConfig, abstract_params
from ross_jax.models.vision import VisionConfig
from ross_jax.tree import flatten, unflatten

Progress = Callable[[str], None]
DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
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


def saved_leaves(model: Path, config: RossConfig, names: list[str]) -> dict[str, dict[str, Any]]:
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


def open_component(
    model: Path, name: str, config: Any, leaves: Mapping[str, Any], foreign: Mapping[str, Any], full: bool
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
    standard = full and foreign.get("layout") in ("vision", "autoencoder")
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


def with_absent(component: Component, config: VisionConfig) -> Component:
    """The tower of a full checkpoint with all tensors that transformers expects."""
    absent = {vision.PREFIXES[0] + key: values for key, values in vision.absent_tensors(config).items()}
    return dataclasses.replace(component, absent={k: x for k, x in absent.items() if k not in component.unused})


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


def write_weights(
    model: Path,
    folder: Path,
    stem: str,
    components: Mapping[str, Component],
    dtype: str | None,
    writer: type[SafetensorsWriter | TorchWriter] = SafetensorsWriter,
) -> None:
    """Writes components as one checkpoint. `components`: scope -> component; `dtype`: a name of `DTYPE_NAMES`."""
    tag = DTYPE_NAMES[dtype] if dtype else None
    infos = {
        key: info for scope, component in components.items() for key, info in component.declare(scope, tag).items()
    }
    if not infos:
        return  # an identity projector
    total = sum(math.prod(shape) * DTYPES[tag].itemsize for tag, shape in infos.values())
    with writer(folder, stem, infos) as file, console.Progress(f"writing {stem}", total, "bytes") as written:

        def put(key: str, values: np.ndarray) -> None:
            values = _cast(values, infos[key][0], key)
            file.write(key, values)
            written.update(values.nbytes)

        for scope, component in components.items():
            for path, leaf in _leaves(model, component):
                for piece, key, _ in component.pieces[path]:
                    part = leaf if piece.layer is None else leaf[piece.layer]
                    values = np.ascontiguousarray(piece.transform.to_hf(part))
                    put(scope + key, _grown(values, infos[scope + key][1]))
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
