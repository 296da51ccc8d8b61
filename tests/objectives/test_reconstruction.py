"""The reconstruction objective: its targets, noise, reductions and gradient."""

import dataclasses
import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec

from gradients import assert_gradient
from ross_jax.config import ConfigError
from ross_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from ross_jax.models.denoiser import Denoiser, DenoiserConfig, normalise_condition
from ross_jax.models.language import FINAL
from ross_jax.models.ross import RossConfig, abstract_params, normalise
from ross_jax.models.vision import VisionConfig
from ross_jax.objectives.denoise import DenoiseObjective
from ross_jax.objectives.diffusion import SCHEDULES, make_diffusion, sample_ancestral
from ross_jax.objectives.loss import Counts, ImageMean, OfficialMean
from ross_jax.objectives.objective import Sampling
from ross_jax.objectives.targets import group_latents, target_pixels, ungroup_latents
from ross_jax.sharding import MeshConfig, logical_axes, make_mesh, partition
from ross_jax.tree import flatten

WIDTH = 20
GRID = 3
COORDINATES = 2e-5
"""Absolute tolerance of a resized image: float32 rounds the coordinate of pixel 100 by 4e-6, and pixels span 2."""


def config(image_size: int = 44, patch_size: int = 14, channels: tuple[int, ...] = (4, 4, 8, 8)) -> RossConfig:
    """A vision encoder of 14-pixel patches with a remainder, and an autoencoder of 8 (or 16) pixels per latent."""
    flags = (False,) * len(channels)
    autoencoder = AutoencoderConfig(channels, 1, 3, 4, 0.3611, 0.1159, flags, flags)
    vision = VisionConfig("siglip", image_size, patch_size, 8, 8, 1, 1, "gelu", 1e-6, -1)
    window = 16 // autoencoder.downsampling
    return RossConfig(
        vision=vision,
        denoiser=DenoiserConfig(WIDTH, 3 * window**2, vision.grid, 32, 2, 4),
        autoencoder=autoencoder,
        image_mean=(0.48, 0.46, 0.41),
        image_std=(0.27, 0.26, 0.28),
    )


def random_params(ross: RossConfig):
    """Random parameters, because the initial zeros would hide errors."""
    rng = np.random.default_rng(0)
    shapes = abstract_params(dataclasses.replace(ross, vision=None))
    return jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32), shapes)


def random_images(ross: RossConfig, count: int, seed: int = 0) -> jax.Array:
    """Normalised images, some of them beyond the range of pixels."""
    size = ross.vision.image_size
    return jax.random.normal(jax.random.key(seed), (count, size, size, 3))


def random_batch(ross: RossConfig, rows: int, slots: int) -> dict[str, jax.Array]:
    """A batch as `targets` reads it: uint8 images, no empty slot."""
    size = ross.vision.image_size
    images = jax.random.randint(jax.random.key(0), (rows, slots, size, size, 3), 0, 256).astype(jnp.uint8)
    places = jnp.zeros((rows, slots), jnp.int32)
    return {"images": images, "image_start": places, "tokens": places}


@pytest.fixture(scope="module")
def setting():
    """Objective, parameters, visual outputs, targets and keys of 2 rows with 2 images each."""
    ross = config()
    objective, params = DenoiseObjective(ross), random_params(ross)
    outputs = jax.random.normal(jax.random.key(1), (2, 2, GRID**2, WIDTH))
    keys = jax.random.split(jax.random.key(2), (2, 2))
    targets = jax.jit(objective.targets)(params, random_batch(ross, 2, 2))
    return objective, params, outputs, targets, keys


def loss(objective, params, outputs, targets, keys):
    return jax.jit(objective.loss)(params, {}, {FINAL: outputs}, targets, keys)


