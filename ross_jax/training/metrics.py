"""What a run reports: rates, JSON lines, TensorBoard, and a progress line."""

import collections
import contextlib
import dataclasses
import json
import math
import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from jaxtyping import UInt8

from ross_jax import lora, process
from ross_jax.checkpoints import writing
from ross_jax.console import duration, say
from ross_jax.models.ross import RossConfig
from ross_jax.storage import GrowingFile, write_whole
from ross_jax.training.goodput import Clock, Log, read_lines
from ross_jax.training.wandb import WandbRun
from ross_jax.tree import flatten

PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,  # a core; a chip has two
    "NVIDIA GeForce RTX 4090": 165e12,  # with sums in float32
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}
"""Device kind -> dense bfloat16 FLOP/s that its vendor states."""

_BETWEEN = 10.0
"""Least number of seconds between two lines of progress."""
_ORDER = ("teacher", "vision", "projector", "language", "denoiser", "regressor")
_FIRST = re.compile(
    r"((vision|teacher)/patch_embedding|projector/linear_0|denoiser/condition_embedding|regressor/linear_0)"
    rf"/(kernel|{lora.A})"
)
"""Matrices that come first in their component."""
_DATA = re.compile(r"denoiser/(latent_embedding|timestep_in)/kernel")
"""Matrices whose inputs are noise or a timestep."""


def matrix_sizes(params: Mapping[str, Any], logits: bool = True) -> dict[str, int]:
    """Path -> number of elements, of every matrix that activations are multiplied with.

    Embedding tables are left out unless they compute logits, and so is the autoencoder, which consists of convolutions.

    Args:
      params: all parameters, or their shapes.
      logits: whether logits are computed, by the language model's head.
    """
    flat = flatten(params)
    head = "language/head" if "language/head" in flat else "language/embedding"
    return {
        path: math.prod(leaf.shape)
        for path, leaf in flat.items()
        if (path == head and logits)
        or (path.rpartition("/")[2] in ("kernel", lora.A, lora.B) and path.partition("/")[0] in _ORDER)
    }


def step_flops(
    config: RossConfig, sizes: Mapping[str, int], trained: set[str], draws: int, tokens: float, images: float
) -> float:
    """FLOPs that one step needs, without recomputation.

    A matrix takes 2 FLOPs per element and token forward, 2 for the gradient of its inputs, and 2 for its own gradient.
    Attention scores and the autoencoder are left out.

    Args:
      sizes: from `matrix_sizes`.
      trained: components that train; of those with low-rank updates, only factors. A frozen component still passes
        gradients on to components before it.
      draws: noise levels per image; 0 if no denoiser is used.
      tokens: number of text and image tokens, without padding.
      images: number of images, without empty slots.
    """
    image_tokens = images * config.vision.num_tokens
    updated = {path.partition("/")[0] for path in lora.updated_kernels(sizes)}

    def uses(path: str) -> float:
        """Number of vectors that the matrix is multiplied with."""
        if path.startswith("denoiser/timestep"):
            return images * draws
        if path.startswith("denoiser/condition"):
            return image_tokens * min(draws, 1)  # once for all draws
        component = path.partition("/")[0]
        if component in ("vision", "teacher"):
            tower = getattr(config, component)
            return images * (tower.num_tokens + (0 if "patch_embedding" in path else tower.extra_tokens))
        return {"language": tokens, "denoiser": image_tokens * draws}.get(component, image_tokens)

    def passes(path: str) -> int:
        """1 for forward, plus 1 for each gradient that is needed."""
        component = path.partition("/")[0]
        before = _ORDER[: _ORDER.index(component)]
        # Gradients flow into a matrix's inputs if they reach something that learns.
        onward = any(name in trained for name in before) or (component in trained and not _FIRST.fullmatch(path))
        learns = component in trained and (component not in updated or lora.is_factor(path))
        return 1 + learns + (onward and not _DATA.fullmatch(path))

    return sum(2 * size * uses(path) * passes(path) for path, size in sizes.items())


