"""A small full checkpoint."""

import shutil
from pathlib import Path

import pytest

from convert.foreign import full


@pytest.fixture(scope="session")
def ross(tmp_path_factory):
    """A small full checkpoint, not to be changed; `copy` one."""
    return full(tmp_path_factory.mktemp("ross"))


@pytest.fixture
def copy(ross, tmp_path) -> Path:
    shutil.copytree(ross.parents[1], tmp_path / "copy")
    return tmp_path / "copy" / "model" / "checkpoint"