@pytest.mark.parametrize("window", [1, 2, 4])
def test_grouped_channels(window):
    rows, channels = 3, 5
    latents = jax.random.normal(jax.random.key(0), (2, rows * window, rows * window, channels))
    tokens = group_latents(latents, window)
    assert tokens.shape == (2, rows**2, channels * window**2)
    for y, x, c in np.ndindex(rows * window, rows * window, channels):
        token = (y // window) * rows + x // window
        channel = c * window**2 + (y % window) * window + x % window
        np.testing.assert_array_equal(tokens[:, token, channel], latents[:, y, x, c])
    np.testing.assert_array_equal(ungroup_latents(tokens, window), latents)


def bilinear(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes with half-pixel centres and repeated borders, without antialiasing."""
    for axis in (0, 1):
        old = image.shape[axis]
        places = np.maximum((np.arange(size) + 0.5) * old / size - 0.5, 0)
        low = np.minimum(places.astype(int), old - 1)
        high = np.minimum(low + 1, old - 1)
        share = (places - low).reshape([-1 if i == axis else 1 for i in range(3)])
        image = (1 - share) * image.take(low, axis) + share * image.take(high, axis)
    return image


# (image size, patch size): images are enlarged, kept, and shrunk, where antialiasing would show.
RESIZED = [(44, 14), (60, 14), (32, 16), (90, 30), (101, 25)]


@pytest.mark.parametrize(("image_size", "patch_size"), RESIZED)
def test_target_pixels(image_size, patch_size):
    ross = config(image_size, patch_size)
    images = 2 * random_images(ross, 2)
    found = target_pixels(ross, images)
    assert found.shape == (2, *(2 * (image_size // patch_size * 16,)), 3)
    plain = np.float64(images) * ross.image_std + ross.image_mean
    for ours, image in zip(found, np.clip(2 * plain - 1, -1, 1), strict=True):
        np.testing.assert_allclose(ours, bilinear(image, found.shape[1]), rtol=0, atol=COORDINATES)
    assert (np.abs(found) == 1).any()  # clipping was needed


@pytest.mark.parity
@pytest.mark.parametrize(("image_size", "patch_size"), [*RESIZED, (384, 14)])
def test_target_pixels_of_torch(image_size, patch_size):
    torch = pytest.importorskip("torch")
    ross = config(image_size, patch_size)
    images = random_images(ross, 2)
    mean, std = (torch.tensor(x)[:, None, None] for x in (ross.image_mean, ross.image_std))
    pixels = ((torch.tensor(np.asarray(images)).movedim(-1, 1) * std + mean) * 2 - 1).clamp(-1, 1)
    theirs = torch.nn.functional.interpolate(
        pixels, size=ross.target_size, mode="bilinear", align_corners=False, antialias=False
    )
    np.testing.assert_allclose(target_pixels(ross, images), theirs.movedim(1, -1), rtol=0, atol=3e-6)


@pytest.mark.parametrize("channels", [(4, 4, 8, 8), (4, 4, 4, 8, 8)])
def test_targets_are_the_posterior(channels):
    """Targets are the posterior of the resized images; latents are its shifted, scaled and grouped samples."""
    ross = config(channels=channels)
    objective, params = DenoiseObjective(ross), random_params(ross)
    batch = random_batch(ross, 2, 1)
    images = normalise(ross, batch["images"][:, 0])
    targets = jax.jit(objective.targets)(params, batch)
    encode = jax.jit(lambda p, x: Autoencoder(ross.autoencoder).apply({"params": p}, x, method="encode"))
    expected = encode(params["autoencoder"], target_pixels(ross, images))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), targets, expected)
    noise = jax.random.normal(jax.random.key(3), targets.mean.shape)
    sample = np.float64(targets.mean) + np.exp(np.float64(targets.logvar) / 2) * np.float64(noise)
    window = 16 // ross.autoencoder.downsampling
    latents = jax.jit(objective.latents)(targets, noise)
    assert latents.shape == (2, GRID**2, 3 * window**2)
    np.testing.assert_allclose(ungroup_latents(latents, window), (sample - 0.1159) * 0.3611, rtol=1e-5, atol=1e-6)


def test_draws():
    objective = DenoiseObjective(config(), draws=3)
    draw = jax.vmap(objective.draw)(jax.random.split(jax.random.key(0), 4000))
    assert draw.timesteps.shape == (4000, 3)
    assert draw.noise.shape == (4000, 3, GRID**2, 12)
    assert draw.posterior_noise.shape == (4000, 6, 6, 3)
    assert (int(draw.timesteps.min()), int(draw.timesteps.max())) == (0, 999)
    # Tolerances are four standard errors of uniform and normal variables. Draws of one image are independent.
    assert abs(draw.timesteps.mean() - 499.5) < 4 * 288.7 / np.sqrt(draw.timesteps.size)
    for noise in (draw.noise, draw.posterior_noise):
        assert abs(noise.mean()) < 4 / np.sqrt(noise.size)
        assert abs(noise.var() - 1) < 4 * np.sqrt(2 / noise.size)
    for pair in ((draw.noise[:, 0], draw.noise[:, 1]), (draw.noise[:, 0, :, :3], draw.posterior_noise[:, ::2, ::2])):
        left, right = (np.asarray(x).ravel() for x in pair)
        assert abs(np.corrcoef(left, right)[0, 1]) < 4 / np.sqrt(left.size)


def test_loss_is_the_formula(setting):
    """The loss is the mean over draws of the squared error of the predicted noise, with noising in float64."""
    objective, params, outputs, targets, keys = setting
    found = loss(*setting)
    assert found.shape == (2, 2)
    signal = np.cumprod(1 - make_diffusion().betas)
    predict = jax.jit(Denoiser(objective.config.denoiser).apply)
    for item, (row, slot) in enumerate(np.ndindex(2, 2)):
        draw = objective.draw(keys[row, slot])
        target = jax.tree.map(lambda x, item=item: x[item, None], targets)
        latents = np.float64(objective.latents(target, draw.posterior_noise[None])[0])
        errors = []
        for t, noise in zip(np.asarray(draw.timesteps), np.float64(draw.noise), strict=True):
            noised = jnp.asarray(np.sqrt(signal[t]) * latents + np.sqrt(1 - signal[t]) * noise, jnp.float32)
            condition = normalise_condition(outputs[row, slot])
            predicted = predict({"params": params["denoiser"]}, noised[None], t[None], condition[None])[0]
            errors.append(np.mean((noise - np.float64(predicted)) ** 2))
        assert len(errors) == 4
        np.testing.assert_allclose(found[row, slot], np.mean(errors), rtol=1e-5)


def test_loss_of_an_image_does_not_depend_on_the_others(setting):
    """An image with the same key has the same loss beside other images, in another order or batch shape."""
    objective, params, outputs, targets, keys = setting
    found = loss(*setting).reshape(-1)
    flat, items = outputs.reshape(4, *outputs.shape[2:]), keys.reshape(-1)
    order = jnp.array([2, 0, 3, 1])

    def run(index, shape):
        part = flat[index].reshape(*shape, *flat.shape[1:])
        chosen = jax.tree.map(lambda x: x[index], targets)
        return loss(objective, params, part, chosen, items[index].reshape(shape)).reshape(-1)

    for index, shape in ((order, (2, 2)), (order, (1, 4)), (order[3:], (1, 1))):
        np.testing.assert_allclose(run(index, shape), found[index], rtol=1e-6)
    strange = outputs.at[0, 1].set(100.0)
    np.testing.assert_allclose(
        np.delete(loss(objective, params, strange, targets, keys).reshape(-1), 1), np.delete(found, 1), rtol=1e-6
    )
    again = loss(objective, params, outputs, targets, jax.random.split(jax.random.key(9), (2, 2)))
    assert (np.abs(again.reshape(-1) - found) > 1e-3).all()


def reduced(reduction, losses, batch) -> float:
    """Reduces losses as `Loss` does."""
    counted = reduction.counted(batch)
    real = jnp.sum(batch["image_start"] < batch["tokens"].shape[1])
    counts = Counts(jnp.zeros((), int), real.astype(float), jnp.sum(counted).astype(float))
    return reduction.mean(jnp.sum(jnp.where(counted, losses, 0.0)), counts)


def rows_of(*starts: int, segments: int = 4) -> dict[str, jax.Array]:
    """Rows of five tokens with one slot each. The first `segments` rows hold a conversation."""
    tokens = jnp.zeros((len(starts), 5), jnp.int32)
    held = jnp.arange(len(starts))[:, None] < segments
    return {"tokens": tokens, "segments": tokens + held, "image_start": jnp.array(starts)[:, None]}


def test_reductions():
    """ImageMean averages over images; OfficialMean also over rows without an image, but not over rows of padding."""
    losses, some, full = jnp.array([[1.0], [2.0], [4.0], [8.0]]), rows_of(0, 5, 2, 5), rows_of(0, 1, 2, 3)
    assert float(reduced(ImageMean(), losses, some)) == 2.5
    assert float(reduced(ImageMean(), losses, full)) == 3.75
    assert float(reduced(OfficialMean(4), losses, some)) == pytest.approx(3.75 * 8 / (8 + 1e-6), rel=1e-7)
    assert float(reduced(OfficialMean(1), losses, some)) == pytest.approx(3.75 * 2 / (2 + 1e-6), rel=1e-7)
    padded = rows_of(0, 5, 2, 5, segments=3)
    assert float(reduced(OfficialMean(4), losses, padded)) == pytest.approx(7 / 3 * 8 / (8 + 1e-6), rel=1e-6)
    with pytest.raises(ConfigError, match=r"rows of one conversation .* have 2; set config.data.packing.images to 1"):
        OfficialMean(4).counted(some | {"image_start": jnp.zeros((4, 2), int)})


def test_rematerialised_and_in_half_precision(setting):
    """Rematerialisation changes neither loss nor gradients; bfloat16 changes the loss by its rounding only."""
    objective, params, outputs, *rest = setting

    def step(objective):
        return jax.value_and_grad(lambda params: jnp.sum(objective.loss(params, {}, {FINAL: outputs}, *rest)))

    def run(objective):
        return jax.jit(step(objective))(params)

    expected, gradients = run(objective)
    full = dataclasses.replace(objective, remat="full")
    assert ["remat" in str(jax.make_jaxpr(step(each))(params)) for each in (objective, full)] == [False, True]
    found, again = run(full)
    assert found == pytest.approx(float(expected), rel=1e-6)
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    half, _ = run(dataclasses.replace(objective, dtype="bfloat16"))
    assert half != expected and half == pytest.approx(float(expected), rel=0.02)


def test_the_denoiser_is_gathered_once_and_its_gradients_are_split(setting):
    """Each kernel is gathered once, and its gradient is split like the kernel, so that sums move fewer bytes."""
    objective, params, outputs, *rest = setting
    mesh = make_mesh(MeshConfig(1, 4, 2))
    with jax.set_mesh(mesh):
        step = jax.grad(lambda denoiser: jnp.sum(objective.loss({"denoiser": denoiser}, {}, {FINAL: outputs}, *rest)))
        found = Counter(constraints(jax.make_jaxpr(step)(params["denoiser"]).jaxpr))
    kernels = {path: leaf for path, leaf in flatten({"denoiser": params["denoiser"]}).items() if logical_axes(path)}
    expected = Counter()
    for path, leaf in kernels.items():
        expected[leaf.shape, partition(leaf.shape, logical_axes(path), mesh)] += 1
        expected[leaf.shape, PartitionSpec(*[None] * leaf.ndim)] += 1
    shapes = {leaf.shape for leaf in kernels.values()}
    assert len(kernels) == 11 and Counter({each: n for each, n in found.items() if each[0] in shapes}) == expected


def constraints(jaxpr):
    """Yields shape and spec of each sharding constraint, at any depth."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "sharding_constraint":
            yield equation.outvars[0].aval.shape, equation.params["sharding"].spec
        for inner in jaxprs_in_params(equation.params):
            yield from constraints(inner)


@pytest.mark.parametrize("reduction", [ImageMean(), OfficialMean(4)])
def test_no_images_no_loss(setting, reduction):
    """Loss and gradients are exactly zero for rows whose slot is empty and for rows without slots."""
    objective, params, outputs, targets, keys = setting

    def run(denoiser, outputs, targets, keys):
        batch = rows_of(5, 5)
        batch["image_start"] = batch["image_start"][:, : keys.shape[1]]
        return reduced(reduction, objective.loss({"denoiser": denoiser}, {}, {FINAL: outputs}, targets, keys), batch)

    for slots in (1, 0)[: 1 if isinstance(reduction, OfficialMean) else 2]:  # OfficialMean needs one slot per row
        part = jax.tree.map(lambda x, n=2 * slots: x[:n], targets)
        run_with = jax.jit(jax.value_and_grad(run, argnums=(0, 1)))
        value, gradients = run_with(params["denoiser"], outputs[:, :slots], part, keys[:, :slots])
        assert float(value) == 0.0
        assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradients))


