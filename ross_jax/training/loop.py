"""The loop: batches in, steps done, metrics and checkpoints out."""

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from ross_jax.checkpoints import RunCheckpoints
from ross_jax.config import UserError
from ross_jax.training.metrics import LossRangeMonitor, Meter, Writer
from ross_jax.training.state import TrainState

Hook = Callable[[int, TrainState, Mapping[str, Any]], None]
Draw = Callable[[int, TrainState, Mapping[str, Any]], np.ndarray]
Evaluate = Callable[[TrainState], tuple[dict[str, float], np.ndarray]]


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How often things happen, in steps.

    Attributes:
      log: numbers are fetched and written.
      save: a checkpoint is made; the last step always is one.
      keep: newest checkpoints that stay on disk.
      images: reconstructions are drawn for TensorBoard; 0 never.
      evaluate: pictures that are not trained on are reconstructed and scored, before the first step and after the last
        too; 0 never.
      expected_reconstruction: lowest and highest reconstruction loss after the warmup, averaged over ten logs; a
        warning is given outside. None: no opinion.
    """

    log: int = 10
    save: int = 500
    keep: int = 2
    images: int = 0
    evaluate: int = 0
    expected_reconstruction: tuple[float, float] | None = None

    def __post_init__(self):
        if min(self.log, self.save, self.keep) < 1 or min(self.images, self.evaluate) < 0:
            raise ValueError("log, save and keep must be at least 1, pictures and evaluate at least 0")


class Stop:
    """Whether a signal asked for the end; the second one ends the process as usual."""

    def __init__(self, signals: tuple[int, ...] = (signal.SIGTERM, signal.SIGINT)):
        self.requested = False
        self._previous = {number: signal.signal(number, self._handle) for number in signals}

    def _handle(self, number: int, frame: Any) -> None:
        self.requested = True
        signal.signal(number, self._previous[number])

    def restore(self) -> None:
        """Puts the former handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def global_batches(
    batches: Iterator[dict[str, np.ndarray]], sharding: NamedSharding, shares: int = 1, meter: Meter | None = None
) -> Iterator[dict[str, jax.Array]]:
    """This process's rows, one of `shares` parts of the global batch, on its devices; one batch ahead of the step."""

    def place(rows: np.ndarray) -> jax.Array:
        whole = (shares * len(rows), *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, whole)

    ahead = None
    while True:
        started = time.perf_counter()
        batch = next(batches, None)
        if meter is not None:
            meter.wait(time.perf_counter() - started)
        placed = None if batch is None else {name: place(rows) for name, rows in batch.items()}
        if ahead is not None:
            yield ahead
        if placed is None:
            return
        ahead = placed


def check(steps: list[dict[str, float]], first: int) -> None:
    """Looks at finished steps before anything is built on them.

    Raises:
      UserError: a loss or gradient that is not finite, or a batch without any supervised token (without a text loss:
        any picture); names the step.
    """
    for step, values in enumerate(steps, start=first):
        if "text_loss" not in values and values["images"] == 0:
            raise UserError(f"step {step}: the batch has no picture, and without a text loss nothing to learn from")
        if "text_loss" in values and values["supervised_tokens"] == 0:
            raise UserError(
                f"step {step}: the batch has no supervised token; check the data with launch/inspect_data.py "
                "(template, answers, truncation)"
            )
        names = ("text_loss", "reconstruction_loss", "gradient_norm")
        bad = [name for name in names if name in values and not math.isfinite(values[name])]
        if bad:
            raise UserError(
                f"step {step}: {', '.join(bad)} is not finite; the run stops, its last checkpoint is from before. "
                "A lower learning rate, or float32 for what overflows, may help"
            )


def run_loop(
    train_step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]],
    state: TrainState,
    batches: Iterator[dict[str, jax.Array]],
    start: int,
    steps: int,
    config: LoopConfig,
    saver: RunCheckpoints,
    meter: Meter,
    writer: Writer | None = None,
    watch: LossRangeMonitor | None = None,
    hooks: tuple[Hook, ...] = (),
    draw: Draw | None = None,
    stop_at: Callable[[int], bool] = lambda _: False,
    evaluate: Evaluate | None = None,
) -> tuple[TrainState, int]:
    """Trains from step `start` to `steps`.

    Args:
      train_step: compiled.
      batches: of the steps from `start` on.
      saver: checkpoints; only states whose numbers have been looked at are given to it.
      writer: on the process that reports.
      watch: of the reconstruction loss.
      hooks: called as (step, state, batch) after every step.
      draw: called likewise as often as `config.images` says, by all processes; gives a uint8 [height, width, 3]
        picture for TensorBoard.
      stop_at: asked after every step, by all processes alike: whether to save and end here.
      evaluate: called as (state,) as often as `config.evaluate` says, by all processes; gives scores by name, and a
        picture as `draw` does.

    Returns:
      The last state, and the number of steps done.

    Raises:
      UserError: as `check`. What was saved before stays.
    """
    pending: list[dict[str, jax.Array]] = []
    saved = step = start

    def settle() -> None:
        """Fetches the numbers of all finished steps, checks them, and reports."""
        if not pending:
            return
        values = [{name: float(value) for name, value in jax.device_get(metrics).items()} for metrics in pending]
        pending.clear()
        check(values, step - len(values) + 1)
        line = {**values[-1], **meter.read(values)}
        if writer is not None:
            writer.write(step, line)
            writer.progress(step, steps, line)
            if watch is not None:
                losses = [each["reconstruction_loss"] for each in values]
                warning = watch.update(step, sum(losses) / len(losses))
                if warning:
                    writer.warn(warning)

    def report_evaluation() -> None:
        begun = time.perf_counter()
        scores, grid = evaluate(state)
        if writer is not None:
            writer.write(step, {f"evaluation/{name}": score for name, score in scores.items()})
            writer.image("evaluation", step, grid)
        meter.skip(time.perf_counter() - begun)

    if evaluate is not None and config.evaluate and step == 0:
        report_evaluation()
    for batch in batches:
        state, metrics = train_step(state, batch)
        step += 1
        pending.append(metrics)
        meter.running = metrics["loss"]
        stopping = stop_at(step)
        evaluating = evaluate is not None and config.evaluate and (step % config.evaluate == 0 or step == steps)
        if step % config.log == 0 or step % config.save == 0 or stopping or evaluating or step == steps:
            settle()
        for hook in hooks:
            hook(step, state, batch)
        if draw is not None and config.images and step % config.images == 0:
            grid = draw(step, state, batch)
            if writer is not None:
                writer.image("reconstruction", step, grid)
        if evaluating:
            report_evaluation()
        if step % config.save == 0 or stopping or step == steps:
            saver.save(step, state)
            saved = step
        if stopping or step == steps:
            break
    saver.wait()
    if step < steps and saved < step:
        raise UserError(f"the data ended at step {step} of {steps}")
    return state, step
