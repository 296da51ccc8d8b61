"""A thread that ends a run in which no step is done any more."""

import collections
import faulthandler
import statistics
import threading
import time
from types import TracebackType

from ross_jax import process
from ross_jax.training.goodput import Clock
from ross_jax.training.heartbeat import TRY_AGAIN

_FACTOR, _LEAST = 20, 300.0
"""Without a timeout, a step may take this many median steps, and so many seconds at least."""
_FIRST = 1800.0
"""Seconds that the first steps may take without a timeout, while nothing is known of their duration."""
_COUNTED = {
    "steps": "in a step; look at the devices, and at what the other processes of the run wait for",
    "input": "while it waited for data; look at the storage that the data is on",
}
"""Activity in which a step must come -> what a run that is stuck in it has to be told."""


class StallWatch:
    """Ends this process with status 75, with the stacks of all its threads, if it does no step for too long.

    Compiling, evaluating and saving do not count.

    Args:
      clock: says what the process does, and counts its steps.
      timeout: seconds. 0: 20 times the median step, but at least five minutes; 30 minutes for the first steps.
    """

    def __init__(self, clock: Clock, timeout: float = 0.0):
        self._clock, self._timeout = clock, timeout
        self._durations: collections.deque[float] = collections.deque(maxlen=100)
        self._left = threading.Event()

    def __enter__(self) -> None:
        threading.Thread(target=self._watch, daemon=True).start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._left.set()

    def _allowed(self) -> float:
        if self._timeout:
            return self._timeout
        return max(_LEAST, _FACTOR * statistics.median(self._durations)) if len(self._durations) > 2 else _FIRST

    def _watch(self) -> None:
        done, since = self._clock.done(), time.monotonic()
        while not self._left.wait(min(1.0, self._allowed() / 4)):
            found, now, activity = self._clock.done(), time.monotonic(), self._clock.activity
            if found > done:
                self._durations.append((now - since) / (found - done))
            if found > done or activity not in _COUNTED:
                done, since = found, now
            elif now - since > self._allowed():
                faulthandler.dump_traceback()
                process.end(
                    TRY_AGAIN,
                    f"error: no step for {now - since:.0f} s after step {done}: the run hangs {_COUNTED[activity]}. "
                    "The stacks above show where. The same command continues from the last checkpoint; --stall_timeout "
                    "gives steps longer",
                )
