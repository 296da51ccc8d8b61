"""A trace of some steps, for xprof."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from ross_jax.checkpoints import writing
from ross_jax.config import ConfigError
from ross_jax.training.loop import Hook
from ross_jax.training.state import TrainState


def parse_steps(text: str) -> tuple[int, int]:
    """`START:COUNT` -> first step of the trace, from 1, and how many.

    Raises:
      ConfigError: it is something else.
    """
    first, _, count = text.partition(":")
    if not (first.isdecimal() and count.isdecimal() and int(first) and int(count)):
        raise ConfigError(f"--profile={text}: expected START:COUNT, such as 20:5 for the steps 20 to 24")
    return int(first), int(count)


@contextlib.contextmanager
def tracing(folder: Path, first: int, count: int, done: int, steps: int) -> Iterator[Hook]:
    """A hook that writes a trace of `count` steps from `first` on to `folder`, or of those that come before the end.

    Of several processes the first writes: all do the same, and those of one host would write the same file. A run that
    is continued behind `first` is not traced, so that the same command continues it.

    Args:
      done: steps before the run.
      steps: of the whole run.

    Raises:
      ConfigError: the run ends before `first`.
      CheckpointError: `folder` cannot be made.
    """
    if first > steps:
        raise ConfigError(f"--profile={first}:{count}: the run has {steps} steps")
    running = False

    def switch(step: int) -> None:
        nonlocal running
        if step + 1 == first and not running and jax.process_index() == 0:
            with writing(folder, folder.parent):
                folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(folder)
            running = True
        elif running and step + 1 >= first + count:
            jax.profiler.stop_trace()
            running = False

    def hook(step: int, state: TrainState, batch: Mapping[str, Any]) -> None:
        if step + 1 in (first, first + count):
            jax.block_until_ready(state)  # steps run behind the loop; only whole ones count
        switch(step)

    switch(done)
    try:
        yield hook
    finally:
        if running:
            jax.profiler.stop_trace()
