"""What a run does besides training: draw images, evaluate, trace."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import UInt8

from ross_jax.training.state import TrainState


@runtime_checkable
class Callback(Protocol):
    """Called by the training loop. A subclass defines the methods that it needs; the others do nothing.

    All processes call a method at the same step, so that it may compute on all devices. What it returns is written by
    the one process that reports.
    """

    def on_step(self, step: int, state: TrainState, batch: Mapping[str, jax.Array]) -> None:
        """Called after every step.

        Args:
          step: number of steps done.
          state: after the step. Its arrays are gone after the next step.
          batch: the step's.
        """

    def images(
        self, step: int, state: TrainState, batch: Mapping[str, jax.Array]
    ) -> UInt8[np.ndarray, "height width 3"] | None:
        """An image for TensorBoard, every `loop.images` steps. Arguments as for `on_step`."""

    def evaluate(self, state: TrainState) -> tuple[dict[str, float], UInt8[np.ndarray, "height width 3"]] | None:
        """Scores by name and an image, every `loop.evaluate` steps, before the first step and after the last."""

    def benchmark(self, state: TrainState) -> dict[str, float] | None:
        """Scores of benchmarks by name, every `loop.benchmark` steps and after the last."""
