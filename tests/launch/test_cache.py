"""launch/cache.py: training on a cache gives the same losses; errors are one line."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from launcher import REPOSITORY, environment, losses, train

pytestmark = pytest.mark.slow


def cache_images(recipe: Path, folder: Path, *more: str) -> subprocess.CompletedProcess:
    script = str(REPOSITORY / "launch" / "cache.py")
    command = [sys.executable, script, f"--config={recipe}", f"--output={folder}", *more]
    environ = environment(devices=2)
    return subprocess.run(command, capture_output=True, text=True, env=environ, check=False, timeout=600)


def test_a_run_on_what_was_computed_before(recipe, tmp_path):
    """A run on a cache made on two devices has the losses of a run on pixels; a wrong cache is refused."""
    done = cache_images(recipe, tmp_path / "cache", "--what=targets,features", "--rows=5")
    assert done.returncode == 0, done.stderr
    assert "25/25 images" in done.stderr
    first, *_, timed, last = done.stdout.splitlines()
    assert first == "24 images" and re.fullmatch(r"25 images in \d+ s, [\d.]+ images/s", timed)
    assert re.fullmatch(rf"{tmp_path}/cache: complete, targets \S+ GB, features \S+ GB", last)
    flag = f"--config.data.precomputed={tmp_path}/cache"
    for name, flags in (("pixels", ()), ("cached", (flag,))):
        done = train(recipe, tmp_path / name, "--config.data.epochs=1", *flags, devices=2)
        assert done.returncode == 0, done.stderr
    expected = losses(tmp_path / "pixels")
    assert len(expected) == 6
    np.testing.assert_allclose(losses(tmp_path / "cached"), expected, rtol=1e-6)
    refused = train(recipe, tmp_path / "other", "--config.image_mode=crop", flag, devices=2)
    assert refused.returncode == 1 and "images.image.mode: 'pad' there, 'crop' now" in refused.stderr
    again = cache_images(recipe, tmp_path / "cache", "--what=targets,features")
    assert again.returncode == 0 and "0 images in 0 s" in again.stdout, again.stderr


def test_a_full_disk(recipe, tmp_path):
    """A full disk gives one line of error, and the same command continues once there is room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40K", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        done = cache_images(recipe, disk / "cache")
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert re.search(r"^warning: \S+ GB are free in", done.stderr, re.MULTILINE)
        said = r"^error: \S+-00000-of-00001.arrayrecord.partial: cannot be written \(.*No space left on device"
        assert re.search(said, done.stderr, re.MULTILINE), done.stderr
        assert [path.name for path in (disk / "cache").iterdir()] == ["cache.json.partial"]
        subprocess.run(["mount", "-o", "remount,size=2M", str(disk)], check=True)
        done = cache_images(recipe, disk / "cache")
        assert done.returncode == 0, done.stderr
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


BAD_FLAGS = {
    "what": ("--what=target", r"flags.what\[0\]: 'target' is none of .*\(did you mean 'targets'\?\)$"),
    "what, twice": (
        "--what=targets,targets",
        r"flags: what \['targets', 'targets'\]: name targets, features, or both$",
    ),
    "dtype": ("--dtype=float16", r"flags.dtype: 'float16' is none of \['float32', 'bfloat16'\]"),
    "rows": ("--rows=0", "flags: rows 0: at least 1$"),
    "process": ("--process=1", "flags: process 1 of 1: they are counted from 0$"),
    "no targets": (
        "--config.reconstruction.kind=none",
        "targets: config.reconstruction.kind is 'none', which has none$",
    ),
    "data": ("--config.data.sources=({'path': 'absent.json'},)", "absent.json: cannot be read"),
    "model": ("--config.init=('absent',)", "absent: no such directory$"),
    "a flag's name": ("--config.data.precomputd=x", "precomputd.*precomputed"),
    "output": ("--output=/proc/cache", "/proc/cache: cannot be made"),
}


@pytest.mark.parametrize(("flag", "message"), BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_what_cannot_be_cached(flag, message, recipe, tmp_path):
    done = cache_images(recipe, tmp_path / "cache", flag)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("error: ") == 1, done.stderr
    error = done.stderr[done.stderr.index("error: ") :].strip()
    assert re.search(f"^error: .*?{message}", error, re.MULTILINE), error
