"""The reported peak memory of a process matches its allocations."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ross_jax.process import peak_memory

REPOSITORY = Path(__file__).parents[1]
MEMORY = """
from ross_jax.process import peak_memory
before = peak_memory()
held = bytearray(b"1" * 100_000_000)
del held
print(before, peak_memory())
"""


def measure() -> tuple[int, int]:
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    before, after = map(int, done.stdout.split())
    return before, after


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak of the process that started it counts, too")
def test_the_peak_is_of_this_process_alone():
    """The peak of a child process does not include the memory of its parent."""
    held = np.ones(50_000_000)
    assert peak_memory() > held.nbytes
    before, _ = measure()
    assert 1e6 < before < 1e8


def test_the_peak_stays():
    """The peak includes memory that was released."""
    before, after = measure()
    assert after - before > 0.9e8


def test_an_interrupt_is_one_line():
    """Ctrl-C while another thread works: one line and status 130, and that thread is not waited for."""
    main = "lambda: (print('begun'), os.kill(os.getpid(), signal.SIGINT), time.sleep(100))"
    thread = "threading.Thread(target=time.sleep, args=(100,)).start()"
    program = f"import os, signal, threading, time; from ross_jax.process import leave; {thread}; leave({main})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "begun\n", "interrupted\n")
