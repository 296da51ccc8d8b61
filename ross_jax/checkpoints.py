"""Checkpoints on disk. The one file that knows Orbax.

A model directory appears under its name complete or not at all:

    ross_jax.json   manifest: what the model is and where its tensors came from
    params/         Orbax checkpoint of the parameter tree
    unused/         tensors of the imported checkpoint that are never computed with, for export
    files/          configs, tokenizer

A run's directory is a model directory with two checkpoints in place of `params/`:

    frozen/         parameters that do not train, written once
    steps/N/        params/ and optimizer/ after step N
"""

import asyncio
import contextlib
import dataclasses
import fcntl
import json
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from ross_jax.config import UserError
from ross_jax.json_text import load_json
from ross_jax.tree import flatten, unflatten
from ross_jax.upgrade import upgrade

MANIFEST = "ross_jax.json"
FORMAT = 1
"""Version of the directory's layout."""
_FIELDS = dict.fromkeys(("config", "foreign", "reconstruction", "tokenizer"), dict)
_FIELDS |= {"template": str, "image_mode": str}
"""Field of a manifest -> its type. All but `config` may be absent."""
_CHUNK_BYTES = 64 * 2**20
"""Largest piece of an array that is stored, and so must be read, as one."""
_SETTLE = 0.25
"""Seconds of silence after which nothing of a failed call is taken to be in flight any more."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read or written."""


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
    handler = _StreamedHandler()
    registry = ocp.type_handlers.create_type_handler_registry((StreamedLeaf, handler))
    request = ocp.args.PyTreeSave(leaves, save_args=jax.tree.map(_path_options, leaves))
    with _orbax(folder, "cannot be written"):
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as checkpointer:
                checkpointer.save(folder.resolve(), args=request)
        finally:
            if handler.failure:
                for left in (folder, *folder.parent.glob(f"{folder.name}.orbax-checkpoint-tmp*")):
                    shutil.rmtree(left, ignore_errors=True)
                raise handler.failure


def abstract(folder: Path) -> dict[str, Any]:
    """Shapes and dtypes of a saved tree.

    Raises:
      CheckpointError: there is no complete checkpoint at `folder`.
    """
    with (
        _orbax(folder, "no complete checkpoint there"),
        ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer,
    ):
        metadata = checkpointer.metadata(folder.resolve()).item_metadata
        if metadata is None:
            raise ValueError("its metadata is missing or damaged")
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), metadata.tree)


def restore(folder: Path, tree: Any) -> Any:
    """Restores the leaves that `tree` names. Other leaves of the checkpoint are not read.

    Args:
      tree: nested mapping of `jax.ShapeDtypeStruct`. A leaf with a sharding becomes a `jax.Array` with it, a leaf
        without one a NumPy array. Values are cast to the leaf's dtype.

    Raises:
      CheckpointError: nothing complete at `folder`; files that cannot be read; leaves that are missing or have another
        shape, each by name.
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
    with _orbax(folder, "cannot be read"), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(folder.resolve(), args=request)


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes the manifest, with `format` added."""
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, **manifest}, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads a model directory's manifest, in today's names.

    Raises:
      CheckpointError: no such directory, no model directory, or one of another version.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such directory")
    try:
        manifest = load_json(folder / MANIFEST)
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: no {MANIFEST} in it, so it is no ross_jax model; `launch/convert.py import` makes one from a "
            "Hugging Face checkpoint"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{folder / MANIFEST}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise CheckpointError(f"{folder / MANIFEST}: not valid JSON ({error})") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"{folder / MANIFEST}: format {found}, this version reads {FORMAT}")
    for name, kind in _FIELDS.items():
        value = manifest.get(name)
        if not isinstance(value, kind) and (value is not None or name == "config"):
            raise CheckpointError(f"{folder / MANIFEST}: damaged: {name} is {str(value)[:80]!r}, no {kind.__name__}")
    return upgrade(MANIFEST, manifest)


@contextlib.contextmanager
def complete_directory(target: Path) -> Iterator[Path]:
    """Yields a directory to fill, which becomes `target` at the end, or disappears if anything fails.

    It is `.NAME.incomplete` beside the target. What a killed process left there is removed.

    Raises:
      CheckpointError: the target exists and is not empty, or another process is writing it.
    """
    try:
        target = target.resolve()
        _check_free(target)
        partial = target.with_name(f".{target.name}.incomplete")
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock(target):
            _check_free(target)  # another may just have finished
            shutil.rmtree(partial, ignore_errors=True)
            try:
                partial.mkdir()
                yield partial
                partial.replace(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error})") from error


