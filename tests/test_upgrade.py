"""Runs, models and caches of an older version can be read, continued and asked; see tests/fixtures/b117c81."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from ross_jax import upgrade
from ross_jax.config import from_dict
from ross_jax.data.precomputed import Precomputed
from ross_jax.evaluation.reconstruction import make_callbacks
from ross_jax.inference.model import load
from ross_jax.sharding import make_mesh
from ross_jax.training.recipe import RunConfig
from ross_jax.training.run import RECORD, Run, open_data

FIXTURE = Path(__file__).parent / "fixtures" / "b117c81"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())
METRICS = ("text_loss", "reconstruction_loss", "gradient_norm")


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy of the fixture as current directory, because the fixture's paths are relative."""
    shutil.copytree(FIXTURE, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def read_config(run: Path) -> RunConfig:
    """The run's config, with a mesh of the test's devices on the tensor axis, because they do not divide the rows."""
    record = upgrade.upgrade(RECORD, json.loads((run / RECORD).read_text()))
    config = from_dict(RunConfig, record["config"])
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=1, fsdp=1, tensor=-1))


def reading_cache(config: RunConfig) -> RunConfig:
    loop = dataclasses.replace(config.loop, images=0, evaluate=0)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, precomputed="cache"), loop=loop)


def check_losses(run: Path, expected: list[dict[str, float]]) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [line["step"] for line in expected]
    found, recorded = ([[line[name] for name in METRICS] for line in each] for each in (steps, expected))
    np.testing.assert_allclose(found, recorded, rtol=1e-5)


def test_the_config_of_a_run(old):
    config = read_config(old / "run")
    assert config.loop.images == 100
    assert [source.kind for source in config.data.sources] == ["llava", "images"]
    assert [source.kind for source in config.evaluation.sources] == ["images"]


@pytest.mark.parametrize("name", ["run", pytest.param("run-latent", marks=pytest.mark.slow)])
def test_a_run_opens_where_it_stopped(old, name):
    """A run opens at its last step, which needs the same config, data and parameters."""
    assert Run(read_config(old / name), old / name).step == EXPECTED[name]["stopped_at"]


def test_a_model_is_read(old):
    model = load(old / "model")
    assert model.config == read_config(old / "run").model
    assert np.isfinite(model.params["projector"]["linear_0"]["kernel"]).all()


def test_a_cache_is_read(old):
    config = reading_cache(read_config(old / "run"))
    batch = next(open_data(config, make_mesh(config.mesh)).batches())
    names = {"image_targets_mean", "image_targets_logvar", "image_features"}
    assert names <= batch.keys() and "images" not in batch
    assert all(np.ptp(batch[name]) > 0 for name in names)
    assert list(Precomputed("cache").layout.parts["targets"]) == ["image_targets_logvar", "image_targets_mean"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "run-latent"])
def test_a_run_continues_to_its_end(old, name):
    """A continued run has the losses and scores of the older version's uninterrupted run."""
    config = read_config(old / name)
    run = Run(config, old / name)
    assert run.train(make_callbacks(config, run.mesh)) == run.steps == len(EXPECTED[name]["steps"])
    check_losses(old / name, EXPECTED[name]["steps"])
    lines = [json.loads(line) for line in (old / name / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "evaluation/psnr" in line]
    for found, expected in zip(evaluations, EXPECTED[name]["evaluations"], strict=True):
        for score in ("psnr", "psnr_autoencoder", "latent_error"):
            assert found[f"evaluation/{score}"] == pytest.approx(expected[score], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model", "run", "run-latent"])
def test_a_model_answers(old, name):
    model = load(old / name, template="qwen_2")
    assert model.ask("data/photos/a.png", "What is it?", max_new_tokens=8) == EXPECTED[name]["answer"]["text"]


@pytest.mark.slow
def test_a_cache_gives_the_same_losses(old):
    run = Run(reading_cache(read_config(old / "run")), old / "new")
    expected = EXPECTED["cache"]["steps"]
    run.train(stop_at=lambda step: step == len(expected))
    check_losses(old / "new", expected)


def test_values_and_paths(monkeypatch):
    """Sections and fields move or go, and values change; lists, empty containers and the order of fields stay."""
    changes = (
        upgrade.Change("a.json", "old/*/x", "new/*/deep/y"),
        upgrade.Change("a.json", "new/*/deep/y", values={"one": 1}),
        upgrade.Change("a.json", "section", "renamed"),
        upgrade.Change("a.json", "old/*/w", gone=True),
        upgrade.Change("b.json", "section", "other"),
    )
    monkeypatch.setattr(upgrade, "CHANGES", changes)
    before = {"b": [], "old": [{"x": "one", "z": {}}, {"x": "two", "w": 3}], "section": {"x": ["one", None]}, "a": 0}
    after = {"b": [], "new": [{"deep": {"y": 1}}, {"deep": {"y": "two"}}], "old": [{"z": {}}]}
    after |= {"renamed": {"x": ["one", None]}, "a": 0}
    found = upgrade.upgrade("a.json", before)
    assert found == after and list(found) == list(after)
    assert upgrade.upgrade("c.json", before) == before
