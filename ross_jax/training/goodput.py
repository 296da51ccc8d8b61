"""Where the wall time of a run goes, since it first started.

A run that was stopped and continued has several starts. `goodput.jsonl` in its directory has lines of all of them, and
is only ever appended to:

    {"start": 1767225600.0, "time": 1767229200.0, "step": 500, "steps": 3100.2, "input": 12.5, "save": 40.1, ...}

A line has the times at which this start of the run began and the line was written, the number of steps done, and the
seconds that each activity took in this start.
"""

import collections
import contextlib
import dataclasses
import itertools
import json
import math
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from ross_jax.checkpoints import writing
from ross_jax.storage import GrowingFile

GOODPUT = "goodput.jsonl"
ACTIVITIES = {
    "steps": "steps",
    "input": "waiting for data",
    "compile": "compiling, with the first step",
    "restore": "restoring",
    "save": "saving, while no step runs",
    "evaluate": "evaluating and drawing",
    "begin": "starting",
}
"""Name -> what a process does. It does one of them at a time."""
LOSSES = {"redone": "steps that were done again", "down": "not running"}
"""Name -> what else takes a run's time. `down` includes what was killed before it wrote a line."""
_RESOLUTION = 0.01
"""Least part of a start's time between two lines, so that long runs write few."""


class Clock:
    """Measures the activities of this process.

    Attributes:
      start: Unix time at which it began.
      seconds: activity -> its time, without the present one's.
      activity: the present one.
      step: number of steps of the run that were begun.
    """

    def __init__(self):
        self.start, self.step = time.time(), 0
        self.seconds = dict.fromkeys(ACTIVITIES, 0.0)
        self.activity, self._since = "begin", time.monotonic()
        self._running: collections.deque[jax.Array] = collections.deque()
        self._lock = threading.Lock()

    def enter(self, activity: str) -> None:
        """Ends the present activity, and begins another."""
        now = time.monotonic()
        self.seconds[self.activity] += now - self._since
        self.activity, self._since = activity, now

    @contextlib.contextmanager
    def during(self, activity: str) -> Iterator[None]:
        """Goes on with the present activity afterwards."""
        before = self.activity
        self.enter(activity)
        try:
            yield
        finally:
            self.enter(before)

    def move(self, seconds: float, source: str, target: str) -> None:
        """Counts time as another activity's."""
        self.seconds[source] -= seconds
        self.seconds[target] += seconds

    def begun(self, step: int, metric: jax.Array) -> None:
        """Notes that a step was begun, of which the metric is ready when the step is done."""
        with self._lock:
            self.step = step
            self._running.append(metric)
        self.done()

    def done(self) -> int:
        """Number of steps that the devices have done."""
        with self._lock:
            while self._running and self._running[0].is_ready():
                self._running.popleft()
            return self.step - len(self._running)


@dataclasses.dataclass
class Account:
    """The times of a run.

    Attributes:
      starts: number of its starts.
      step: number of steps done.
      began: Unix time of the first start.
      seconds: name of an activity or loss -> its time.
      ends: Unix time and number of steps of each line, in order; by start.
    """

    starts: int
    step: int
    began: float
    seconds: dict[str, float]
    ends: list[list[tuple[float, int]]]


def goodput(seconds: Mapping[str, float]) -> float:
    """Share of a run's time in which steps were done that count."""
    return seconds["steps"] / (sum(seconds.values()) or 1.0)