@dataclasses.dataclass
class Meter:
    """Turns counts of steps into rates.

    Attributes:
      config, sizes, trained, draws: as in `step_flops`.
      compiled: whether the first step since the last reading was compiled.
      waited: seconds since the last reading in which the device was idle, waiting for input.
      running: a metric of the step that was started last; not ready while the step runs.
      clock: measures the activities of this process.
    """

    config: RossConfig
    sizes: Mapping[str, int]
    trained: set[str]
    draws: int
    compiled: bool = False
    waited: float = 0.0
    running: jax.Array | None = None
    clock: Clock = dataclasses.field(default_factory=Clock)
    _last: float = dataclasses.field(default_factory=time.perf_counter)
    _first: float = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Measures how long the next batch takes to come. It does not count as waiting while a step still runs."""
        began = time.perf_counter()
        with self.clock.during("input"):
            yield
        seconds = time.perf_counter() - began
        if self.running is None or self.running.is_ready():
            self.waited += seconds
        else:
            self.clock.move(seconds, "input", "steps")

    def first_done(self) -> None:
        """Notes that the first step is done, which was compiled."""
        self.compiled, self._first = True, time.perf_counter()
        self.waited = 0.0

    def skip(self, seconds: float) -> None:
        """Leaves `seconds` since the last reading, in which no step ran, out of the rates."""
        self._last += seconds
        self._first += seconds

    def read(self, steps: list[dict[str, float]]) -> dict[str, float]:
        """Rates over the steps since the last reading, from their metrics. A compiled one among others is left out."""
        now = time.perf_counter()
        if self.compiled and len(steps) > 1:
            steps, self._last = steps[1:], self._first
        self.compiled = False
        seconds, self._last = now - self._last, now
        tokens, images = (sum(step[name] for step in steps) for name in ("tokens", "images"))
        rates = {
            "seconds_per_step": seconds / len(steps),
            "tokens_per_second": tokens / seconds,
            "images_per_second": images / seconds,
            "input_wait": self.waited / seconds,
            "memory_gb": peak_memory() / 1e9,
        }
        self.waited = 0.0
        peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
        if peak:
            flops = step_flops(self.config, self.sizes, self.trained, self.draws, tokens, images)
            rates["mfu"] = flops / seconds / (peak * jax.device_count())
        return rates


def peak_memory() -> int:
    """Peak memory in bytes: of the first device, or of this process where the device does not report it."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    return statistics.get("peak_bytes_in_use") or process.peak_memory()


class LossRangeMonitor:
    """Warns when the mean of a loss over the last logs leaves an expected range.

    Args:
      expected: lowest and highest value.
      start: last step of the warmup, in which any value is accepted.
      logs: number of logs that the mean is taken over.
    """

    def __init__(self, expected: tuple[float, float], start: int, logs: int = 10):
        self._low, self._high = expected
        self._start, self._outside = start, False
        self._values: collections.deque[float] = collections.deque(maxlen=logs)

    def update(self, step: int, value: float) -> str | None:
        """A warning when the mean leaves the range, else None; the next one only after it has come back."""
        if step <= self._start:
            return None
        self._values.append(value)
        if len(self._values) < self._values.maxlen:
            return None
        mean = sum(self._values) / len(self._values)
        warned, self._outside = self._outside, not self._low <= mean <= self._high
        if warned or not self._outside:
            return None
        return (
            f"step {step}: the reconstruction loss is {mean:.3f} on average over the last {len(self._values)} logs; "
            f"expected are {self._low:g} to {self._high:g} (config.loop.expected_reconstruction)"
        )