def _check_free(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target}: exists already; choose another output or remove it first")


@contextlib.contextmanager
def lock(target: Path) -> Iterator[None]:
    """Held by one process at a time. The lock of a killed process is free.

    Raises:
      CheckpointError: another process holds it.
    """
    path = target.with_name(f".{target.name}.lock")
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its holder may have removed the file between opening and locking: then the lock guards nothing.
            held = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except (BlockingIOError, FileNotFoundError):
            held = False
        if not held:
            raise CheckpointError(f"{target}: another process is writing it")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _orbax(folder: Path, fault: str) -> Iterator[None]:
    """A call of Orbax: whatever it raises becomes a CheckpointError, and it prints nothing."""
    with _silence(), _checkpoint_error(folder, fault):
        yield


@contextlib.contextmanager
def _checkpoint_error(folder: Path, fault: str) -> Iterator[None]:
    """Turns whatever Orbax raises into a CheckpointError.

    Orbax and tensorstore raise ValueError, OSError, RuntimeError and more for a damaged file or a full disk.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        system_error = re.search(r": ([\w ]+) \[", str(error)) if "os_error_code" in str(error) else None
        reason = system_error[1] if system_error else getattr(error, "strerror", None) or error
        raise CheckpointError(f"{folder}: {fault} ({reason})") from error


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps Orbax from printing, with tracebacks, the errors that it raises.

    Each of its threads logs an error on its own, asyncio logs errors that nobody awaited, and reads and writes that are
    still in flight call back into a closed event loop, which Python hands to `sys.unraisablehook`. All of that may come
    after the error was raised, so a failed call ends when nothing has come for a while.
    """
    heard: list[float] = []  # when something was kept from being printed
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) == "Event loop is closed":
            heard.append(time.monotonic())
        else:
            previous(unraisable)

    def keep(record: logging.LogRecord) -> bool:
        if f"{os.sep}orbax{os.sep}" in record.pathname or "exception was never retrieved" in record.getMessage():
            heard.append(time.monotonic())
            return False
        return True

    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    for logger in loggers:
        logger.addFilter(keep)
    sys.unraisablehook = hook
    try:
        yield
    except BaseException:
        heard.append(time.monotonic())
        logging.getLogger("asyncio").addFilter(_is_not_orbax)  # stays: some tasks are collected when the process ends
        raise
    finally:
        while heard and time.monotonic() - heard[-1] < _SETTLE:
            time.sleep(_SETTLE / 5)
        sys.unraisablehook = previous
        for logger in loggers:
            logger.removeFilter(keep)


def _is_not_orbax(record: logging.LogRecord) -> bool:
    """Whether a line of asyncio's log is kept: False for errors of Orbax's tasks, which nobody awaited."""
    message = record.getMessage()
    return not ("exception was never retrieved" in message and "orbax" in message)


@contextlib.contextmanager
def writing(path: Path, run: Path) -> Iterator[None]:
    """Turns an error of the disk into a CheckpointError that names `path` and the step that `run` continues from."""
    try:
        yield
    except Exception as error:
        # The tokenizers library raises the system's errors as plain Exception.
        if not isinstance(error, OSError) and "(os error" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: cannot be written ({reason}); {_kept(run)}") from error


def _kept(run: Path) -> str:
    latest = latest_step(run)
    return "no step is complete yet" if latest is None else f"step {latest} is complete, and is continued from"


def latest_step(run: Path) -> int | None:
    """The newest step of a run's directory that is complete on disk."""
    return max((int(path.name) for path in (run / "steps").glob("*") if path.name.isdigit()), default=None)


def parameter_folders(model: Path) -> list[Path]:
    """The Orbax checkpoints that together hold a model directory's parameters; of a run, those of its latest step.

    Raises:
      CheckpointError: there is none.
    """
    if (model / "params").is_dir():
        return [model / "params"]
    latest = latest_step(model)
    if latest is None:
        raise CheckpointError(f"{model}: holds no parameters: neither params/ nor a completed step in steps/")
    return [path for path in (model / "frozen", model / "steps" / str(latest) / "params") if path.is_dir()]


