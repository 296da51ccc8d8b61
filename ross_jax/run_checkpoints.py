"""Checkpoints of a training run, written in the background."""

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from ross_jax.checkpoints import (
    DAMAGED,
    abstract,
    check_path,
    kept_or_unknown,
    latest_step,
    restore,
    restore_all,
    restore_optimizer,
    sound_steps,
    tree_handler,
    writing,
)
from ross_jax.directories import CheckpointError, DamagedError
from ross_jax.orbax_calls import MarkedPath, checkpoint_error, orbax_call, orbax_path, silence
from ross_jax.storage import StorageError, remove_tree

logger = logging.getLogger(__name__)


class RunCheckpoints:
    """Checkpoints of a training run: `frozen/` once, `steps/N/` again and again, written in the background.

    A state is anything with `step`, `params`, `opt_state` and `frozen`, such as `ross_jax.training.state.TrainState`.
    """

    def __init__(self, folder: Path, keep: int):
        """Opens a run's directory, which is made if it is absent. The newest `keep` steps stay in it."""
        self._folder = folder.resolve()
        self._background = contextlib.ExitStack()  # holds `silence` while a step is being written
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, temporary_path_class=MarkedPath)
        check_path(folder)
        with orbax_call(folder, "cannot be written"):
            self._folder.mkdir(parents=True, exist_ok=True)
            handlers = {name: tree_handler() for name in ("params", "optimizer")}
            self._manager = ocp.CheckpointManager(
                orbax_path(self._folder / "steps"), options=options, item_handlers=handlers
            )

    def _checkpointer(self) -> ocp.Checkpointer:
        return ocp.Checkpointer(tree_handler(), temporary_path_class=MarkedPath)

    def latest(self) -> int | None:
        """The newest step that is complete and not marked as damaged."""
        return latest_step(self._folder)

    def probe(self) -> None:
        """Writes a small array and reads it back, as a step will be. Called by all processes.

        Raises:
          CheckpointError: it does not come back.
        """
        folder, tree = self._folder / ".probe", {"array": np.arange(1000)}
        try:
            with orbax_call(self._folder, "cannot be written"), self._checkpointer() as checkpointer:
                checkpointer.save(orbax_path(folder), args=ocp.args.PyTreeSave(tree), force=True)
                if not np.array_equal(restore(folder, abstract(folder))["array"], tree["array"]):
                    raise CheckpointError(f"{folder}: what was written there cannot be read back")
                ocp.multihost.sync_global_processes("ross_jax probe")
        except (CheckpointError, StorageError) as error:
            raise CheckpointError(f"{error}; {kept_or_unknown(self._folder)}") from error
        finally:
            if jax.process_index() == 0:
                with contextlib.suppress(StorageError):
                    remove_tree(folder)

    def save_frozen(self, frozen: Any) -> None:
        """Writes the parameters that never change. Returns when they are on disk."""
        if not jax.tree.leaves(frozen):
            return
        folder = self._folder / "frozen"
        with orbax_call(folder, "cannot be written"), self._checkpointer() as checkpointer:
            checkpointer.save(orbax_path(folder), args=ocp.args.PyTreeSave(frozen), force=True)

    def save(self, step: int, state: Any) -> None:
        """Copies the state off the devices. Writing goes on in the background until `wait` returns.

        Raises:
          CheckpointError: this step, or the one before it, cannot be written; names the step to continue from.
        """
        if step == self.latest():
            return
        optimizer = {"opt_state": state.opt_state, "step": state.step}
        items = ocp.args.Composite(params=ocp.args.PyTreeSave(state.params), optimizer=ocp.args.PyTreeSave(optimizer))
        self.wait()
        self._background.enter_context(silence())
        with self._saving():
            if step in self._manager.all_steps():
                self._manager.delete(step)  # damaged
            self._manager.save(step, args=items, force=True)

    def wait(self) -> None:
        """Returns when everything is on disk; errors as `save`."""
        with self._background.pop_all(), silence(), self._saving():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Adds the step that the run continues from to an error while a step is written."""
        try:
            with checkpoint_error(self._folder / "steps", "a checkpoint cannot be written"):
                yield
        except (CheckpointError, StorageError) as error:
            raise CheckpointError(f"{error}; {kept_or_unknown(self._folder)}") from error

    def restore(self, state: Any, agree: Callable[[str], str] = str) -> tuple[int, Any]:
        """The newest step that can be read, and the state after it.

        Newer steps, which cannot be read, are marked as damaged.

        Args:
          state: shapes, dtypes and shardings.
          agree: function: this process's error, or nothing -> an error of any process, or nothing. All processes call
            it together.

        Raises:
          CheckpointError: `frozen/` or all steps are damaged.
        """
        frozen = restore(self._folder / "frozen", state.frozen) if jax.tree.leaves(state.frozen) else {}
        damaged: dict[int, str] = {}
        for step in reversed(sound_steps(self._folder)):
            found, error = {}, ""
            try:
                found = self._restore_step(step, state)
            except DamagedError as caught:
                error = str(caught)
            error = agree(error)
            if not error:
                self._mark(damaged, step)
                return step, type(state)(**found, frozen=frozen)
            damaged[step] = error
        listed = "\n  ".join(damaged.values())
        raise CheckpointError(f"{self._folder}: no step can be read:\n  {listed}\nRestore one of them from a copy")

    def _restore_step(self, step: int, state: Any) -> dict[str, Any]:
        folder = self._folder / "steps" / str(step)
        return {"params": restore_all(folder / "params", state.params), **restore_optimizer(folder, state)}

    def _mark(self, damaged: Mapping[int, str], step: int) -> None:
        for number, error in damaged.items():
            logger.warning("step %d is damaged, the run continues from step %d: %s", number, step, error)
            if jax.process_index() == 0:
                mark = self._folder / "steps" / str(number) / DAMAGED
                with writing(mark, self._folder):
                    mark.write_text(error + "\n")

    def stop_at(self, requested: Callable[[], bool]) -> Callable[[int], bool]:
        """Function: step -> whether to end after it, the same on all processes.

        Args:
          requested: whether a signal asked this process to end. With several processes, JAX's own handler makes all end
            after the same step.
        """
        if jax.process_count() == 1:
            return lambda step: requested()
        sent = False

        def stop(step: int) -> bool:
            nonlocal sent
            if requested() and not sent:
                sent = True
                os.kill(os.getpid(), signal.SIGTERM)  # which JAX tells to the other processes
            return self._manager.reached_preemption(step)

        return stop
