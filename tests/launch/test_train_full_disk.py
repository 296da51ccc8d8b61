"""A full disk gives one line that names what could not be written; the run continues once there is room."""

import contextlib
import subprocess
import time

import numpy as np
import pytest

from launcher import command, environment, losses, parameters, step_lines, train
from ross_jax.checkpoints import latest_step

pytestmark = pytest.mark.slow
SIZE = 12 * 2**20


@pytest.fixture
def disk(tmp_path):
    """A small file system."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk, free=0) -> None:
    """Fills the disk, except for `free` bytes."""
    with (disk / "ballast").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        file.write(bytes(SIZE - free if free else 2**20))
        while not free:
            file.write(bytes(2**12))


def clear(disk) -> None:
    (disk / "ballast").unlink()


def the_error(done, path, rest) -> None:
    """Checks that the run failed, and that one line says why, behind what the run said before."""
    lines = [line for line in done.stderr.splitlines() if line[:1] not in "IW"]
    lines = lines[next(i for i, line in enumerate(lines) if line.startswith("error: ")) :]
    assert done.returncode == 1 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert lines[0].startswith(f"error: {path}: ") and "No space left on device" in lines[0], lines
    assert lines[0].endswith(rest), lines


def same(run, whole):
    np.testing.assert_array_equal(losses(run), losses(whole))
    expected = parameters(whole)
    for path, leaf in parameters(run).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


def test_full_from_the_start(recipe, whole, disk):
    """A disk too small for the description, the frozen parameters or the first step gives one error each."""
    workdir = disk / "run"
    for free, path, rest in (
        (2**14, workdir, "; no step is complete yet"),
        (80 * 2**10, workdir / "frozen", "device)"),
        (900 * 2**10, workdir / "steps", "; no step is complete yet"),
    ):
        fill(disk, free)
        the_error(train(recipe, workdir), path, rest)
        clear(disk)
    done = train(recipe, workdir)
    assert done.returncode == 0, done.stderr
    same(workdir, whole)


def test_full_in_the_middle(recipe, whole, disk):
    """After a disk was full, the run continues from the last complete checkpoint."""
    workdir = disk / "run"
    process = subprocess.Popen(
        command(recipe, workdir), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    while process.poll() is None and len(step_lines(workdir)) < 5:
        time.sleep(0.02)
    while process.poll() is None:  # again, because removed checkpoints free space
        fill(disk)
        time.sleep(0.02)
    out, err = process.communicate()
    kept = latest_step(workdir)
    done = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    assert kept >= 2
    (written,) = (name for name in ("steps", "metrics.jsonl", "goodput.jsonl") if f"/{name}: " in err)
    the_error(done, workdir / written, "is complete, and is continued from")
    clear(disk)
    done = train(recipe, workdir)
    assert done.returncode == 0 and f"step {kept + 1}/24" in done.stderr and f"step {kept}/24" not in done.stderr
    same(workdir, whole)
