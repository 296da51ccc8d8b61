"""The comparison's recipe: what its arms share, and what differs."""

import json

import pytest

from configs import comparison
from ross_jax.config import ConfigError, from_dict
from ross_jax.demo.autoencoder import FitConfig, diffusers_settings
from ross_jax.training.recipe import RunConfig


@pytest.fixture
def root(tmp_path):
    (tmp_path / "autoencoder").mkdir()
    settings = diffusers_settings(FitConfig().architecture)
    (tmp_path / "autoencoder" / "config.json").write_text(json.dumps(settings))
    return tmp_path


def arm(root, kind: str, stage: str = "arm") -> RunConfig:
    return from_dict(RunConfig, comparison.get_config(f"stage={stage},kind={kind},seed=2,root={root}").to_dict())


def test_arms_differ_in_reconstruction_alone(root):
    arms = {kind: arm(root, kind) for kind in comparison.KINDS}
    none = arms["none"]
    for kind, config in arms.items():
        assert config.reconstruction.kind == kind
        for field in ("text", "image_mode", "data", "freeze", "optimizer", "step", "seed"):
            assert getattr(config, field) == getattr(none, field), (kind, field)
        for part in ("vision", "projector", "language"):
            assert getattr(config.model, part) == getattr(none.model, part)
            assert config.freeze.trains(f"{part}/x") == (part != "vision")
        assert config.init[-1] == str(root / "base" / "seed2" / "pretrain")


def test_the_base_has_no_reconstruction(root):
    base = arm(root, "denoise", "base")
    assert base.reconstruction.kind == "none" and base.init == ()
    assert base.freeze.trains("vision/x")


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="did you mean 'arm'"):
        comparison.get_config("stage=amr")
    with pytest.raises(ConfigError, match="did you mean 'latent2pixel'"):
        comparison.get_config("kind=latent2pixels")
