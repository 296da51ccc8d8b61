"""Runs with data workers: what becomes of the run if a worker ends, and of the workers if the run ends."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from launcher import command, data_workers, environment, step_lines
from ross_jax.checkpoints import latest_step

pytestmark = pytest.mark.slow
READING = ("--config.data.workers=2", "--config.data.epochs=200", "--config.loop.save=2000")


def start(recipe, workdir, *flags) -> tuple[subprocess.Popen, list[int]]:
    """A run in its own process group that has done a step, and its data workers."""
    process = subprocess.Popen(
        command(recipe, workdir, *READING, *flags),
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    before = len(step_lines(workdir))
    while len(step_lines(workdir)) <= before and process.poll() is None:
        time.sleep(0.05)
    workers = data_workers(process.pid)
    assert len(workers) == 2, process.communicate()[1]
    return process, workers


def test_a_run_and_its_workers_end_together(recipe, tmp_path):
    """A signal to the group saves and ends the run, and a killed worker ends it with an error."""
    workdir = tmp_path / "run"
    process, workers = start(recipe, workdir)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert latest_step(workdir) > 0 and not any(Path(f"/proc/{worker}").exists() for worker in workers)

    process, workers = start(recipe, workdir)
    os.kill(workers[1], signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said.splitlines()[-1].startswith(f"error: data worker {workers[1]} was killed by SIGKILL: likely out of mem")
    assert "Traceback" not in said and not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_a_run_that_hangs_says_where_and_ends(recipe, tmp_path):
    """A worker that does not go on ends the run with status 75, the stacks of its threads, and what to do."""
    process, workers = start(recipe, tmp_path / "run", "--stall_timeout=15")
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    _, said = process.communicate(timeout=90)
    assert process.returncode == 75, said
    *stacks, last = said.splitlines()
    assert re.fullmatch(r"error: no step for \d+ s after step \d+: the run hangs while it waited for data; .*", last)
    assert any("most recent call first" in line for line in stacks) and any(
        "data/workers.py" in line for line in stacks
    )
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