def test_empty_slots_are_finite(setting):
    """Loss and gradient of empty slots, whose visual outputs are zeros, are finite: masking would not remove a NaN."""
    objective, params, outputs, targets, keys = setting
    run = jax.jit(jax.value_and_grad(lambda x: objective.loss(params, {}, {FINAL: x}, targets, keys).sum()))
    value, gradient = run(outputs.at[:, 1].set(0.0))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_gradient(setting):
    """Gradients of visual outputs and of some parameters of the denoiser agree with central differences."""
    objective, params, outputs, targets, keys = setting

    @jax.jit
    def run(outputs, denoiser):
        return objective.loss({"denoiser": denoiser}, {}, {FINAL: outputs}, targets, keys).sum()

    gradients = jax.jit(jax.grad(run, argnums=(0, 1)))(outputs, params["denoiser"])

    assert_gradient(gradients[0], lambda d: run(outputs + d, params["denoiser"]), 5e-3)
    paths = [
        ("condition_embedding", "kernel"),
        ("timestep_in", "bias"),
        ("blocks", "attention", "qkv", "kernel"),
        ("blocks", "modulation", "kernel"),
        ("final", "kernel"),
    ]
    for path in paths:
        gradient = gradients[1]
        for name in path:
            gradient = gradient[name]

        def moved(shift, path=path):
            def add(where, leaf):
                return leaf + shift if tuple(key.key for key in where) == path else leaf

            return run(outputs, jax.tree_util.tree_map_with_path(add, params["denoiser"]))

        assert_gradient(gradient, moved, 1e-3)


