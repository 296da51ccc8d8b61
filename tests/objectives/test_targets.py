"""The autoencoder processes images in groups: results equal those of all at once, on one device and on a mesh."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ross_jax.models.ross import abstract_params
from ross_jax.objectives import targets
from ross_jax.sharding import MeshConfig, batch_sharding, make_mesh
from tiny import CONFIG

SIDE = CONFIG.vision.image_size


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    shapes = abstract_params(CONFIG)["autoencoder"]
    return {"autoencoder": jax.tree.map(lambda leaf: jnp.asarray(0.1 * rng.normal(size=leaf.shape), "float32"), shapes)}


def run(params, images):
    """Posterior of images, images decoded from its mean, and a gradient through the decoder."""
    posterior = targets.encode(CONFIG, params, images)

    def decoded(latents):
        pixels = targets.decode(CONFIG, params, latents, remat=True)
        return jnp.sum(jnp.sin(pixels)), pixels

    gradient, pixels = jax.grad(decoded, has_aux=True)(posterior.mean)
    return *posterior, pixels, gradient


def scans(jaxpr) -> list[int]:
    """Trip count of each loop in a program."""
    return [int(length) for length in re.findall(r"\bscan\[.*?\blength=(\d+)", str(jaxpr), re.DOTALL)]


@pytest.mark.parametrize(("count", "most", "turns"), [(6, 1, 6), (6, 4, 2), (5, 2, 5), (4, 4, None), (0, 1, None)])
def test_some_after_others_are_all_at_once(params, monkeypatch, count, most, turns):
    """Groups of any size give the results of all images at once, also for no images or an incomplete last group."""
    images = jax.random.normal(jax.random.key(1), (count, SIDE, SIDE, 3))
    expected = jax.jit(run)(params, images)
    monkeypatch.setattr(targets, "PIXELS_AT_ONCE", most * CONFIG.target_size**2)
    found = jax.jit(lambda *arguments: run(*arguments))(params, images)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert set(scans(jax.make_jaxpr(lambda *arguments: run(*arguments))(params, images))) == ({turns} - {None})


@pytest.mark.parametrize(("sizes", "count"), [((2, 2, 2), 16), ((1, 4, 2), 4), ((1, 2, 4), 6)])
def test_each_device_has_its_own(params, monkeypatch, sizes, count):
    """Images are split over all mesh axes that divide them, and encoding needs no collective."""
    monkeypatch.setattr(targets, "PIXELS_AT_ONCE", 1)
    images = jax.random.normal(jax.random.key(1), (count, SIDE, SIDE, 3))
    expected = jax.jit(lambda *arguments: run(*arguments))(params, images)
    mesh = make_mesh(MeshConfig(*sizes))
    with jax.set_mesh(mesh):
        step = jax.jit(lambda *arguments: run(*arguments), in_shardings=(None, batch_sharding(mesh)))
        found = step(params, images)
        encode = jax.jit(
            lambda *arguments: targets.encode(CONFIG, *arguments), in_shardings=(None, batch_sharding(mesh))
        )
        text = encode.lower(params, images).compile().as_text()
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not re.search(r"all-(gather|reduce|to-all)|reduce-scatter|collective-permute", text)


@pytest.mark.parametrize("sizes", [None, (2, 2, 2), (1, 2, 1)])
def test_what_nobody_wants_is_not_encoded(params, monkeypatch, sizes):
    """Images outside the mask are not encoded: their NaN pixels leave zeros, wherever they are."""
    monkeypatch.setattr(targets, "PIXELS_AT_ONCE", 1)
    wanted = jnp.array([True, False, False, True, False, True, True, False])
    images = jax.random.normal(jax.random.key(1), (8, SIDE, SIDE, 3))
    expected = jax.jit(lambda *arguments: targets.encode(CONFIG, *arguments))(params, images)
    images = jnp.where(wanted[:, None, None, None], images, jnp.nan)
    with (
        contextlib.nullcontext()
        if sizes is None
        else jax.set_mesh(make_mesh(MeshConfig(*sizes), jax.devices()[: np.prod(sizes)]))
    ):
        found = jax.jit(lambda *arguments: targets.encode(CONFIG, *arguments))(params, images, wanted)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours[wanted], theirs[wanted], rtol=1e-4, atol=1e-5)
        assert not np.asarray(ours[~wanted]).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_computed_in_the_type_of_its_weights(params, dtype):
    """Each convolution has the weights' dtype; results are float32, and bfloat16 weights change them slightly."""
    half = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params)
    full = jax.tree.map(lambda leaf: leaf.astype("float32"), half)
    images = jax.random.normal(jax.random.key(1), (2, SIDE, SIDE, 3))
    weights = half if dtype == "bfloat16" else full
    program = str(jax.make_jaxpr(run)(weights, images))
    short = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    assert set(re.findall(r":(\w+)\[[\d,]*\] = conv_general_dilated", program)) == {short}
    for ours, theirs in zip(jax.jit(run)(weights, images), jax.jit(run)(full, images), strict=True):
        assert ours.dtype == "float32"
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert error < 0.05 and (error > 0) == (dtype == "bfloat16")
