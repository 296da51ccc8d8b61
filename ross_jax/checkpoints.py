"""Checkpoints on disk. This file, `run_checkpoints.py` and `orbax_calls.py` alone know Orbax.

A model directory appears complete or not at all; in a bucket it has a file INCOMPLETE meanwhile:

    ross_jax.json   manifest: what the model is and where its tensors came from
    params/         Orbax checkpoint of the parameter tree
    lora/           Orbax checkpoint of an imported adapter; its leaves come before others of the same path
    unused/         tensors of the imported checkpoint that are never computed with, for export
    files/          configs, tokenizer

A run's directory is a model directory with two checkpoints in place of `params/`:

    frozen/         parameters that do not train, written once
    steps/N/        params/ and optimizer/ after step N; commit_success.txt, written last; DAMAGED, with the reason, if
                    it could not be read

Every chunk of an array carries a CRC-32C, and `SHA256SUMS` has digests of all other files. Both are compared with what
is read. Directories that were written before have neither: they are read, with a warning.
"""

import asyncio
import contextlib
import dataclasses
import functools
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from orbax.checkpoint._src.serialization import tensorstore_utils

from ross_jax.directories import SUMS, CheckpointError, DamagedError, check_sums, refuse_incomplete, write_sums
from ross_jax.json_text import load_json
from ross_jax.lora import hide_factors, restore_merged
from ross_jax.orbax_calls import COMMIT, MarkedPath, is_complete, orbax_call, orbax_path
from ross_jax.storage import StorageError, location, remove_tree
from ross_jax.tree import flatten, unflatten
from ross_jax.upgrade import upgrade

logger = logging.getLogger(__name__)

MANIFEST = "ross_jax.json"
FORMAT = 2
"""Version of the directory's layout. Version 1 had no digests."""
UPDATES = "lora"
"""Folder of a model directory with an imported adapter."""
DAMAGED = "DAMAGED"
"""File that marks a step that is skipped."""
_FIELDS = dict.fromkeys(("config", "foreign", "reconstruction", "tokenizer"), dict)
_FIELDS |= {"template": str, "image_mode": str, "context": int}
"""Field of a manifest -> its type. All but `config` may be absent."""
_CHUNK_BYTES = 64 * 2**20
"""Largest piece of an array that is stored, and so must be read, as one."""
_UNREADABLE = set("[]\\")
"""Characters of a path that Orbax takes for a pattern."""
_LATER = ("_CHECKPOINT_METADATA", COMMIT)
"""Files that Orbax writes when a checkpoint is complete. They say nothing about its content."""


@dataclasses.dataclass(frozen=True)
class StreamedLeaf:
    """An array that is read part by part, and only while it is being saved.

    Attributes:
      parts: yields (index along the leading axis, values), or (None, values) for the whole array at once.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: Callable[[], Iterator[tuple[int | None, np.ndarray]]]

    @property
    def size(self) -> int:
        """Number of elements. Orbax asks for it."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array. Orbax asks for it."""
        return self.size * self.dtype.itemsize


@functools.cache
def _checksum_chunks() -> None:
    """From now on, Orbax stores a CRC-32C with each chunk, which every reader compares. It has no option for that."""
    build = tensorstore_utils._build_zarr3_metadata

    def build_with_checksums(*args: Any) -> dict[str, Any]:
        metadata = build(*args)
        metadata["codecs"][0]["configuration"]["codecs"].append({"name": "crc32c"})
        return metadata

    tensorstore_utils._build_zarr3_metadata = build_with_checksums


def tree_handler(**options: Any) -> ocp.PyTreeCheckpointHandler:
    """Writes trees of arrays, with a CRC-32C in each chunk and digests of all other files."""
    _checksum_chunks()
    handler = ocp.PyTreeCheckpointHandler(use_zarr3=True, **options)
    finish = handler.finalize

    def finalize(directory: epath.Path) -> None:
        finish(directory)
        folder = location(str(directory))
        chunks = set(folder.glob("ocdbt.process_*/d/*"))
        files = (path for path in folder.rglob("*") if path.is_file() and path not in chunks)
        write_sums(folder, (path for path in files if path.name not in _LATER))

    handler.finalize = finalize  # a subclass would need classes of arguments of its own
    return handler


class _StreamedHandler(ocp.type_handlers.NumpyHandler):
    """Writes one part of one leaf at a time, so that memory is bounded by the largest part.

    Attributes:
      failure: first error, after which remaining leaves are skipped. It is kept instead of raised, because Orbax would
        abandon the coroutines of the other leaves.
    """

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)
        self.failure: Exception | None = None
        self._one_at_a_time = asyncio.Lock()

    async def _open_and_write(self, value: StreamedLeaf, tspec: dict[str, Any], ts_context: ts.Context):
        try:
            array = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
            async with self._one_at_a_time:
                for index, values in value.parts() if self.failure is None else ():
                    target = array if index is None else array[index]
                    await target.write(values, can_reference_source_data_indefinitely=True)
        except Exception as error:
            self.failure = self.failure or error


