"""A recipe of 24 steps and a tiny model directory."""

import pytest

from launcher import write_recipe
from tiny_model import write_model


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))
