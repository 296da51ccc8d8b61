"""A run that is killed and restarted many times ends like an uninterrupted one."""

import random
import signal
import subprocess
import time
from collections import Counter

import numpy as np
import pytest

from launcher import command, environment, losses, parameters, step_lines, train
from ross_jax.checkpoints import latest_step
from ross_jax.orbax_calls import is_complete

pytestmark = pytest.mark.slow
LONG = ("--config.loop.save=1", "--config.data.epochs=7")
STEPS = 42  # enough for all kills: two or three steps run between kills
KILLS = 6


def start(recipe, workdir) -> subprocess.Popen:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command(recipe, workdir, *LONG), env=environment(), **quiet)


def wait_for_a_step(process, workdir) -> float:
    """Seconds until the run reports a new step. 0 if the run ends before."""
    begin, before = time.monotonic(), len(step_lines(workdir))
    while process.poll() is None:
        if len(step_lines(workdir)) > before:
            return time.monotonic() - begin
        time.sleep(0.005)
    return 0.0


def is_saving(workdir) -> bool:
    """Whether a step is not complete."""
    return any(not is_complete(step) for step in (workdir / "steps").glob("*"))


def wait_for_a_save(process, workdir) -> None:
    """Returns once a step is being saved."""
    while process.poll() is None and not is_saving(workdir):
        time.sleep(0.001)


def test_killed_at_random_moments(recipe, tmp_path, request, reliability):
    """Kills during start, training and saving, which follows each step, do not change the result."""
    minutes = request.config.getoption("minutes", default=None)
    rng = random.Random(0 if minutes is None else time.time())
    whole, until, rounds = tmp_path / "whole", time.monotonic() + 60 * (minutes or 0), 0
    assert train(recipe, whole, *LONG).returncode == 0  # fills the compilation cache for the runs below
    first = start(recipe, tmp_path / "first")
    startup = wait_for_a_step(first, tmp_path / "first")
    first.kill()
    while not rounds or time.monotonic() < until:
        killed_and_restarted(recipe, whole, tmp_path / f"cut{rounds}", startup, rng)
        rounds += 1
    reliability("training and its restarts: SIGKILL", Counter(recovered=KILLS * rounds))


def killed_and_restarted(recipe, whole, cut, startup, rng) -> None:
    """Kills a run some times, lets it end, and compares it with one that was never killed."""
    kept, unfinished = [], 0
    for number in range(KILLS):
        process = start(recipe, cut)
        if number % 3 == 0:  # while it starts, also before there is any checkpoint
            time.sleep(rng.uniform(0.3, 1.0) * startup)
        else:
            startup = wait_for_a_step(process, cut) or startup
            time.sleep(rng.uniform(0, 0.6))
            if number % 3 == 1:
                wait_for_a_save(process, cut)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept.append(latest_step(cut) or 0)
        unfinished += is_saving(cut)
    assert kept == sorted(kept) and kept[-1] < STEPS, kept  # no checkpoint is lost, and the kills came before the end
    assert unfinished, "no kill came while a step was being saved"
    done = train(recipe, cut, *LONG)
    assert done.returncode == 0, done.stderr
    assert len(losses(whole)) == STEPS
    np.testing.assert_array_equal(losses(cut), losses(whole))
    expected = parameters(whole)
    for path, leaf in parameters(cut).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
