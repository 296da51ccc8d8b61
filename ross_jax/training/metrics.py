"""What a run reports: JSON lines, TensorBoard, and one calm progress line."""

import dataclasses
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import jax

from ross_jax.models.ross import RossConfig

PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}
"""Device kind -> dense bfloat16 FLOP/s, as its vendor states."""


def step_flops(config: RossConfig, counts: dict[str, int], trained: set[str], tokens: float, pictures: float) -> float:
    """FLOPs that one step needs, recomputation not counted: 2 per parameter and token forward, 4 more backward.

    Attention scores are left out, as is the autoencoder.

    Args:
      counts: parameters of each component.
      trained: components that have gradients; the language model passes gradients on even when it is frozen.
      tokens: of text and pictures, padding not counted.
      pictures: real ones.
    """
    per_picture = config.vision.num_tokens
    flops = 2 * counts["vision"] * pictures * per_picture * (3 if "vision" in trained else 1)
    flops += 6 * counts["projector"] * pictures * per_picture
    flops += (6 if "language" in trained else 4) * counts["language"] * tokens
    return flops + 6 * counts.get("denoiser", 0) * pictures * per_picture * 4


@dataclasses.dataclass
class Meter:
    """Turns counts of steps into rates.

    Attributes:
      waited: seconds spent waiting for input since the last reading.
    """

    config: RossConfig
    counts: dict[str, int]
    trained: set[str]
    waited: float = 0.0
    _last: float = dataclasses.field(default_factory=time.perf_counter)

    def read(self, steps: list[dict[str, float]]) -> dict[str, float]:
        """Rates over the steps since the last reading."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        tokens, pictures = (sum(step[name] for step in steps) for name in ("tokens", "pictures"))
        rates = {
            "seconds_per_step": seconds / len(steps),
            "tokens_per_second": tokens / seconds,
            "pictures_per_second": pictures / seconds,
            "input_wait": self.waited / seconds,
            "memory_gb": peak_memory() / 1e9,
        }
        self.waited = 0.0
        peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
        if peak:
            flops = step_flops(self.config, self.counts, self.trained, tokens, pictures)
            rates["mfu"] = flops / seconds / (peak * jax.device_count())
        return rates


def peak_memory() -> int:
    """Most bytes held at once: on the first device, or of the process where the device does not say."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    return statistics.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Writer:
    """Appends to `metrics.jsonl` and TensorBoard files in a run's directory; on one process only.

    A continued run drops what an interrupted one had written past the step it continues from.
    """

    def __init__(self, folder: Path, start: int, stream: TextIO = sys.stderr):
        from tensorboardX import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = [line for line in _complete_lines(path) if json.loads(line)["step"] <= start]
        path.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        self._stream = stream

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line of numbers."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def picture(self, name: str, step: int, grid: Any) -> None:
        """A uint8 [height, width, 3] picture for TensorBoard."""
        self._board.add_image(name, grid, step, dataformats="HWC")

    def progress(self, step: int, steps: int, values: dict[str, Any]) -> None:
        """One line on the terminal."""
        rest = (steps - step) * values["seconds_per_step"]
        text = (
            f"step {step}/{steps}  text {values['text_loss']:.4f}  reconstruction {values['reconstruction_loss']:.4f}  "
            f"gradient {values['gradient_norm']:.2f}  {values['seconds_per_step']:.2f} s/step  "
            f"{_duration(rest)} left"
        )
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Flushes and closes."""
        self._file.close()
        self._board.close()


def _complete_lines(path: Path) -> list[str]:
    """Lines that were written whole; a killed process may have left half of one."""
    if not path.is_file():
        return []
    text = path.read_text()
    return text[: text.rfind("\n") + 1].splitlines()


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 1 else f"{minutes:.0f} min" if hours < 1 else f"{hours:.1f} h"
