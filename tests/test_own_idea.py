"""`configs/own_idea`: what a folder outside the package adds is tested and trained as its README says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from launcher import REPOSITORY, environment, step_lines
from tokenizer_fixtures import byte_level_tokenizer

pytestmark = pytest.mark.slow

FOLDER = REPOSITORY / "configs" / "own_idea"


def run(*command: str, folder: Path = FOLDER, status: int = 0) -> subprocess.CompletedProcess:
    environ = environment() | {"ROSS_JAX_CHECK_SHAPES": "1,my_idea"}
    environ["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environ, cwd=REPOSITORY)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def test_its_unit_tests():
    assert "4 passed" in run("-m", "pytest", "-n", "0", "-p", "no:cacheprovider", str(FOLDER)).stdout


@pytest.mark.parametrize("idea", ["objective", "denoiser"])
def test_its_recipe_trains(idea, tmp_path):
    """The run's record has what the folder registered, so that the same command continues it."""
    byte_level_tokenizer().save_pretrained(tmp_path / "tokenizer")
    recipe = f"{FOLDER / 'my_recipe.py'}:idea={idea},tokenizer={tmp_path / 'tokenizer'}"
    command = ("launch/train.py", f"--config={recipe}", f"--workdir={tmp_path / 'run'}")
    run(*command, "--config.loop.stop_after=2")
    assert "4 of 4 steps: finished" in run(*command).stdout
    lines = step_lines(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    losses = [line["reconstruction_loss"] for line in lines]
    assert np.isfinite(losses).all()
    if idea == "objective":  # four draws of a denoiser's noise tell little
        assert losses[-1] < losses[0]
    config = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert (config["model"]["vision"]["kind"], config["data"]["sources"][0]["kind"]) == ("patches", "colours")


def test_a_wrong_shape_is_a_few_lines(tmp_path):
    """A run ends with the function, the argument, its shape and the place of the call, without a traceback."""
    for name in ("my_idea.py", "my_recipe.py"):
        text = (FOLDER / name).read_text().replace("embedding(timesteps, 256)", "embedding(timesteps[:, None], 256)")
        (tmp_path / name).write_text(text)
    byte_level_tokenizer().save_pretrained(tmp_path / "tokenizer")
    recipe = f"{tmp_path / 'my_recipe.py'}:idea=denoiser,tokenizer={tmp_path / 'tokenizer'}"
    command = ("launch/train.py", f"--config={recipe}", f"--workdir={tmp_path / 'run'}")
    error = run(*command, folder=tmp_path, status=1).stderr
    assert "parameters of ross_jax.models.denoiser.timestep_embedding" in error and "parameter 'timesteps'" in error
    assert "Actual value: i32[1,1]" in error and f"Called in {tmp_path / 'my_idea.py'}, line " in error
    assert "Traceback" not in error and len(error.splitlines()) <= 12, error