def model_abstract(model: Path) -> dict[str, Any]:
    """Shapes and dtypes of a model directory's parameters; errors as `parameter_folders` and `abstract`."""
    flat: dict[str, Any] = {}
    for folder in parameter_folders(model):
        flat |= flatten(abstract(folder))
    return unflatten(flat)


def restore_model(model: Path, tree: Any) -> Any:
    """`restore` of leaves that may lie in any of the model directory's checkpoints."""
    folders = parameter_folders(model)
    leaves, restored = flatten(tree), {}
    for folder in folders:
        last = folder == folders[-1]
        present = flatten(abstract(folder))
        # The last folder is asked for leaves that no folder has, and names them in its error.
        part = {path: leaf for path, leaf in leaves.items() if path in present or (last and path not in restored)}
        if part:
            restored |= flatten(restore(folder, unflatten(part)))
    return unflatten(restored)


class RunCheckpoints:
    """Checkpoints of a training run: `frozen/` once, `steps/N/` again and again, written in the background.

    A state is anything with `step`, `params`, `opt_state` and `frozen`, such as `ross_jax.training.state.TrainState`.
    """

    def __init__(self, folder: Path, keep: int):
        """Opens a run's directory, which is made if it is absent. The newest `keep` steps stay in it."""
        self._folder = folder.resolve()
        self._background = contextlib.ExitStack()  # holds `_silence` while a step is being written
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        with _orbax(folder, "cannot be written"):
            self._folder.mkdir(parents=True, exist_ok=True)
            names = ("params", "optimizer")
            self._manager = ocp.CheckpointManager(self._folder / "steps", options=options, item_names=names)

    def latest(self) -> int | None:
        """The newest complete step."""
        return self._manager.latest_step()

    def save_frozen(self, frozen: Any) -> None:
        """Writes the parameters that never change. Returns when they are on disk."""
        if not jax.tree.leaves(frozen):
            return
        folder = self._folder / "frozen"
        with _orbax(folder, "cannot be written"), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(folder, args=ocp.args.PyTreeSave(frozen), force=True)

    def save(self, step: int, state: Any) -> None:
        """Copies the state off the devices. Writing goes on in the background until `wait` returns.

        Raises:
          CheckpointError: this step, or the one before it, cannot be written; names the step to continue from.
        """
        if step == self._manager.latest_step():
            return
        optimizer = {"opt_state": state.opt_state, "step": state.step}
        items = ocp.args.Composite(params=ocp.args.PyTreeSave(state.params), optimizer=ocp.args.PyTreeSave(optimizer))
        self.wait()
        self._background.enter_context(_silence())
        with self._saving():
            self._manager.save(step, args=items, force=True)

    def wait(self) -> None:
        """Returns when everything is on disk; errors as `save`."""
        with self._background.pop_all(), _silence(), self._saving():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Adds the step that the run continues from to an error while a step is written."""
        try:
            with _checkpoint_error(self._folder / "steps", "a checkpoint cannot be written"):
                yield
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {_kept(self._folder)}") from error

    def restore(self, step: int, state: Any) -> Any:
        """The state after `step` steps, with the shapes, dtypes and shardings of `state`."""
        optimizer = {"opt_state": state.opt_state, "step": state.step}

        def request(tree: Any) -> ocp.args.PyTreeRestore:
            return ocp.args.PyTreeRestore(tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))

        with _orbax(self._folder, "cannot be read"):
            items = ocp.args.Composite(params=request(state.params), optimizer=request(optimizer))
            restored = self._manager.restore(step, args=items)
            frozen = restore(self._folder / "frozen", state.frozen) if jax.tree.leaves(state.frozen) else {}
        values = {"params": restored.params, **restored.optimizer, "frozen": frozen}
        return type(state)(**values)

    def stop_at(self, requested: Callable[[], bool]) -> Callable[[int], bool]:
        """Function: step -> whether to end after it, the same on all processes.

        Args:
          requested: whether a signal asked this process to end. With several processes, JAX's own handler makes all end
            after the same step.
        """
        if jax.process_count() == 1:
            return lambda step: requested()
        return self._manager.reached_preemption