def _path_options(leaf: StreamedLeaf) -> ocp.SaveArgs:
    stacked = len(leaf.shape) > 1
    return ocp.SaveArgs(shard_axes=(0,) if stacked else (), chunk_byte_size=_CHUNK_BYTES)


def save_streamed(folder: Path, leaves: Mapping[str, Any]) -> None:
    """Saves a nested mapping of `StreamedLeaf` as an Orbax checkpoint that holds ordinary arrays.

    Raises:
      CheckpointError: it cannot be written: a full disk, no permission.
    """
    check_path(folder)
    handler = _StreamedHandler()
    registry = ocp.type_handlers.create_type_handler_registry((StreamedLeaf, handler))
    request = ocp.args.PyTreeSave(leaves, save_args=jax.tree.map(_path_options, leaves))
    with orbax_call(folder, "cannot be written"):
        try:
            writer = tree_handler(type_handler_registry=registry)
            with ocp.Checkpointer(writer, temporary_path_class=MarkedPath) as checkpointer:
                checkpointer.save(orbax_path(folder), args=request)
        finally:
            if handler.failure:
                remove_tree(folder)
                raise handler.failure


def abstract(folder: Path) -> dict[str, Any]:
    """Shapes and dtypes of a saved tree.

    Raises:
      CheckpointError: there is no complete checkpoint at `folder`; a DamagedError if it is not as it was written.
    """
    check_path(folder)
    with (
        orbax_call(folder, "no complete checkpoint there", DamagedError),
        ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer,
    ):
        has_digests = check_sums(folder, "_METADATA")
        metadata = checkpointer.metadata(orbax_path(folder)).item_metadata
        if metadata is None:
            raise ValueError("its metadata is missing or damaged")
        if not has_digests:
            if metadata.use_zarr3:
                raise ValueError(f"{SUMS} is missing")
            _say_unverified(folder)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), metadata.tree)


@functools.cache
def _say_unverified(folder: Path) -> None:
    logger.warning("%s: was written without checksums: it is read, but damage would go unnoticed", folder)


def check_path(folder: Path) -> None:
    """Raises CheckpointError if Orbax could not read what it writes at this path."""
    found = sorted(_UNREADABLE & set(str(folder.resolve())))
    if found:
        raise CheckpointError(f"{folder}: checkpoints cannot lie in a path with {' or '.join(found)}; choose another")


def restore(folder: Path, tree: Any) -> Any:
    """Restores the leaves that `tree` names. Other leaves of the checkpoint are not read.

    Args:
      tree: nested mapping of `jax.ShapeDtypeStruct`. A leaf with a sharding becomes a `jax.Array` with it, a leaf
        without one a NumPy array. Values are cast to the leaf's dtype.

    Raises:
      CheckpointError: nothing complete at `folder`; leaves that are missing or have another shape, each by name.
      DamagedError: files that cannot be read, or are not as they were written.
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

    return _read(folder, ocp.args.PyTreeRestore(tree, restore_args=jax.tree.map(options, tree), partial_restore=True))


def _read(folder: Path, request: ocp.args.PyTreeRestore) -> Any:
    """What Orbax restores. No process waits for another one, so that an error on one leaves no other hanging."""
    with orbax_call(folder, "cannot be read", DamagedError):
        handler = ocp.PyTreeCheckpointHandler()
        try:
            return handler.restore(orbax_path(folder), args=request)
        finally:
            handler.close()


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes the manifest, with `format` added, and the digests of `files/` and `unused/`, which are complete."""
    (folder / MANIFEST).write_text(json.dumps({**manifest, "format": FORMAT}, indent=1) + "\n")
    kept = (path for name in ("files", "unused") for path in (folder / name).rglob("*") if path.is_file())
    write_sums(folder, [folder / MANIFEST, *kept])


