"""Fixtures: a small full checkpoint."""

import shutil
from pathlib import Path

import pytest

from convert.foreign import full


@pytest.fixture(scope="session")
def ross(tmp_path_factory):
    """Small full checkpoint. Tests that change it take `copy`."""
    return full(tmp_path_factory.mktemp("ross"))


@pytest.fixture
def copy(ross, tmp_path) -> Path:
    shutil.copytree(ross.parents[1], tmp_path / "copy")
    return tmp_path / "copy" / "model" / "checkpoint"
