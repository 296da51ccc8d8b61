"""What the operating system knows of this process."""

import resource
import sys
from pathlib import Path


def peak_memory() -> int:
    """Most bytes of memory that this process has held at once, counted since its program started.

    On Linux from `/proc`: `getrusage` keeps the peak of the process that started this one, if that was larger.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
