"""What a command tells its user while it works: lines, warnings, and progress of what takes long.

Everything goes through Python's logging, so that a program that imports ross_jax hears nothing unless it asks for it.
The launchers call `talk`, which prints it on stderr:

    measuring lengths: 12,288 of 737,000 samples, 4 min left
    warning: 12 of 737,000 conversations do not fit a row
"""

import collections
import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from ross_jax import process

logger = logging.getLogger(__name__)

PATIENCE = 5.0
"""Seconds that something may take before its progress is told."""
_EVERY = 30.0
"""Seconds between two lines of progress, where no bar can be drawn."""
LOCAL: dict[str, Any] = {"extra": {"local": True}}
"""Arguments of a warning that only this process of several knows of, such as a broken sample."""


def talk(first: bool = True) -> None:
    """From now on this process prints its lines and warnings on stderr, and libraries print errors alone.

    Args:
      first: whether this is the first process of its run. Another one prints errors, and warnings that are `LOCAL`.
    """
    ours, root = logging.getLogger("ross_jax"), logging.getLogger()
    for handler in [handler for handler in ours.handlers if isinstance(handler, _Lines)]:
        ours.removeHandler(handler)
    ours.addHandler(_Lines(first))
    ours.setLevel(logging.INFO if first else logging.WARNING)
    ours.propagate = False
    if root.level in (logging.NOTSET, logging.INFO, logging.WARNING):  # --verbosity=1 shows what libraries log
        root.setLevel(logging.ERROR)


class _Lines(logging.Handler):
    """Prints the text of records. A warning that repeats is printed once, and counted at the end."""

    def __init__(self, first: bool):
        super().__init__()
        self._first, self._counts = first, collections.Counter[str]()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno < logging.WARNING:
            if record.name == logger.name:
                process.say(text, sys.stderr)
        elif self._first or record.levelno >= logging.ERROR or getattr(record, "local", False):
            self._counts[text] += 1
            if self._counts[text] == 1:
                process.say(f"{record.levelname.lower()}: {text}", sys.stderr)

    def close(self) -> None:
        for text, count in self._counts.items():
            if count > 1:
                process.say(f"warning, {count} times in all: {text.partition(chr(10))[0]}", sys.stderr)
        self._counts.clear()
        super().close()


def say(text: str) -> None:
    """Tells the user a line."""
    logger.info(text)


@contextlib.contextmanager
def working(text: str) -> Iterator[None]:
    """While something is done whose progress is unknown: `restoring step 300 ...` after five seconds, and its end."""
    began, told = time.monotonic(), threading.Event()

    def tell() -> None:
        told.set()
        say(f"{text} ...")

    timer = threading.Timer(PATIENCE, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if told.is_set():
        say(f"{text}: done after {duration(time.monotonic() - began)}")


class Progress:
    """How far something is: nothing in its first five seconds, then a bar on a terminal, elsewhere a line at times.

    Args:
      text: what is done, such as "measuring lengths".
      total: how many units there are.
      unit: their name in the plural.
    """

    def __init__(self, text: str, total: int, unit: str):
        self._text, self._total, self._unit, self._done = text, total, unit, 0
        self._began = time.monotonic()
        self._next, self._bar = self._began + PATIENCE, None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, done: int) -> None:
        """Counts `done` more units."""
        self._done += done
        if self._bar is not None:
            self._bar.update(done)
            return
        now = time.monotonic()
        if now < self._next or not logger.isEnabledFor(logging.INFO) or self._done >= self._total:
            return
        self._next = now + _EVERY
        if sys.stderr.isatty() and not logging.getLogger("ross_jax").propagate:
            from tqdm import tqdm

            self._bar = tqdm(total=self._total, initial=self._done, desc=self._text, unit=f" {self._unit}")
            return
        left = (now - self._began) * (self._total - self._done) / max(1, self._done)
        say(f"{self._text}: {self._done:,} of {self._total:,} {self._unit}, {duration(left)} left")


@contextlib.contextmanager
def without_native_output() -> Iterator[None]:
    """While libraries print to the standard output from C++, as Gloo does for each connection: that is dropped.

    `print` keeps working.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
    with open(kept, "w", closefd=False) as stream, contextlib.redirect_stdout(stream):
        try:
            yield
        finally:
            stream.flush()
            os.dup2(kept, 1)
            os.close(kept)


def duration(seconds: float) -> str:
    """`12 s`, `34 min`, `5.6 h`."""
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 1 else f"{minutes:.0f} min" if hours < 1 else f"{hours:.1f} h"