def test_untrained_denoiser(setting):
    """An untrained denoiser predicts zeros: the loss is the mean square of the noise, and sampling only rescales."""
    objective, _, outputs, targets, keys = setting
    module = Denoiser(objective.config.denoiser)
    spec = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in module.input_spec()]
    params = {"denoiser": jax.jit(module.init)(jax.random.key(0), *spec)["params"]}
    noise = jax.jit(jax.vmap(objective.draw))(keys.reshape(-1)).noise
    expected = np.square(np.float64(noise)).mean(axis=(1, 2, 3)).reshape(2, 2)
    np.testing.assert_allclose(loss(objective, params, outputs, targets, keys), expected, rtol=1e-6)
    process = make_diffusion(respacing="6")
    initial = 1e-4 * jax.random.normal(jax.random.key(1), (2, GRID**2, 12))
    fresh = jnp.ones((6, *initial.shape))

    @functools.partial(jax.jit, static_argnames=("temperature", "clip"))
    def sample(initial, temperature: float, clip: bool = False):
        predict = objective.predictor(params, outputs[0])
        return sample_ancestral(process, predict, initial, fresh, temperature, clip)[-1]

    found = sample(initial, temperature=0.0)
    np.testing.assert_allclose(found, initial / np.sqrt(process.alphas_cumprod[-1]), rtol=1e-4)
    clipped = sample(1e4 * initial, temperature=1.0, clip=True)
    assert 0.9 < float(jnp.abs(clipped).max()) <= 1.0


