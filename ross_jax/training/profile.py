"""A trace of some steps, for xprof."""

import contextlib
from collections.abc import Mapping
from pathlib import Path

import jax

from ross_jax.checkpoints import writing
from ross_jax.config import ConfigError
from ross_jax.storage import local_folder
from ross_jax.training.callback import Callback
from ross_jax.training.state import TrainState


def parse_steps(text: str) -> tuple[int, int]:
    """First traced step, counted from 1, and number of traced steps, from `START:COUNT`.

    Raises:
      ConfigError: `text` is something else.
    """
    first, _, count = text.partition(":")
    if not (first.isdecimal() and count.isdecimal() and int(first) and int(count)):
        raise ConfigError(f"--profile={text}: expected START:COUNT, such as 20:5 for the steps 20 to 24")
    return int(first), int(count)


class Tracer(Callback):
    """Writes a trace of `count` steps from step `first` on, or of as many as come before the run ends.

    A context manager around the loop. Only process 0 writes, because all processes do the same and those of one host
    would write the same file. A run that continues after `first` is not traced, so that the same command continues it.
    """

    def __init__(self, folder: Path, first: int, count: int, done: int, steps: int):
        """Traces to `folder` a run of `steps` steps, of which `done` are done.

        Raises:
          ConfigError: the run ends before `first`.
          CheckpointError: on entering, or from `on_step`: `folder` cannot be made.
        """
        if first > steps:
            raise ConfigError(f"--profile={first}:{count}: the run has {steps} steps")
        self._folder, self._first, self._end, self._done = folder, first, first + count, done
        self._running, self._local = False, contextlib.ExitStack()

    def __enter__(self) -> "Tracer":
        self._switch(self._done)
        return self

    def __exit__(self, *error: object) -> None:
        if self._running:
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._local.close()

    def on_step(self, step: int, state: TrainState, batch: Mapping[str, jax.Array]) -> None:
        if step + 1 in (self._first, self._end):
            jax.block_until_ready(state)  # steps run behind the loop, and only whole steps count
        self._switch(step)

    def _switch(self, step: int) -> None:
        """Starts or ends the trace after `step` steps."""
        if step + 1 == self._first and not self._running and jax.process_index() == 0:
            with writing(self._folder, self._folder.parent):
                place = self._local.enter_context(local_folder(self._folder))
            jax.profiler.start_trace(place)
            self._running = True
        elif self._running and step + 1 >= self._end:
            self._stop()
            self._running = False
