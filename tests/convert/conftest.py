"""Fixtures: a small full checkpoint and copies of it."""

import shutil
from pathlib import Path

import pytest

from convert.foreign import full


@pytest.fixture(scope="session")
def ross(tmp_path_factory):
    """A small full checkpoint, shared between tests. Tests that change it take `copy` instead."""
    return full(tmp_path_factory.mktemp("ross"))


@pytest.fixture
def copy(ross, tmp_path) -> Path:
    shutil.copytree(ross.parents[1], tmp_path / "copy")
    return tmp_path / "copy" / "model" / "checkpoint"
