"""Runs in a bucket, and on a disk that renames no directories, are what runs on a disk are."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest

from bucket import ADDRESS, server  # noqa: F401
from launcher import SPREAD, command, environment, load_script, losses, parameters, train, two_processes
from ross_jax.checkpoints import sound_steps
from ross_jax.storage import copy_tree, location

pytestmark = pytest.mark.slow


def start(*args) -> subprocess.Popen:
    return subprocess.Popen(
        command(*args), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    )


def wait_for(process, condition) -> None:
    while process.poll() is None and not condition():
        time.sleep(0.02)


def same(one, other) -> None:
    np.testing.assert_array_equal(losses(one), losses(other))
    expected = parameters(other)
    for path, leaf in parameters(one).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


def test_a_run_in_a_bucket_survives_what_one_on_a_disk_does(recipe, whole, server, capfd):  # noqa: F811
    """It is killed, its newest step is damaged, a second one begins beside it, the server is killed and started again.

    It ends with the numbers of a run on a disk that nothing happened to. The model in it is exported and imported.
    """
    workdir = location(f"{ADDRESS}/runs/a")
    keep = "--config.loop.keep=5"
    first = start(recipe, workdir, keep)
    wait_for(first, lambda: len(sound_steps(workdir)) >= 3)
    first.kill()
    first.wait()
    before = sound_steps(workdir)
    assert len(before) >= 3 and before[-1] < 24, first.stdout.read()
    damaged = server.root / "runs" / "a" / "steps" / str(before[-1])
    for chunk in (damaged / "params").glob("ocdbt.process_*/d/*"):
        content = bytearray(chunk.read_bytes())
        content[len(content) // 2] ^= 1
        chunk.write_bytes(content)
    again = start(recipe, workdir, keep)
    wait_for(again, lambda: len(sound_steps(workdir)) > len(before))
    second = train(recipe, workdir, keep)
    assert second.returncode == 1 and "another process is writing it (process" in second.stderr, second.stderr
    server.kill()
    time.sleep(3)
    server.start()
    output, _ = again.communicate(timeout=600)
    if again.returncode:  # it may end, clearly; the same command continues
        assert again.returncode in (1, 75) and "Traceback" not in output, output
        done = train(recipe, workdir, keep)
        assert done.returncode == 0, done.stderr
    assert f"step {before[-1]} is damaged, the run continues from step {before[-2]}" in output
    same(workdir, whole)
    exported, imported = f"{ADDRESS}/exported", f"{ADDRESS}/imported"
    convert = load_script("convert").main
    assert convert(["export", "--from", str(workdir), "--format", "ross", "--output", exported]) == 0
    assert convert(["import", "--from", exported, "--output", imported]) == 0, capfd.readouterr().err
    found, expected = parameters(location(imported)), parameters(workdir)
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
    assert convert(["import", "--from", exported, "--output", imported]) == 1
    assert "exists already" in capfd.readouterr().err


def test_processes_without_a_common_disk_train_from_and_into_a_bucket(recipe, alone, server, tmp_path):  # noqa: F811
    copy_tree(recipe.parent, location(f"{ADDRESS}/data"))
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
        (folder / "recipe.py").write_text(recipe.read_text().replace(str(recipe.parent), f"{ADDRESS}/data"))
    workdir = location(f"{ADDRESS}/runs/both")
    with two_processes("recipe.py", workdir, *SPREAD, folders=folders, logs=tmp_path) as (processes, files):
        codes = [process.wait(600) for process in processes]
        assert codes == [0, 0], "\n".join(file.seek(0) or file.read() for file in files)
    np.testing.assert_allclose(losses(workdir), losses(alone(SPREAD)), rtol=1e-5)


NO_RENAMES = """
import os
from pathlib import Path

def refusing(real):
    def rename(source, target, *rest, **options):
        if Path(source).is_dir():
            raise OSError(24, "Too many open files", str(source))
        return real(source, target, *rest, **options)
    return rename

os.rename, os.replace = refusing(os.rename), refusing(os.replace)
"""


def test_a_disk_that_renames_no_directories_holds_a_run(recipe, whole, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(NO_RENAMES)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    refused = "import os; os.mkdir('a'); os.rename('a', 'b')"
    assert (
        "Too many open files"
        in subprocess.run(
            [sys.executable, "-c", refused], cwd=tmp_path, capture_output=True, text=True, check=False
        ).stderr
    )
    stopped = train(recipe, tmp_path / "run", "--config.loop.stop_after=7")
    assert stopped.returncode == 0, stopped.stderr
    done = train(recipe, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    same(tmp_path / "run", whole)
