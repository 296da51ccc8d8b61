"""The training loop: batches in, steps done, metrics and checkpoints out."""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from ross_jax.config import Count, Factor, UserError, Whole
from ross_jax.run_checkpoints import RunCheckpoints
from ross_jax.training.callback import Callback
from ross_jax.training.metrics import Meter, Reporter
from ross_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How often things happen, in steps.

    Attributes:
      log: metrics are fetched and written.
      save: a checkpoint is saved. One is saved after the last step in any case.
      keep: number of newest checkpoints that stay on disk.
      images: images of the batch are reconstructed for TensorBoard; 0: never.
      evaluate: images of `evaluation.sources` are reconstructed and scored, also before the first step and after the
        last one; 0: never.
      benchmark: questions of `evaluation.benchmarks` are answered and scored, also after the last step; 0: never.
      stop_after: the run stops after this step, as if a signal had come. Started again without it, it goes on. None: it
        goes on to its end.
      wandb: `PROJECT` or `ENTITY/PROJECT` of Weights & Biases, where metrics and images go, too. None: nowhere.
      expected_reconstruction: lowest and highest reconstruction loss after the warmup, averaged over ten logs. Outside,
        a warning is printed. None: no warning.
    """

    log: Count = 10
    save: Count = 500
    keep: Count = 2
    images: Whole = 0
    evaluate: Whole = 0
    benchmark: Whole = 0
    stop_after: Count | None = None
    wandb: str | None = None
    expected_reconstruction: tuple[Factor, Factor] | None = None

    def __post_init__(self):
        if min(self.log, self.save, self.keep) < 1 or min(self.images, self.evaluate, self.benchmark) < 0:
            raise ValueError("log, save and keep must be at least 1, images, evaluate and benchmark at least 0")


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """Which steps a loop does.

    Attributes:
      start: number of steps done before.
      steps: number of steps of the whole run.
      config: how often things happen.
      stop_at: asked after every step, with the same answer on all processes: whether to save and end here.
    """

    start: int
    steps: int
    config: LoopConfig
    stop_at: Callable[[int], bool] = lambda step: False


@contextlib.contextmanager
def stop_signals(*numbers: int) -> Iterator[Callable[[], str]]:
    """Yields a function: name of the signal that has come, or nothing. The second one of a kind does what is usual."""
    requested = ""

    def handle(number: int, frame: Any) -> None:
        nonlocal requested
        requested = signal.Signals(number).name
        signal.signal(number, previous[number])

    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield lambda: requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def global_batches(
    batches: Iterator[dict[str, np.ndarray]], sharding: NamedSharding, shares: int = 1, meter: Meter | None = None
) -> Iterator[dict[str, jax.Array]]:
    """Batches on the devices, one batch ahead of the step.

    Args:
      batches: this process's rows of every global batch.
      sharding: of the global batch.
      shares: number of equal shares that processes read of a global batch.
      meter: told how long each batch took to come.
    """

    def place(rows: np.ndarray) -> jax.Array:
        global_shape = (shares * len(rows), *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, global_shape)

    ahead = None
    while True:
        with meter.waiting() if meter else contextlib.nullcontext():
            batch = next(batches, None)
        placed = None if batch is None else {name: place(rows) for name, rows in batch.items()}
        if ahead is not None:
            yield ahead
        if placed is None:
            return
        ahead = placed


def check(steps: list[dict[str, float]], first: int) -> None:
    """Refuses steps that must not be built on.

    Args:
      steps: metrics of consecutive steps.
      first: number of the first one.

    Raises:
      UserError: a loss or gradient is not finite; a batch has no supervised token, or without a text loss no image.
        Names the step.
    """
    for step, values in enumerate(steps, start=first):
        if "text_loss" not in values and values["images"] == 0:
            raise UserError(f"step {step}: the batch has no image, and without a text loss nothing to learn from")
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
    settings: LoopSettings,
    saver: RunCheckpoints,
    reporter: Reporter,
    callbacks: Sequence[Callback] = (),
) -> tuple[TrainState, int]:
    """Trains to the last step, or to the step after which `settings.stop_at` says so.

    After a step come, each if it is due: metrics, `on_step` of all callbacks, their `images`, their `evaluate`, their
    `benchmark`, and a checkpoint. Metrics are checked before anything else is done, so that no bad state is saved.

    Args:
      train_step: compiled.
      batches: global batches of the steps from `settings.start` on.

    Returns:
      The last state and the number of steps done.

    Raises:
      UserError: as `check`, or the data ended too early. Earlier checkpoints stay.
    """
    config, clock = settings.config, reporter.meter.clock
    clock.enter("steps")
    end = min(settings.steps, config.stop_after or settings.steps)
    pending: list[dict[str, jax.Array]] = []
    saved = step = settings.start
    if config.evaluate and step == 0:
        _evaluate(callbacks, step, state, reporter)
    for batch in batches if step < end else ():
        if step == settings.start:
            with reporter.compiling(step + 1):
                state, metrics = train_step(state, batch)
                jax.block_until_ready(metrics)
        else:
            state, metrics = train_step(state, batch)
        step += 1
        pending.append(metrics)
        reporter.meter.running = metrics["loss"]
        clock.begun(step, metrics["loss"])
        last = settings.stop_at(step) or step == end
        saving = last or step % config.save == 0
        evaluating = config.evaluate and (step % config.evaluate == 0 or step == settings.steps)
        answering = config.benchmark and (step % config.benchmark == 0 or step == settings.steps)
        if saving or evaluating or answering or step % config.log == 0:
            _report_steps(pending, step, settings.steps, reporter)
            pending = []
        for callback in callbacks:
            callback.on_step(step, state, batch)
        if config.images and step % config.images == 0:
            with clock.during("evaluate"):
                for callback in callbacks:
                    reporter.image("reconstruction", step, callback.images(step, state, batch))
        if evaluating:
            _evaluate(callbacks, step, state, reporter)
        if answering:
            _benchmark(callbacks, step, state, reporter)
        if saving:
            with clock.during("save"):
                saver.save(step, state)
            reporter.saved()
            saved = step
        if last:
            break
    with clock.during("save"):
        saver.wait()
    if step < end and saved < step:
        raise UserError(f"the data ended at step {step} of {settings.steps}")
    return state, step


def _report_steps(pending: list[dict[str, jax.Array]], step: int, steps: int, reporter: Reporter) -> None:
    """Fetches, checks and reports the metrics of the steps up to `step`."""
    fetched = [jax.device_get(metrics) for metrics in pending]
    by_source = sum(metrics.pop("sources") for metrics in fetched) if "sources" in fetched[0] else None
    values = [{name: float(value) for name, value in metrics.items()} for metrics in fetched]
    check(values, step - len(values) + 1)
    reporter.report(step, steps, values, by_source)


def _evaluate(callbacks: Sequence[Callback], step: int, state: TrainState, reporter: Reporter) -> None:
    """Evaluates, and leaves the time that it takes out of the step's."""
    with _aside(reporter):
        for callback in callbacks:
            found = callback.evaluate(state)
            if found is not None:
                reporter.evaluation(step, *found)


def _benchmark(callbacks: Sequence[Callback], step: int, state: TrainState, reporter: Reporter) -> None:
    """Answers and scores benchmarks, and leaves the time that it takes out of the step's."""
    with _aside(reporter):
        for callback in callbacks:
            found = callback.benchmark(state)
            if found is not None:
                reporter.benchmark(step, found)


@contextlib.contextmanager
def _aside(reporter: Reporter) -> Iterator[None]:
    """Counts time as evaluation, and not to the step."""
    started = time.perf_counter()
    with reporter.meter.clock.during("evaluate"):
        yield
    reporter.meter.skip(time.perf_counter() - started)