def read_manifest(folder: Path, unused: bool = False) -> dict[str, Any]:
    """Reads a model directory's manifest, in today's names, and compares the digests of manifest and `files/`.

    Args:
      unused: whether digests of `unused/` are compared, too.

    Raises:
      CheckpointError: no such directory, no model directory, or one of another version.
      DamagedError: files are not as they were written.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such directory")
    refuse_incomplete(folder)
    beginnings = (MANIFEST, "files/", *(["unused/"] if unused else []))
    has_digests = (folder / MANIFEST).exists() and check_sums(folder, MANIFEST, beginnings)
    try:
        manifest = load_json(folder / MANIFEST)
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: no {MANIFEST} in it, so it is no ross_jax model; `launch/convert.py import` makes one from a "
            "Hugging Face checkpoint"
        ) from None
    except StorageError:
        raise
    except OSError as error:
        raise CheckpointError(f"{folder / MANIFEST}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise CheckpointError(f"{folder / MANIFEST}: not valid JSON ({error})") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found not in (1, FORMAT):
        raise CheckpointError(f"{folder / MANIFEST}: format {found}, this version reads 1 and {FORMAT}")
    if not has_digests:
        if found == FORMAT:
            raise DamagedError(f"{folder / SUMS}: is missing; restore it from a copy")
        _say_unverified(folder)
    for name, kind in _FIELDS.items():
        value = manifest.get(name)
        if not isinstance(value, kind) and (value is not None or name == "config"):
            expected = {dict: "an object", str: "a string", int: "a number"}[kind]
            raise CheckpointError(f"{folder / MANIFEST}: {name} is {repr(value)[:80]}, expected {expected}")
    return upgrade(MANIFEST, manifest)


@contextlib.contextmanager
def writing(path: Path, run: Path) -> Iterator[None]:
    """Turns an error of the disk into a CheckpointError that names `path` and the step that `run` continues from."""
    try:
        yield
    except Exception as error:
        # The tokenizers library raises the system's errors as plain Exception.
        if isinstance(error, StorageError):
            raise CheckpointError(f"{error}; {kept_or_unknown(run)}") from error
        if not isinstance(error, OSError) and "(os error" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: cannot be written ({reason}); {kept_step(run)}") from error


def kept_or_unknown(run: Path) -> str:
    """`kept_step`, or that it is unknown where the storage does not answer."""
    try:
        return kept_step(run)
    except StorageError:
        return "the same command continues from the last complete step"


def kept_step(run: Path) -> str:
    """A sentence's end: which step of a run is complete."""
    latest = latest_step(run)
    return "no step is complete yet" if latest is None else f"step {latest} is complete, and is continued from"


def latest_step(run: Path) -> int | None:
    """The newest step of a run's directory that is complete on disk and not marked as damaged."""
    return max(sound_steps(run), default=None)


def sound_steps(run: Path) -> list[int]:
    """All steps of a run's directory that are complete on disk and not marked as damaged, in order."""
    folders = (path for path in (run / "steps").glob("*") if path.name.isdigit())
    return sorted(int(path.name) for path in folders if is_complete(path) and not (path / DAMAGED).exists())


def parameter_folders(model: Path, step: int | None = None) -> list[Path]:
    """The Orbax checkpoints that together hold a model directory's parameters; of a run, those of a step.

    Args:
      step: of a run. None: its latest one.

    Raises:
      CheckpointError: there is none.
    """
    folders = [model / "params"]
    if not folders[0].is_dir():
        latest = latest_step(model) if step is None else step
        if latest is None:
            raise CheckpointError(f"{model}: holds no parameters: neither params/ nor a completed step in steps/")
        folders = [model / "frozen", model / "steps" / str(latest) / "params"]
    return [path for path in (*folders, model / UPDATES) if path.is_dir()]


def model_abstract(model: Path, factors: bool = False) -> dict[str, Any]:
    """Shapes and dtypes of a model directory's parameters; errors as `parameter_folders` and `abstract`.

    Args:
      factors: whether factors of low-rank updates are listed. False: shapes after merging.
    """
    flat: dict[str, Any] = {}
    for folder in parameter_folders(model):
        flat |= flatten(abstract(folder))
    return unflatten(flat if factors else hide_factors(flat))


def restore_model(model: Path, tree: Any, step: int | None = None) -> Any:
    """`restore` of leaves that may lie in any of the model directory's checkpoints; of a run, of a step of it.

    A kernel with a low-rank update has the update merged into it, unless the tree names the update's factors.
    """
    folders = parameter_folders(model, step)
    present = {folder: flatten(abstract(folder)) for folder in folders}

    def read(leaves: dict[str, Any]) -> dict[str, Any]:
        restored = {}
        for folder in folders:
            last = folder == folders[-1]
            # The last folder is asked for leaves that no folder has, and names them in its error.
            part = {p: leaf for p, leaf in leaves.items() if p in present[folder] or (last and p not in restored)}
            if part:
                restored |= flatten(restore(folder, unflatten(part)))
        return restored

    stored = {path: leaf for leaves in present.values() for path, leaf in leaves.items()}
    return unflatten(restore_merged(flatten(tree), stored, read))


def restore_optimizer(step: Path, state: Any) -> dict[str, Any]:
    """`opt_state` and `step` from the directory of a run's step; errors as `restore`.

    Args:
      state: shapes, dtypes and shardings.
    """
    return restore_all(step / "optimizer", {"opt_state": state.opt_state, "step": state.step})


def restore_all(folder: Path, tree: Any) -> Any:
    """The whole checkpoint, whose structure may be any tree; errors as `restore`."""
    abstract(folder)  # compares digests
    options = ocp.checkpoint_utils.construct_restore_args(tree)
    return _read(folder, ocp.args.PyTreeRestore(tree, restore_args=options))