def test_dropped_conditions(setting):
    """The given share of draws gets zeros as condition; timesteps and noise stay the same."""
    objective, params, outputs, targets, keys = setting
    dropping = dataclasses.replace(objective, condition_dropout=0.25)
    many = jax.random.split(jax.random.key(0), 4000)
    draw, plain = jax.vmap(dropping.draw)(many), jax.vmap(objective.draw)(many)
    assert abs(float(draw.dropped.mean()) - 0.25) < 4 * np.sqrt(0.25 * 0.75 / draw.dropped.size)
    assert plain.dropped is None
    for name in ("timesteps", "noise", "posterior_noise"):
        np.testing.assert_array_equal(getattr(draw, name), getattr(plain, name))
    items = jax.vmap(objective.draw)(keys.reshape(-1))
    flat = outputs.reshape(4, *outputs.shape[2:])
    run = jax.jit(objective.draw_losses)
    with_condition, without = run(params, flat, targets, items), run(params, 0 * flat, targets, items)
    dropped = jnp.array([[True, False, False, True]] * 2 + [[False] * 4, [True] * 4])
    found = run(params, flat, targets, items._replace(dropped=dropped))
    np.testing.assert_allclose(found, jnp.where(dropped, without, with_condition), rtol=1e-5)
    assert (jnp.abs(with_condition - without) > 1e-4).all()


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_guidance(setting, prediction):
    """Guidance 1 changes nothing, 0 ignores the visual outputs, and other values extrapolate linearly."""
    objective, params, outputs, *_ = setting
    denoiser = dataclasses.replace(objective.config.denoiser, prediction=prediction)
    objective = dataclasses.replace(objective, config=dataclasses.replace(objective.config, denoiser=denoiser))
    noised, timesteps = jax.random.normal(jax.random.key(3), (2, GRID**2, 12)), jnp.array([5, 800])

    def noise(outputs, guidance):
        return np.float64(jax.jit(objective.predictor(params, outputs, guidance))(noised, timesteps))

    told, untold = noise(outputs[0], 1.0), noise(0 * outputs[0], 1.0)
    np.testing.assert_array_equal(told, jax.jit(objective.predictor(params, outputs[0]))(noised, timesteps))
    np.testing.assert_allclose(noise(outputs[0], 0.0), untold, rtol=1e-4, atol=1e-5)
    expected = untold + 2.5 * (told - untold)
    np.testing.assert_allclose(noise(outputs[0], 2.5), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert np.abs(told - untold).max() > 1e-3


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_schedule_is_that_of_the_denoiser(setting, schedule):
    """The denoiser's schedule sets the noise of each timestep, in the loss and in sampling."""
    objective, params, outputs, targets, keys = setting
    denoiser = dataclasses.replace(objective.config.denoiser, schedule=schedule)
    other = dataclasses.replace(objective, config=dataclasses.replace(objective.config, denoiser=denoiser))
    np.testing.assert_array_equal(other.process.betas, SCHEDULES[schedule]())
    same = schedule == "cosine"
    assert np.allclose(loss(other, params, outputs, targets, keys), loss(*setting), rtol=1e-6) == same
    sampling = Sampling("ddim", 4)
    found, usual = (
        jax.jit(o.sample, static_argnums=3)(params, outputs[0], keys[0], sampling) for o in (other, objective)
    )
    assert np.allclose(found, usual, rtol=1e-6) == same
