"""The demo's autoencoder: fitted once, saved in diffusers' layout, and imported."""

import dataclasses
import shutil
from functools import partial

import jax
import numpy as np
import pytest

from ross_jax.convert.importing import load, plan_import
from ross_jax.demo.autoencoder import FitConfig, fit, load_images, to_float, write_autoencoder
from ross_jax.demo.dataset import DatasetConfig, write_dataset
from ross_jax.evaluation.images import psnr, to_uint8
from ross_jax.models.autoencoder import Autoencoder

pytest.importorskip("skimage", reason="the `demo` extra is not installed")
pytest.importorskip("sklearn", reason="the `demo` extra is not installed")
BRIEF = FitConfig(channels=(4, 8), latent_channels=4, norm_groups=2, images=64, steps=12, batch=4, crop=16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    write_dataset(root / "data", DatasetConfig(pretrain=64, finetune=1, heldout_per_type=6))
    lines = []
    assert write_autoencoder(root / "vae", root / "data", BRIEF, lines.append)
    assert lines == [line for line in lines if line.startswith("autoencoder: step")] and lines
    return root / "data", root / "vae"


def load_autoencoder(folder):
    """Config and parameters, as the importer reads them."""
    plan = plan_import([str(folder)])
    try:
        return plan.config.autoencoder, load(plan)["autoencoder"]
    finally:
        plan.close()


def training_images(data):
    return load_images(sorted((data / "images").glob("pretrain_*.png")))


@pytest.mark.slow
def test_latents_are_normalised(folders):
    architecture, params = load_autoencoder(folders[1])
    assert architecture.downsampling == 2 and BRIEF.architecture == dataclasses.replace(
        architecture, scaling_factor=1.0, shift_factor=0.0
    )
    module, images = Autoencoder(architecture), to_float(training_images(folders[0]))
    posterior = module.apply({"params": params}, images, method="encode")
    latents = posterior.sample(jax.random.normal(jax.random.key(3), posterior.mean.shape))
    latents = np.asarray(module.apply({"params": params}, latents, method="normalise"))
    assert abs(latents.mean()) < 0.05 and latents.std() == pytest.approx(1.0, abs=0.05)


def test_fitted_once(folders):
    data, vae = folders
    assert not write_autoencoder(vae, data, BRIEF)


@pytest.mark.slow
def test_reproducible(folders):
    data, vae = folders
    architecture, params = fit(training_images(data), BRIEF)
    saved_architecture, saved = load_autoencoder(vae)
    assert architecture == saved_architecture
    jax.tree.map(np.testing.assert_array_equal, params, saved)


@pytest.mark.slow
def test_other_settings_fit_anew_and_better(folders, tmp_path):
    data, vae = folders
    images = training_images(data)

    def quality(folder) -> float:
        architecture, params = load_autoencoder(folder)
        decoded = jax.jit(partial(Autoencoder(architecture).apply, {"params": params}))(to_float(images))
        return psnr(to_uint8(decoded), images).mean()

    shutil.copytree(vae, tmp_path / "vae")
    assert write_autoencoder(tmp_path / "vae", data, dataclasses.replace(BRIEF, steps=100))
    assert quality(tmp_path / "vae") > quality(vae) + 1.0


def test_pixels_there_and_back():
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    np.testing.assert_array_equal(to_uint8(to_float(values)), values)
