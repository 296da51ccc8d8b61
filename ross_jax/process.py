"""Facts about this process that the operating system knows, and its end."""

import contextlib
import multiprocessing
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


def say(text: str, stream: Any) -> None:
    """Prints a line to an open file, such as `sys.stderr`.

    Where nobody reads any more, as behind `| head`, this line and all later ones go nowhere.
    """
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def end(status: int, line: str) -> NoReturn:
    """Ends this process from any thread, without waiting for other threads or processes.

    Args:
      line: the last one on stderr.
    """
    children = multiprocessing.active_children()
    for child in children:
        child.kill()
    for child in children:
        child.join(1)
    say(line, sys.stderr)
    os._exit(status)


def leave(main: Callable[[], int]) -> NoReturn:
    """Exits with the status that `main` returns.

    Ctrl-C ends with one line and status 130. No thread is waited for, because one that computes may crash the end.
    """
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        end(130, "\ninterrupted" if sys.stderr.isatty() else "interrupted")


def cores() -> int:
    """Number of cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)  # macOS has none
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def peak_memory() -> int:
    """Most bytes of memory that this process has held at once since its program started.

    Linux has the number in `/proc`. `getrusage` is not used there, because it inherits the parent's peak.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
