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
def alone(recipe, tmp_path_factory):
    """Function: mesh -> directory of a run of one process with four devices."""
    runs = {}

    def run(mesh):
        if mesh not in runs:
            runs[mesh] = tmp_path_factory.mktemp("alone") / "run"
            done = train(recipe, runs[mesh], *mesh, devices=4)
            assert done.returncode == 0, done.stderr
        return runs[mesh]

    return run


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))