def make_account(lines: Iterable[Mapping[str, Any]]) -> Account:
    """The times of a run, from the lines of its `goodput.jsonl`. Of none, they are 0."""
    starts = [list(group) for _, group in itertools.groupby(lines, lambda line: line["start"])]
    seconds = dict.fromkeys([*ACTIVITIES, *LOSSES], 0.0)
    for number, group in enumerate(starts):
        first, last = group[0], group[-1]
        for name in ACTIVITIES:
            seconds[name] += last[name]
        # A later start may have continued from an earlier step: what lies between was done in vain.
        kept = min((later[0]["step"] for later in starts[number + 1 :]), default=last["step"])
        whole = max((line for line in group if line["step"] <= kept), key=lambda line: line["time"], default=None)
        for name in ("steps", "input"):
            lost = last[name] - (whole[name] if whole else 0.0)
            seconds[name] -= lost
            seconds["redone"] += lost
        if number:
            seconds["down"] += max(0.0, first["start"] - starts[number - 1][-1]["time"])
    ends = [[(line["time"], line["step"]) for line in group] for group in starts]
    step, began = (starts[-1][-1]["step"], starts[0][0]["start"]) if starts else (0, 0.0)
    return Account(len(starts), step, began, seconds, ends)


class Log:
    """Appends to a run's `goodput.jsonl`, on one process.

    Args:
      clock: of this start.

    Attributes:
      note: on lines of earlier starts that cannot be read; empty if there is none.
      last_compile: seconds that compiling took in the last start that came so far; 0 if there is none.

    Raises:
      CheckpointError: from every method: the file cannot be written.
    """

    def __init__(self, folder: Path, clock: Clock):
        self._folder, self._path, self._clock, self._written = folder, folder / GOODPUT, clock, 0.0
        with writing(self._path, self._folder):
            before, self.note = read_lines(self._path, ("start", "time", "step", *ACTIVITIES))
            self.last_compile = next((line["compile"] for line in reversed(before) if line["compile"]), 0.0)
            self._file = GrowingFile(self._path)
            if self._file.local.is_file():
                with self._file.local.open("a") as file:
                    file.write("\n")  # ends what a killed process may have left; empty lines are no lines
        self._before = make_account([*before, self._line() | dict.fromkeys(ACTIVITIES, 0.0)])
        self.write()

    def _line(self) -> dict[str, Any]:
        clock = self._clock
        clock.enter(clock.activity)
        seconds = {name: round(value, 3) for name, value in clock.seconds.items()}
        return {"start": clock.start, "time": time.time(), "step": clock.step, **seconds}

    def write(self, now: bool = True) -> None:
        """Writes a line.

        Args:
          now: whether it is on the disk, or in the bucket, when this returns.
        """
        line = self._line()
        with writing(self._path, self._folder):
            with self._file.local.open("a") as file:
                file.write(json.dumps(line) + "\n")
            self._file.sync(now)
        self._written = line["time"]

    def report(self) -> dict[str, float]:
        """Metrics: `goodput`, and `time/NAME` in seconds for each activity and loss. Writes a line now and then."""
        now = time.time()
        if now - self._written > _RESOLUTION * (now - self._clock.start):
            self.write(now=False)
        line, before = self._line(), self._before.seconds
        seconds = {name: round(value + line.get(name, 0.0), 3) for name, value in before.items()}
        return {"goodput": goodput(seconds)} | {f"time/{name}": value for name, value in seconds.items()}


def read_lines(path: Path, numbers: Iterable[str] = ("step",)) -> tuple[list[dict[str, Any]], str]:
    """The lines of a file of JSON lines, and a note on those that cannot be used; empty if there is none.

    The half of a line that a killed process may have left at the end is no line.

    Args:
      numbers: fields that each line must have, and whose values are numbers.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return [], ""
    lines, bad = [], []
    for number, line in enumerate(text[: text.rfind("\n") + 1].split("\n"), start=1):
        if not line:
            continue
        try:
            value = json.loads(line)
            if not all(math.isfinite(value[name]) for name in numbers):
                raise ValueError
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            bad.append(number)
        else:
            lines.append(value)
    which = f"line {bad[0]} is" if len(bad) == 1 else f"line {bad[0]} and {len(bad) - 1} more are" if bad else ""
    return lines, f"{path}: {which} unreadable, and left out" if bad else ""
