"""What keeps a run from being taken over, ended or written where it cannot be read."""

import os
import signal
import subprocess
import time

import pytest

from launcher import SHORT, command, environment, losses, step_lines, train
from ross_jax.checkpoints import latest_step

pytestmark = pytest.mark.slow
SLOW = ("--config.data.epochs=400", "--config.loop.save=1000")


def wait_for_steps(process, workdir, count) -> None:
    while process.poll() is None and len(step_lines(workdir)) < count:
        time.sleep(0.02)
    assert process.poll() is None


def test_a_second_run_and_a_hangup(recipe, tmp_path):
    """A second run in the same directory is refused. SIGHUP saves a step, as SIGTERM does."""
    workdir = tmp_path / "run"
    first = subprocess.Popen(command(recipe, workdir, *SLOW), env=environment(), stderr=subprocess.DEVNULL)
    try:
        wait_for_steps(first, workdir, 1)
        second = train(recipe, workdir, *SLOW)
        assert second.returncode == 1 and "Traceback" not in second.stderr
        assert f"error: {workdir}: another process is writing it (process {first.pid} on " in second.stderr
        first.send_signal(signal.SIGHUP)
        assert first.wait(60) == 0
    finally:
        first.kill()
    assert 0 < latest_step(workdir) < 2400 and latest_step(workdir) == losses(workdir)[-1][0]
    assert not (tmp_path / ".run.lock").exists()


def test_nobody_listens(recipe, tmp_path):
    """A run under nohup, whose output nobody reads any more, goes on to its end."""
    read, write = os.pipe()
    process = subprocess.Popen(
        command(recipe, tmp_path / "run", *SHORT),
        env=environment(),
        stdout=write,
        stderr=write,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    os.close(write)
    os.read(read, 10)
    os.close(read)
    wait_for_steps(process, tmp_path / "run", 1)
    process.send_signal(signal.SIGHUP)
    assert process.wait(300) == 0
    assert latest_step(tmp_path / "run") == 12


@pytest.mark.parametrize("name", ["run[1]", "a]b", "c\\d"])
def test_paths_that_checkpoints_cannot_have(recipe, tmp_path, name):
    done = train(recipe, tmp_path / name)
    assert done.returncode == 1 and not (tmp_path / name).exists()
    assert "checkpoints cannot lie in a path with" in done.stderr and "Traceback" not in done.stderr


def test_a_run_is_adopted(recipe, tmp_path):
    """Steps without run.json are refused, and continue with --adopt."""
    workdir, more = tmp_path / "run", "--config.loop.log=1"
    assert train(recipe, workdir, *SHORT, more).returncode == 0
    (workdir / "run.json").unlink()
    done = train(recipe, workdir, *SHORT, more)
    assert done.returncode == 1 and "--adopt" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    done = train(recipe, workdir, *SHORT, more, "--adopt")
    assert done.returncode == 0, done.stderr
    assert (workdir / "run.json").exists()
