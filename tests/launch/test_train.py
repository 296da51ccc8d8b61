"""launch/train.py on a small recipe: it trains, continues after a kill, and names errors."""

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from launcher import REPOSITORY, command, environment, losses, make_records, step_lines, train
from ross_jax.run_checkpoints import RunCheckpoints


@pytest.mark.slow
def test_a_stopped_run_continues(recipe, whole, tmp_path):
    """SIGTERM saves and exits with 0; the run then ends like an uninterrupted one."""
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment())
    process = subprocess.Popen(command(recipe, tmp_path / "cut"), **options)
    while process.poll() is None and len(step_lines(tmp_path / "cut")) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    told = process.communicate()[0]
    assert process.returncode == 0
    assert re.search(r"cut: \d+ of 24 steps: stopped by SIGTERM; the same command continues$", told.strip())
    assert RunCheckpoints(tmp_path / "cut", 2).latest() == len(step_lines(tmp_path / "cut")) < 24
    done = train(recipe, tmp_path / "cut")
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(losses(tmp_path / "cut"), losses(whole))


def sources(folder: Path, content: str | list, **changes) -> str:
    """Writes a data file, and returns the flag that makes it the run's data."""
    path = folder / "data.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return f"--config.data.sources=({ ({'path': str(path), 'images': (str(folder),), **changes})!r},)"


def missing(count: int) -> list[dict]:
    """Records, the first `count` of which name an image that does not exist."""
    return [record | ({"image": "absent.png"} if i < count else {}) for i, record in enumerate(make_records())]


BAD_FLAGS = {
    "empty data set": (lambda new, old: sources(new, "[]"), "data.json: is empty: no record in it$"),
    "missing data set": (
        lambda new, old: sources(new, "[]", path="absent.json"),
        r"absent.json: cannot be read \(No such file",
    ),
    "corrupt JSON": (
        lambda new, old: sources(new, '[\n{"id": }]'),
        "data.json: corrupt JSON at line 2, column 8: Expecting value$",
    ),
    "missing image folder": (
        lambda new, old: sources(new, make_records(), images=(f"{new}/absent",)),
        "image folder '.*/absent' does not exist; give a folder",
    ),
    "many missing images": (
        lambda new, old: sources(new, missing(12), images=(str(old),)),
        r"\d+ of \d+ samples read are broken, more than the allowed share of 1.0%.*\n.*absent.png: no such image",
    ),
    "nothing supervised": (
        lambda new, old: f"--config.data.sources=({dict(path=str(old), kind='images')},)",
        "step 1: the batch has no supervised token; check the data with launch/inspect_data.py",
    ),
    "a flag's name": (
        lambda new, old: "--config.optimizer.learning_rat=1",
        "learning_rat.*learning_rate",
    ),
    "a flag's value": (lambda new, old: "--config.data.batch=0", "config.data: batch is 0; it must be at least 1$"),
    "mesh": (
        lambda new, old: "--config.mesh.data=3",
        r"mesh data=3 fsdp=-1 tensor=1: does not divide 2 devices; sizes among \[1, 2\] whose product is 2 do",
    ),
    "tokenizer": (
        lambda new, old: f"--config.text.tokenizer={new}/absent",
        "tokenizer .*/absent: there is no such folder",
    ),
    "random parts": (
        lambda new, old: "--config.init_random=('vision',)",
        "config.init: no model directory has .*language.* which would be random. Name one that has",
    ),
    "a misspelled part": (
        lambda new, old: "--config.init_random=('vison',)",
        r"init_random: 'vison' is no component \(did you mean 'vision'\?\)",
    ),
    "no run": (lambda new, old: f"--from={new}/absent", "--from=.*absent: no run.json in"),
    "nothing to reset": (lambda new, old: "--reset=step", "--reset: only with --from"),
    "first model": (lambda new, old: f"--config.init=('{new}/absent',)", "absent: no such directory$"),
}
"""Name -> (function: (new folder, recipe's folder) -> a flag that makes the run fail, pattern of its error)."""


def fails(done: subprocess.CompletedProcess, message: str) -> None:
    """Checks that the run failed with one error at the end of stderr, and without a traceback."""
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("error: ") == 1 and not done.stdout, done.stderr
    error = done.stderr[done.stderr.index("error: ") :].strip()
    assert re.search(f"^error: .*?{message}", error, re.MULTILINE), error


@pytest.mark.slow
@pytest.mark.parametrize(("flag", "message"), BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_what_cannot_be_trained(flag, message, recipe, tmp_path):
    done = train(recipe, tmp_path / "run", flag(tmp_path, recipe.parent), devices=2)
    fails(done, message)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            '"learning_rate"',
            '"learning_rat"',
            r"config.optimizer.learning_rat: no such field \(did you mean 'learning_",
        ),
        ('"step"', '"stp"', r"config.stp: no such field \(did you mean 'step'\?\)"),
        ("import complete", "import completed", r"recipe.py, line 2: ImportError: cannot import name 'completed' from"),
    ],
)
def test_recipes_that_are_none(before, after, message, recipe, tmp_path):
    text = recipe.read_text()
    assert before in text
    (tmp_path / "recipe.py").write_text(text.replace(before, after))
    fails(train(tmp_path / "recipe.py", tmp_path / "run"), message)


@pytest.mark.slow
def test_unknown_parts(tmp_path):
    part = f"{REPOSITORY}/configs/ross.py:encoder=siglp"
    fails(train(part, tmp_path / "run"), r"encoder='siglp': unknown \(did you mean 'siglip'\?\)")


@pytest.mark.slow
def test_another_config(recipe, whole, tmp_path):
    """A directory with a run of another config is refused with all differences; so is a start from another model."""
    differs = ("--config.optimizer.learning_rate=0.5", "--config.seed=1")
    listed = (
        r"run: holds a run with another config:\n  optimizer.learning_rate: 0.001 there, 0.5 now\n"
        r"  seed: 0 there, 1 now\nUse another directory; --from=\S+ begins there with what this run has learnt$"
    )
    fails(train(recipe, whole, *differs), listed)
    smaller = ("--config.model.denoiser.depth=1", "--config.model.denoiser.num_heads=2", f"--config.init=('{whole}',)")
    listed = "config.init: .*run: its denoiser differs: depth: 2 there, 1 in config.model; num_heads: 4 there, 2 in"
    fails(train(recipe, tmp_path / "next", *smaller), listed)


@pytest.mark.slow
def test_a_missing_image_is_skipped_and_counted(recipe, tmp_path):
    flag = sources(tmp_path, missing(1), images=(str(recipe.parent),))
    done = train(recipe, tmp_path / "run", flag)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/run: 24 of 24 steps, 1 broken samples skipped: finished\n"
    said = r"broken sample skipped \(index 0\): .*, record 0: sample '0': absent.png: no such image in"
    assert len(re.findall(said, done.stderr)) == 1, done.stderr