class _Board:
    """A TensorBoard file, written without `SummaryWriter`, whose callers hang once its thread met a full disk."""

    def __init__(self, folder: Path, start: int):
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._growing = GrowingFile(
            folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        )
        self.path = self._growing.target
        self._event, self._file = Event, RecordWriter(str(self._growing.local))
        self._add(file_version="brain.Event:2")
        # TensorBoard drops what an interrupted run wrote from this step on.
        self._add(step=start + 1, session_log=SessionLog(status=SessionLog.START))

    def _add(self, **content: Any) -> None:
        self._file.write(self._event(wall_time=time.time(), **content).SerializeToString())

    def add(self, step: int, *summaries: Any) -> None:
        for summary in summaries:
            self._add(step=step, summary=summary)
        self._file.flush()
        self._growing.sync()

    def sync(self) -> None:
        """Makes sure that all is where it belongs."""
        self._growing.sync(now=True)

    def close(self) -> None:
        self._file.close()
        self._growing.close()


class Writer:
    """Appends to `metrics.jsonl` and TensorBoard files in a run's directory, and sends to W&B, on one process.

    Lines that an interrupted run wrote after the step that it continues from are dropped.

    Raises:
      CheckpointError: from every method: a file that cannot be written.
    """

    def __init__(self, folder: Path, start: int, stream: TextIO | None = None, wandb: WandbRun | None = None):
        """Opens the files of the run in `folder` that continues after step `start`. Progress goes to stderr.

        Args:
          wandb: where metrics and images go, too.
        """
        self._wandb = wandb
        self._folder, self._path = folder, folder / "metrics.jsonl"
        self._stream, self._next = stream or sys.stderr, 0.0
        with writing(self._path, self._folder):
            folder.mkdir(parents=True, exist_ok=True)
            # A run that starts anew writes the evaluation before its first step again.
            lines, note = read_lines(self._path)
            kept = [line for line in lines if start and line["step"] <= start]
            write_whole(self._path, "".join(json.dumps(line) + "\n" for line in kept))
            self._lines = GrowingFile(self._path)
            self._file = self._lines.local.open("a", buffering=1)
        with writing(folder / "tensorboard", folder):
            self._board = _Board(folder / "tensorboard", start)
        if note:
            self.warn(note)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line of numbers."""
        from tensorboardX.summary import scalar

        with writing(self._path, self._folder):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._lines.sync()
        with writing(self._board.path, self._folder):
            self._board.add(step, *(scalar(name, value) for name, value in values.items()))
        if self._wandb is not None:
            self._wandb.write(step, values)

    def image(self, name: str, step: int, grid: Any) -> None:
        """Writes an image, uint8[height, width, 3], to TensorBoard."""
        from tensorboardX.summary import image

        with writing(self._board.path, self._folder):
            self._board.add(step, image(name, grid, dataformats="HWC"))
        if self._wandb is not None:
            self._wandb.image(name, step, grid)

    def warn(self, text: str) -> None:
        """Prints a warning."""
        process.say(f"warning: {text}", self._stream)

    def progress(self, step: int, steps: int, values: dict[str, Any], timed: bool = True) -> None:
        """Prints one line of progress, unless one was printed a moment ago.

        Args:
          timed: whether `seconds_per_step` says how long the steps that are left will take.
        """
        now = time.monotonic()
        if now < self._next and step < steps:
            return
        self._next = now + _BETWEEN
        pace = values["seconds_per_step"]
        left = f"  {pace:.2f} s/step  {duration((steps - step) * pace)} left" if timed else ""
        text_loss = f"  text {values['text_loss']:.4f}" if "text_loss" in values else ""
        text = (
            f"step {step}/{steps}{text_loss}  reconstruction {values['reconstruction_loss']:.4f}  "
            f"gradient {values['gradient_norm']:.2f}{left}"
        )
        process.say(text, self._stream)

    def saved(self) -> None:
        """Makes sure that all that was written is where it belongs, as before a checkpoint."""
        with writing(self._path, self._folder):
            self._lines.sync(now=True)
            self._board.sync()

    def close(self) -> None:
        """Flushes and closes. A full disk was reported when a line was written."""
        for file in (self._file, self._lines, self._board, *([self._wandb] if self._wandb is not None else [])):
            with contextlib.suppress(OSError):
                file.close()


def source_metrics(names: Sequence[str], by_source: np.ndarray) -> dict[str, float]:
    """Mean losses and the number of conversations of each source; no mean where there is nothing to take it over.

    Args:
      by_source: float[sources, sums], see `objectives.loss.SOURCE_SUMS`.
    """
    found: dict[str, float] = {}
    for name, sums in zip(names, by_source, strict=True):
        text, tokens, reconstruction, images, conversations = map(float, sums)
        found[f"conversations/{name}"] = conversations
        found |= {f"text_loss/{name}": text / tokens} if tokens else {}
        found |= {f"reconstruction_loss/{name}": reconstruction / images} if images else {}
    return found


@dataclasses.dataclass
class Reporter:
    """Where a run's numbers go.

    Attributes:
      meter: computes rates.
      writer: None on all processes but the one that reports.
      monitor: of the reconstruction loss, if the recipe expects a range of it.
      log: of the times of this run, on the process that reports.
      sources: names of the run's sources, if their losses are reported apart.
    """

    meter: Meter
    writer: Writer | None = None
    monitor: LossRangeMonitor | None = None
    log: Log | None = None
    sources: Sequence[str] = ()

    @contextlib.contextmanager
    def compiling(self, step: int) -> Iterator[None]:
        """While the first step of a start is compiled and done."""
        before = self.log.last_compile if self.log is not None else 0.0
        if self.writer is not None:
            say(f"compiling ({f'about {duration(before)}' if before else 'seconds to a few minutes'})")
        began = time.monotonic()
        with self.meter.clock.during("compile"):
            yield
        self.meter.first_done()
        if self.writer is not None:
            say(f"step {step} done after {duration(time.monotonic() - began)}, compilation included")

    def report(
        self, step: int, steps: int, values: list[dict[str, float]], by_source: np.ndarray | None = None
    ) -> None:
        """Reports the metrics of the last of `values`, which is step `step` of `steps`, and rates over all of them.

        Args:
          by_source: float[sources, sums], see `objectives.loss.SOURCE_SUMS`, over all of these steps.
        """
        timed = len(values) > 1 or not self.meter.compiled
        line = {**values[-1], **self.meter.read(values)}
        if self.writer is None:
            return
        if by_source is not None:
            line |= source_metrics(self.sources, by_source)
        if self.log is not None:
            line |= self.log.report()
        self.writer.write(step, line)
        self.writer.progress(step, steps, line, timed)
        if self.monitor is not None:
            losses = [each["reconstruction_loss"] for each in values]
            warning = self.monitor.update(step, sum(losses) / len(losses))
            if warning:
                self.writer.warn(warning)

    def saved(self) -> None:
        """Notes the times at a checkpoint, from which a later start may continue."""
        if self.writer is not None:
            self.writer.saved()
        if self.log is not None:
            self.log.write()

    def image(self, name: str, step: int, image: UInt8[np.ndarray, "height width 3"] | None) -> None:
        """Reports an image, if there is one."""
        if self.writer is not None and image is not None:
            self.writer.image(name, step, image)

    def evaluation(self, step: int, scores: Mapping[str, float], image: UInt8[np.ndarray, "height width 3"]) -> None:
        """Reports scores of an evaluation, by name, and its image."""
        if self.writer is not None:
            self.writer.write(step, {f"evaluation/{name}": score for name, score in scores.items()})
        self.image("evaluation", step, image)

    def benchmark(self, step: int, scores: Mapping[str, float]) -> None:
        """Reports scores of benchmarks, such as `benchmark/pope/f1`."""
        if self.writer is not None:
            self.writer.write(step, {f"benchmark/{name}": score for name, score in scores.items()})
