"""What a run reports: JSON lines, TensorBoard, and one calm progress line."""

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
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import jax

from ross_jax import process
from ross_jax.checkpoints import writing
from ross_jax.models.ross import RossConfig
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
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}
"""Device kind -> dense bfloat16 FLOP/s, as its vendor states."""


_ORDER = ("teacher", "vision", "projector", "language", "denoiser", "regressor")
_FIRST = re.compile(
    r"((vision|teacher)/patch_embedding|projector/linear_0|denoiser/condition_embedding|regressor/linear_0)/kernel"
)
_DATA = re.compile(r"denoiser/(latent_embedding|timestep_in)/kernel")
"""Matrices that are the first of their component, and those whose inputs are noise or a timestep."""


def matrix_sizes(params: Mapping[str, Any], logits: bool = True) -> dict[str, int]:
    """Elements of every matrix that activations are multiplied with, by path.

    A table that is only looked up is none. The autoencoder, all convolutions, is left out.

    Args:
      params: the whole tree, or its shapes.
      logits: whether they are computed, which takes the language model's head.
    """
    flat = flatten(params)
    head = "language/head" if "language/head" in flat else "language/embedding"
    return {
        path: math.prod(leaf.shape)
        for path, leaf in flat.items()
        if (path == head and logits) or (path.endswith("/kernel") and path.partition("/")[0] in _ORDER)
    }


def step_flops(
    config: RossConfig, sizes: Mapping[str, int], trained: set[str], draws: int, tokens: float, images: float
) -> float:
    """FLOPs that one step needs, recomputation not counted.

    A matrix takes 2 per element and token forward, 2 more for the gradient of its inputs, and 2 for its own. Attention
    scores are left out, as is the autoencoder.

    Args:
      sizes: of `matrix_sizes`.
      trained: components that learn; a frozen one passes gradients on to what learns before it.
      draws: noise levels per picture; 0 without a denoiser that is used.
      tokens: of text and pictures, padding not counted.
      images: real ones.
    """
    image_tokens = images * config.vision.num_tokens

    def uses(path: str) -> float:
        """How often the matrix is applied."""
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
        """Forward, and the gradients that are needed."""
        component = path.partition("/")[0]
        learns, before = component in trained, _ORDER[: _ORDER.index(component)]
        # Gradients flow into a matrix's inputs if they reach something that learns.
        onward = any(name in trained for name in before) or (learns and not _FIRST.fullmatch(path))
        return 1 + learns + (onward and not _DATA.fullmatch(path))

    return sum(2 * size * uses(path) * passes(path) for path, size in sizes.items())


@dataclasses.dataclass
class Meter:
    """Turns counts of steps into rates.

    Attributes:
      config, sizes, trained, draws: as in `step_flops`.
      waited: seconds since the last reading in which the device had nothing to do but to wait for input.
      running: a result of the step that was started last.
    """

    config: RossConfig
    sizes: Mapping[str, int]
    trained: set[str]
    draws: int
    waited: float = 0.0
    running: jax.Array | None = None
    _last: float = dataclasses.field(default_factory=time.perf_counter)

    def wait(self, seconds: float) -> None:
        """Notes that the next batch took that long to come. While a step still runs, nobody waits for it."""
        if self.running is None or self.running.is_ready():
            self.waited += seconds

    def skip(self, seconds: float) -> None:
        """Leaves time since the last reading that no step took out of the rates."""
        self._last += seconds

    def read(self, steps: list[dict[str, float]]) -> dict[str, float]:
        """Rates over the steps since the last reading."""
        now = time.perf_counter()
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
    """Most bytes held at once: on the first device, or of the process where the device does not say."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    return statistics.get("peak_bytes_in_use") or process.peak_memory()


class LossRangeMonitor:
    """Warns when a loss, averaged over the last logs, leaves the range that is expected of it.

    Args:
      expected: lowest and highest value.
      start: step from which on it is watched; before it, in the warmup, anything goes.
      logs: how many are averaged.
    """

    def __init__(self, expected: tuple[float, float], start: int, logs: int = 10):
        self._low, self._high = expected
        self._start, self._outside = start, False
        self._values: collections.deque[float] = collections.deque(maxlen=logs)

    def update(self, step: int, value: float) -> str | None:
        """A warning once the average is outside; then None until it has been back."""
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
    """A TensorBoard file. Written at once: `SummaryWriter`'s thread dies of a full disk, and its caller hangs."""

    def __init__(self, folder: Path, start: int):
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._event, self._file = Event, RecordWriter(str(self.path))
        self._add(file_version="brain.Event:2")
        # What an interrupted run had drawn from here on disappears.
        self._add(step=start + 1, session_log=SessionLog(status=SessionLog.START))

    def _add(self, **content: Any) -> None:
        self._file.write(self._event(wall_time=time.time(), **content).SerializeToString())

    def add(self, step: int, *summaries: Any) -> None:
        for summary in summaries:
            self._add(step=step, summary=summary)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Writer:
    """Appends to `metrics.jsonl` and TensorBoard files in a run's directory; on one process only.

    A continued run drops what an interrupted one had written past the step it continues from.

    Raises:
      CheckpointError: from every method: a file that cannot be written.
    """

    def __init__(self, folder: Path, start: int, stream: TextIO | None = None):
        self._folder, self._path = folder, folder / "metrics.jsonl"
        self._stream = stream or sys.stderr
        with writing(self._path, self._folder):
            folder.mkdir(parents=True, exist_ok=True)
            # A run that starts anew writes what it has to say of step 0 again.
            kept = [line for line in _complete_lines(self._path) if start and json.loads(line)["step"] <= start]
            partial = self._path.with_name("metrics.jsonl.partial")
            partial.write_text("".join(line + "\n" for line in kept))
            partial.replace(self._path)
            self._file = self._path.open("a", buffering=1)
        with writing(folder / "tensorboard", folder):
            self._board = _Board(folder / "tensorboard", start)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line of numbers."""
        from tensorboardX.summary import scalar

        with writing(self._path, self._folder):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
        with writing(self._board.path, self._folder):
            self._board.add(step, *(scalar(name, value) for name, value in values.items()))

    def image(self, name: str, step: int, grid: Any) -> None:
        """A uint8 [height, width, 3] picture for TensorBoard."""
        from tensorboardX.summary import image

        with writing(self._board.path, self._folder):
            self._board.add(step, image(name, grid, dataformats="HWC"))

    def warn(self, text: str) -> None:
        """A line on the terminal."""
        print(f"warning: {text}", file=self._stream, flush=True)

    def progress(self, step: int, steps: int, values: dict[str, Any]) -> None:
        """One line on the terminal."""
        rest = (steps - step) * values["seconds_per_step"]
        text_loss = f"  text {values['text_loss']:.4f}" if "text_loss" in values else ""
        text = (
            f"step {step}/{steps}{text_loss}  reconstruction {values['reconstruction_loss']:.4f}  "
            f"gradient {values['gradient_norm']:.2f}  {values['seconds_per_step']:.2f} s/step  "
            f"{_duration(rest)} left"
        )
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Flushes and closes. What a full disk does not take was reported when it was written."""
        for file in (self._file, self._board):
            with contextlib.suppress(OSError):
                file.close()


def _complete_lines(path: Path) -> list[str]:
    """Lines that were written whole; a killed process may have left half of one."""
    if not path.is_file():
        return []
    text = path.read_text()
    return text[: text.rfind("\n") + 1].splitlines()


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 1 else f"{minutes:.0f} min" if hours < 1 else f"{hours:.1f} h"
