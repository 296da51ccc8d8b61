"""The demo's recipe: sizes, trained components, initial models and errors."""

import json
import math
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from configs import demo
from ross_jax.config import ConfigError, from_dict
from ross_jax.demo.autoencoder import FitConfig, diffusers_settings
from ross_jax.models.ross import abstract_params
from ross_jax.sharding import AXES, parameter_shardings
from ross_jax.training.recipe import RunConfig
from ross_jax.tree import flatten


@pytest.fixture
def root(tmp_path):
    (tmp_path / "autoencoder").mkdir()
    settings = diffusers_settings(FitConfig().architecture) | {"scaling_factor": 0.7, "shift_factor": 0.1}
    (tmp_path / "autoencoder" / "config.json").write_text(json.dumps(settings))
    return tmp_path


@pytest.mark.parametrize("kind", demo.CHOICES["kind"])
@pytest.mark.parametrize("stage", ("pretrain", "finetune"))
def test_recipe(stage, kind, root):
    config = from_dict(RunConfig, demo.get_config(f"stage={stage},kind={kind},seed=3,root={root}").to_dict())
    model = config.model
    assert (model.vision.num_tokens, config.seed, config.data.seed) == (16, 3, 3)
    reads = {"denoise": "denoiser", "none": None}.get(kind, "regressor")
    assert [name for name in ("denoiser", "regressor") if getattr(model, name)] == ([reads] if reads else [])
    assert (model.autoencoder is None) == (kind in ("pixel", "none"))
    if kind == "denoise":
        assert (model.target_size, model.autoencoder.scaling_factor, model.denoiser.grid) == (64, 0.7, 4)
    targets = {"pixel": ("pixels", 768), "latent": ("latents", 64), "latent2pixel": ("latents", 64)}
    if reads == "regressor":
        assert (model.regressor.target, model.regressor.out_size) == targets[kind]
    flat = flatten(abstract_params(model))
    assert {path.partition("/")[0] for path in flat if not config.freeze.trains(path)} <= {"autoencoder", "denoiser"}
    assert 0.7e6 < sum(math.prod(leaf.shape) for path, leaf in flat.items() if path.startswith("language/")) < 1.2e6
    before = [] if kind in ("pixel", "none") else [str(root / "model")]
    after = [] if stage == "pretrain" else [str(root / kind / "seed3" / "pretrain")]
    assert list(config.init) == before + after
    mesh = AbstractMesh((2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)
    jax.tree.map(lambda leaf, at: at.shard_shape(leaf.shape), flat, parameter_shardings(flat, mesh))


def test_the_denoiser_alone(root):
    """The denoiser alone trains after stage 2 on all training images, and is evaluated on held-out ones."""
    config = from_dict(RunConfig, demo.get_config(f"stage=denoiser,seed=3,root={root}").to_dict())
    trained = {path.partition("/")[0] for path in flatten(abstract_params(config.model)) if config.freeze.trains(path)}
    assert trained == {"denoiser"} and config.text.weight == 0 and config.loop.evaluate
    assert list(config.init) == [str(root / "model"), str(root / "denoise" / "seed3" / "finetune")]
    names = [[Path(source.path).stem for source in of.sources] for of in (config.data, config.evaluation)]
    assert names == [["pretrain", "finetune"], ["heldout"]]


def test_mistakes_are_named(tmp_path):
    for arguments, message in [
        ("kinds=none", r"no such part \(did you mean 'kind'"),
        ("kind=denoize", "did you mean 'denoise'"),
        ("seed=x", "a whole number"),
        ("stage=denoiser,kind=latent", "kind=latent has no denoiser"),
        (f"root={tmp_path}", "no config.json; `bash launch/demo.sh` trains the autoencoder"),
    ]:
        with pytest.raises(ConfigError, match=message):
            demo.get_config(arguments)
