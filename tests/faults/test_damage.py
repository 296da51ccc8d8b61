"""Damaged files of runs and models are noticed, or what is read is what was written."""

import random
import time

import pytest

from faults.damage import Subject, campaign, read_model, read_run
from launcher import SHORT, write_recipe
from ross_jax.command_line import load_recipe
from ross_jax.training.run import Run
from tiny_model import SIZED, write_model

pytestmark = pytest.mark.slow
DEFAULT = {"run": 28, "model": 40}
"""Subject -> injections without --minutes."""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Subject:
    """A run of which two steps are kept."""
    data, folder = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("damage") / "run"
    config = load_recipe(f"{write_recipe(data)}", [*SHORT, "--config.mesh.fsdp=2", "--config.mesh.tensor=4"])
    Run(config, folder).train(stop_at=lambda step: step == 4)
    subject = Subject(folder, read_run(config), [])
    newest = subject.read(folder)
    mark = folder / "steps" / "4" / "DAMAGED"
    mark.touch()
    subject.sound = [newest, subject.read(folder)]
    mark.unlink()
    assert [found[0] for found in subject.sound] == [4, 2]
    return subject


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Subject:
    folder = write_model(tmp_path_factory.mktemp("damage") / "model", SIZED)
    return Subject(folder, read_model, [read_model(folder)])


@pytest.mark.parametrize("name", DEFAULT)
def test_no_damage_is_read_silently(name, request, tmp_path, reliability):
    subject, minutes = request.getfixturevalue(name), request.config.getoption("minutes", default=None)
    rng = random.Random(18 if minutes is None else time.time())
    until = time.monotonic() + 60 * (minutes or 0) / len(DEFAULT)
    outcomes = campaign(
        subject,
        tmp_path / "damaged",
        rng,
        lambda done: done < DEFAULT[name] if minutes is None else time.monotonic() < until,
    )
    reliability(f"files of a {name}: bits, lengths, presence", outcomes)
    assert set(outcomes) <= {"detected", "recovered", "harmless"}, outcomes
    assert outcomes["detected" if name == "model" else "recovered"], outcomes
