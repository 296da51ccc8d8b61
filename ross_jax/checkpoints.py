"""Checkpoints on disk. The one file that knows Orbax.

A model directory holds `ross_jax.json` (the manifest: what the model is and where its tensors came from), `params/`
(an Orbax checkpoint of the parameter tree), `unused/` (foreign tensors that are only kept) and `files/` (configs,
tokenizer). It appears under its name complete or not at all.
"""

import asyncio
import contextlib
import dataclasses
import fcntl
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from ross_jax.config import UserError

MANIFEST = "ross_jax.json"
FORMAT = 1
"""Version of the directory's layout."""
_CHUNK_BYTES = 64 * 2**20
"""Largest piece that is stored, and so must be read, as one."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read or written."""


@dataclasses.dataclass(frozen=True)
class StreamedLeaf:
    """An array that is read, part by part, only while it is being saved.

    Attributes:
      parts: yields (index along the leading axis, or None for the whole array; values).
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: Callable[[], Iterator[tuple[int | None, np.ndarray]]]

    @property
    def size(self) -> int:
        """Number of elements; Orbax asks for it."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array; Orbax asks for it."""
        return self.size * self.dtype.itemsize


class _StreamedHandler(ocp.type_handlers.NumpyHandler):
    """Writes one part of one leaf at a time, so that memory is bounded by the largest part."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)
        self._one_at_a_time = asyncio.Lock()

    async def _open_and_write(self, value: StreamedLeaf, tspec: dict[str, Any], ts_context: ts.Context):
        array = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
        async with self._one_at_a_time:
            for index, values in value.parts():
                target = array if index is None else array[index]
                await target.write(values, can_reference_source_data_indefinitely=True)


def _path_options(leaf: StreamedLeaf) -> ocp.SaveArgs:
    stacked = len(leaf.shape) > 1
    return ocp.SaveArgs(shard_axes=(0,) if stacked else (), chunk_byte_size=_CHUNK_BYTES)


def save_streamed(folder: Path, leaves: Mapping[str, Any]) -> None:
    """Saves a nested mapping of `StreamedLeaf` as an Orbax checkpoint that holds ordinary arrays."""
    registry = ocp.type_handlers.create_type_handler_registry((StreamedLeaf, _StreamedHandler()))
    options = jax.tree.map(_path_options, leaves)
    with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as checkpointer:
        checkpointer.save(folder.resolve(), args=ocp.args.PyTreeSave(leaves, save_args=options))


def abstract(folder: Path) -> dict[str, Any]:
    """Shapes and dtypes of a saved tree.

    Raises:
      CheckpointError: there is no complete checkpoint at `folder`.
    """
    try:
        with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = checkpointer.metadata(folder.resolve()).item_metadata.tree
    except (FileNotFoundError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder}: no complete checkpoint there ({error})") from error
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def restore(folder: Path, tree: Any) -> Any:
    """Restores the leaves that `tree` names; others in the checkpoint are not read.

    Args:
      tree: nested mapping of `jax.ShapeDtypeStruct`. One with a sharding is restored as a `jax.Array` so placed, one
        without as a NumPy array. Values are cast to the dtype asked for.

    Raises:
      CheckpointError: nothing complete at `folder`, or leaves that are missing or have another shape, all named.
    """
    saved = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(abstract(folder))}
    problems = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path)
        if name not in saved:
            problems.append(f"{name} is not in the checkpoint")
        elif saved[name].shape != leaf.shape:
            problems.append(f"{name} has shape {saved[name].shape}, expected {leaf.shape}")
    if problems:
        raise CheckpointError(f"{folder}: " + "\n  ".join(["does not fit", *problems]))

    def options(leaf: jax.ShapeDtypeStruct):
        if leaf.sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
        return ocp.ArrayRestoreArgs(restore_type=jax.Array, dtype=leaf.dtype, sharding=leaf.sharding)

    request = ocp.args.PyTreeRestore(tree, restore_args=jax.tree.map(options, tree), partial_restore=True)
    with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(folder.resolve(), args=request)


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes the manifest; `format` is added."""
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, **manifest}, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads a model directory's manifest.

    Raises:
      CheckpointError: no such directory, none of ours, or of another version.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such directory")
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: no {MANIFEST} in it, so it is no ross_jax model; `launch/convert.py import` makes one from a "
            "Hugging Face checkpoint"
        ) from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{folder / MANIFEST}: not valid JSON ({error})") from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{folder / MANIFEST}: format {manifest.get('format')}, this version reads {FORMAT}")
    return manifest


@contextlib.contextmanager
def complete_directory(target: Path) -> Iterator[Path]:
    """A directory to fill that becomes `target` at the end, or disappears if anything fails.

    It is filled as `.NAME.incomplete` beside the target. What a killed process left there is cleared by the next.

    Raises:
      CheckpointError: the target exists and is not empty, or another process is writing it.
    """
    target = target.absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target}: exists already; choose another output or remove it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.incomplete")
    lock_path = target.with_name(f".{target.name}.lock")
    with lock_path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{target}: another process is writing it") from None
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            yield partial
            if target.exists():
                target.rmdir()
            partial.rename(target)
        except OSError as error:
            raise CheckpointError(f"{target}: cannot be written ({error})") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            lock_path.unlink(missing_ok=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax's informational warnings off the user's terminal."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
