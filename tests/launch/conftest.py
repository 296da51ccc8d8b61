"""A recipe of 24 steps and a tiny model directory."""

import pytest

from launcher import train, write_recipe
from tiny_model import write_model


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="session")
def whole(recipe, tmp_path_factory):
    """Directory of a run of the recipe on one device that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    done = train(recipe, workdir)
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))
