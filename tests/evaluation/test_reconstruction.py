"""Scores of a run's reconstructions equal those computed with `launch/reconstruct.py`'s functions, on any mesh."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

from ross_jax.config import UserError
from ross_jax.data.images import ImageError
from ross_jax.data.pipeline import DataConfig
from ross_jax.data.sources import SourceConfig
from ross_jax.evaluation import reconstruction
from ross_jax.evaluation.images import psnr, ssim, to_uint8
from ross_jax.evaluation.reconstruction import ReconstructionEvaluator, make_callbacks, read_images
from ross_jax.inference.model import load
from ross_jax.inference.reconstruct import autoencode, encode_latents, target_images
from ross_jax.objectives.denoise import DenoiseObjective
from ross_jax.objectives.objective import Sampling
from ross_jax.sharding import MeshConfig, make_mesh
from ross_jax.training.loop import LoopConfig
from ross_jax.training.optimizer import OptimizerConfig
from ross_jax.training.recipe import EvaluationConfig, RunConfig, TextConfig
from ross_jax.training.state import FreezeConfig
from ross_jax.training.step import StepConfig
from tiny import RANDOM
from tiny_model import SIZED, write_model

SAMPLING = Sampling("ddpm", 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_model(folder / "model")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 30)).save(folder / "images" / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load(folder / "model")


def make_config(folder, rows=2, **changes) -> RunConfig:
    source = SourceConfig(str(folder / "images"), "images")
    return RunConfig(
        init_random=RANDOM,
        model=SIZED,
        text=TextConfig("qwen_2", str(folder / "model" / "files" / "language"), weight=0.0),
        image_mode="square",
        data=DataConfig((source,)),
        freeze=FreezeConfig((r"denoiser/.*",)),
        optimizer=OptimizerConfig(1e-3),
        step=StepConfig(dtype="float32"),
        loop=LoopConfig(evaluate=1),
        evaluation=EvaluationConfig(**{"sources": (source,), "rows": rows, "shown": 3, "sampling": SAMPLING} | changes),
    )


def evaluate(config, model, mesh, devices=1):
    mesh = make_mesh(MeshConfig(*mesh), jax.devices()[:devices])
    params = {"denoiser": model.params["denoiser"]}
    frozen = {name: part for name, part in model.params.items() if name != "denoiser"}
    state = jax.device_put({"params": params, "frozen": frozen}, NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        evaluator = ReconstructionEvaluator(config, mesh)
        first, again = (evaluator.evaluate(SimpleNamespace(**state)) for _ in range(2))
    assert first[0] == again[0]  # each evaluation uses the same noise
    np.testing.assert_array_equal(first[1], again[1])
    return first


@pytest.fixture(scope="module")
def expected(folder, model):
    """Scores and images computed with the functions that `launch/reconstruct.py` calls."""
    pytest.importorskip("skimage", reason="the `demo` extra is not installed")
    images = read_images(make_config(folder))
    assert len(images) == 5
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(0)))(np.arange(5))
    outputs = jnp.asarray(model.visual_outputs(images))
    made = DenoiseObjective(SIZED).reconstruct(model.params, model.params, outputs, keys, SAMPLING)
    stack = np.stack(images)
    originals, ceiling = target_images(SIZED, stack), autoencode(SIZED, model.params, stack)
    originals, own, ceiling = map(to_uint8, (originals, made.pixels, ceiling))
    latents = encode_latents(SIZED, model.params, stack)
    scores = {
        "psnr": psnr(own, originals).mean(),
        "ssim": ssim(own, originals).mean(),
        "psnr_autoencoder": psnr(ceiling, originals).mean(),
        "ssim_autoencoder": ssim(ceiling, originals).mean(),
        "latent_error": np.square(made.latents - latents).mean(),
    }
    return scores, (originals, own, ceiling)


@pytest.mark.parametrize(
    ("mesh", "devices", "rows"),
    [
        ((1, 1, 1), 1, 2),
        ((2, 2, 2), 8, 3),
        pytest.param((1, 1, 1), 1, 8, marks=pytest.mark.slow),
        pytest.param((8, 1, 1), 8, 1, marks=pytest.mark.slow),
    ],
)
def test_scores_are_those_of_each_image(mesh, devices, rows, folder, model, expected):
    """Scores do not depend on the spread of images over batches and devices."""
    scores, columns = expected
    found, grid = evaluate(make_config(folder, rows), model, mesh, devices)
    assert set(found) == set(scores)
    for name, value in scores.items():
        assert found[name] == pytest.approx(float(value), rel=2e-3), name
    side = SIZED.target_size
    assert grid.shape == (3 * side, 3 * side, 3) and grid.dtype == np.uint8
    for row in range(3):
        for column, pixels in enumerate(columns):
            cell = grid[row * side : (row + 1) * side, column * side : (column + 1) * side]
            assert np.abs(cell.astype(int) - pixels[row]).max() <= 2


@pytest.mark.slow
def test_without_scikit_image(folder, model, monkeypatch):
    monkeypatch.setattr(reconstruction.importlib.util, "find_spec", lambda name: None)
    scores, _ = evaluate(make_config(folder, rows=5), model, (1, 1, 1))
    assert set(scores) == {"psnr", "psnr_autoencoder", "latent_error"}


def test_images_are_spread_over_the_sources(folder):
    images = read_images(make_config(folder))
    fewer = read_images(make_config(folder, count=2))
    for found, image in zip(fewer, (images[0], images[2]), strict=True):
        np.testing.assert_array_equal(found, image)


def test_what_cannot_be_evaluated(folder, tmp_path):
    (tmp_path / "0.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"0\.png"):
        read_images(make_config(folder, sources=(SourceConfig(str(tmp_path), "images"),)))
    with pytest.raises(UserError, match="does not exist"):
        read_images(make_config(folder, sources=(SourceConfig(str(tmp_path / "absent"), "images"),)))
    config = dataclasses.replace(make_config(folder), loop=LoopConfig())
    assert make_callbacks(config, make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])) == []
