"""Ross^R: visual outputs are regressed to pixels, latents or features."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradients import assert_gradient
from ross_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from ross_jax.models.language import FINAL
from ross_jax.models.regressor import Regressor, RegressorConfig
from ross_jax.models.ross import RossConfig, abstract_params, normalise
from ross_jax.models.vision import VisionConfig, VisionEncoder
from ross_jax.objectives.reconstruction import ReconstructionConfig, make_objective, reconstructor
from ross_jax.objectives.regress import token_distance
from ross_jax.objectives.targets import (
    group_latents,
    pixel_tokens,
    target_pixels,
    teacher_features,
    tokens_to_pixels,
    ungroup_latents,
)

WIDTH, GRID = 20, 3
FLAGS = (False,) * 4
AUTOENCODER = AutoencoderConfig((4, 4, 8, 8), 1, 3, 4, 0.3611, 0.1159, FLAGS, FLAGS)
VISION = VisionConfig("siglip", 44, 14, 8, 8, 1, 1, "gelu", 1e-6, -1)
TEACHER = VisionConfig("siglip", 30, 10, 16, 24, 2, 2, "gelu_tanh", 1e-6, -1)
SIZES = {"pixels": 768, "latents": 12, "features": 16}
KINDS = [
    ("pixel", "pixels", "mse"),
    ("pixel", "pixels", "cosine"),
    ("latent", "latents", "mse"),
    ("latent", "latents", "cosine"),
    ("latent", "features", "mse"),
    ("latent", "features", "cosine"),
    ("latent2pixel", "latents", "mse"),
]


def config(target: str, **changes) -> RossConfig:
    ross = RossConfig(
        vision=VISION,
        regressor=RegressorConfig(target, WIDTH, SIZES[target], 24, 3),
        autoencoder=AUTOENCODER if target == "latents" else None,
        teacher=TEACHER if target == "features" else None,
        image_mean=(0.48, 0.46, 0.41),
        image_std=(0.27, 0.26, 0.28),
        teacher_mean=(0.45, 0.5, 0.55),
        teacher_std=(0.2, 0.25, 0.3),
    )
    return dataclasses.replace(ross, **changes)


def random_params(ross: RossConfig):
    rng = np.random.default_rng(0)
    shapes = abstract_params(dataclasses.replace(ross, vision=None))
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), shapes)


def setting(kind: str, target: str, distance: str):
    """Objective, parameters, visual outputs of 2 x 2 images, and the batch with these images."""
    ross = config(target)
    objective = make_objective(ross, ReconstructionConfig(kind, distance=distance))
    outputs = jax.random.normal(jax.random.key(1), (2, 2, GRID**2, WIDTH))
    images = jax.random.randint(jax.random.key(2), (2, 2, 44, 44, 3), 0, 256).astype(jnp.uint8)
    places = jnp.zeros((2, 2), jnp.int32)
    return objective, random_params(ross), outputs, {"images": images, "image_start": places, "tokens": places}


def layer_norm(x: np.ndarray, eps: float) -> np.ndarray:
    x = np.float64(x)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


@pytest.mark.parametrize(("kind", "target", "distance"), KINDS)
def test_loss_is_the_formula(kind, target, distance):
    """The loss is the distance between the regressor's prediction for each token and the target."""
    objective, params, outputs, batch = setting(kind, target, distance)
    ross = objective.config
    keys = jax.random.split(jax.random.key(0), (2, 2))
    targets = jax.jit(objective.targets)(params, batch)
    found = jax.jit(objective.loss)(params, params, {FINAL: outputs}, targets, keys)
    images = normalise(ross, batch["images"]).reshape(4, 44, 44, 3)
    assert found.shape == (2, 2)
    context = jnp.asarray(layer_norm(outputs, 1e-5), jnp.float32).reshape(4, GRID**2, WIDTH)
    predicted = np.float64(Regressor(ross.regressor).apply({"params": params["regressor"]}, context))
    pixels = target_pixels(ross, images)
    if target == "pixels":
        # Tokens are windows of 16 x 16 pixels, row by row. Inside a token, channels come first.
        truth = np.stack(
            [np.float64(pixels)[:, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16] for y in range(3) for x in range(3)], 1
        )
        truth = truth.transpose(0, 1, 4, 2, 3).reshape(4, 9, 768)
    elif target == "features":
        truth = np.float64(teacher_features(ross, params, images, jnp.float32))
    else:
        module, variables = Autoencoder(AUTOENCODER), {"params": params["autoencoder"]}
        mean = module.apply(variables, pixels, method="encode").mean
        truth = np.float64(group_latents((mean - 0.1159) * 0.3611, 2))
    if kind == "latent2pixel":
        latents = ungroup_latents(jnp.asarray(predicted, jnp.float32), 2) / 0.3611 + 0.1159
        decoded = module.apply(variables, latents, method="decode")
        expected = np.square(np.float64(decoded) - np.float64(pixels)).mean((1, 2, 3))
    elif distance == "mse":
        expected = np.square(predicted - truth).mean((1, 2))
    else:
        lengths = np.linalg.norm(predicted, axis=-1) * np.linalg.norm(truth, axis=-1)
        expected = (1 - (predicted * truth).sum(-1) / lengths).mean(-1)
    np.testing.assert_allclose(found.reshape(-1), expected, rtol=2e-5)


@pytest.mark.parametrize(("kind", "target", "distance"), KINDS)
def test_gradient(kind, target, distance):
    """Gradients of visual outputs and of a kernel agree with central differences, also through the decoder."""
    objective, params, outputs, batch = setting(kind, target, distance)
    targets = jax.jit(objective.targets)(params, batch)
    keys = jax.random.split(jax.random.key(0), (2, 2))

    @jax.jit
    def run(outputs, kernel):
        regressor = {**params["regressor"], "linear_1": {**params["regressor"]["linear_1"], "kernel": kernel}}
        return objective.loss({"regressor": regressor}, params, {FINAL: outputs}, targets, keys).sum()

    kernel = params["regressor"]["linear_1"]["kernel"]
    of_outputs, grad_kernel = jax.jit(jax.grad(run, argnums=(0, 1)))(outputs, kernel)
    assert_gradient(of_outputs, lambda shift: run(outputs + shift, kernel), 1e-2)
    assert_gradient(grad_kernel, lambda shift: run(outputs, kernel + shift), 3e-3)


def test_the_decoder_is_recomputed():
    """The gradient through the decoder of `latent2pixel` keeps only the inputs of the decoder's blocks."""
    objective, params, outputs, batch = setting("latent2pixel", "latents", "mse")
    targets, keys = objective.targets(params, batch), jax.random.split(jax.random.key(0), (2, 2))
    grad = jax.grad(lambda outputs: objective.loss(params, params, {FINAL: outputs}, targets, keys).sum())
    # 4 levels of 2 blocks, and 3 blocks in the middle.
    assert str(jax.make_jaxpr(grad)(outputs)).count("prevent_cse") == 11


def test_pixel_tokens_and_back():
    pixels = jax.random.normal(jax.random.key(0), (2, 48, 48, 3))
    tokens = pixel_tokens(pixels)
    assert tokens.shape == (2, 9, 768)
    np.testing.assert_array_equal(tokens_to_pixels(tokens), pixels)


@pytest.mark.parametrize("size", [30, 60, 50])
def test_teacher_features(size):
    """A teacher of another size or grid gets the image in its own size and normalisation; features fit our grid."""
    teacher = dataclasses.replace(TEACHER, image_size=size)
    ross = config("features", teacher=teacher)
    params = random_params(ross)
    images = jnp.clip(jax.random.normal(jax.random.key(0), (2, 44, 44, 3)), -1.4, 1.4)
    found = teacher_features(ross, params, images, jnp.float32)
    assert found.shape == (2, GRID**2, 16)
    plain = np.clip(np.float64(images) * ross.image_std + ross.image_mean, 0, 1)
    shape = (2, size, size, 3)
    seen = jax.image.resize(jnp.asarray(plain, jnp.float32), shape, "linear")
    seen = (seen - np.array([0.45, 0.5, 0.55])) / np.array([0.2, 0.25, 0.3])
    features = VisionEncoder(teacher).apply({"params": params["teacher"]}, jnp.asarray(seen, jnp.float32))
    features = np.asarray(features).reshape(2, teacher.grid, teacher.grid, 16)
    if teacher.grid == 6:  # bilinear with half-pixel centres: the mean of 2 x 2 features
        features = features.reshape(2, 3, 2, 3, 2, 16).mean((2, 4))
    if teacher.grid == 5:
        places = (np.arange(3) + 0.5) * 5 / 3 - 0.5
        low = np.floor(places).astype(int)
        share = (places - low)[:, None]
        rows = features[:, low] * (1 - share[..., None]) + features[:, low + 1] * share[..., None]
        features = rows[:, :, low] * (1 - share) + rows[:, :, low + 1] * share
    np.testing.assert_allclose(found.reshape(2, 3, 3, 16), layer_norm(features, 1e-6), atol=2e-4)


def test_distance_of_nothing_is_finite():
    """The cosine distance of zeros, which have no direction, has a finite value and gradient."""
    value, gradient = jax.value_and_grad(lambda x: token_distance("cosine", x, jnp.ones((2, 3))))(jnp.zeros((2, 3)))
    assert float(value) == 1.0 and np.isfinite(gradient).all()


@pytest.mark.parametrize(("target", "latents"), [("pixels", False), ("latents", True)])
def test_reconstruct_is_what_was_regressed(target, latents):
    """A regressor that predicts a constant reconstructs the image of that constant; the config selects the method."""
    ross = config(target)
    params = random_params(ross)
    image = jnp.tanh(jax.random.normal(jax.random.key(3), (1, 48, 48, 3)))
    module, variables = Autoencoder(AUTOENCODER), {"params": params.get("autoencoder")}
    if latents:
        mean = module.apply(variables, image, method="encode").mean
        said, expected = group_latents((mean - 0.1159) * 0.3611, 2), module.apply(variables, image)
    else:
        said, expected = pixel_tokens(image), image
    last = params["regressor"]["linear_2"]
    outputs = jax.random.normal(jax.random.key(1), (9, 1, WIDTH))
    keys = jax.random.split(jax.random.key(0), 9)
    # One token at a time, because a bias gives all tokens the same value.
    for token in range(9):
        params["regressor"]["linear_2"] = {"kernel": 0 * last["kernel"], "bias": said[0, token]}
        objective = reconstructor(ross)
        predicted = objective.predict(params, outputs[token])
        np.testing.assert_allclose(predicted[0], said[0, token], atol=1e-6)
    params["regressor"]["linear_2"] = {"kernel": 0 * last["kernel"], "bias": said[0, 4]}
    whole = jnp.tile(said[:, 4:5], (1, 9, 1))
    expected = (
        module.apply(variables, ungroup_latents(whole, 2) / 0.3611 + 0.1159, method="decode")
        if latents
        else tokens_to_pixels(whole)
    )
    made = objective.reconstruct(params, params, jnp.tile(outputs[:1], (2, 9, 1)), keys[:2])
    np.testing.assert_allclose(made.pixels[1], jnp.clip(expected[0], -1, 1), atol=1e-4)
    assert (made.latents is not None) == latents
    if latents:
        np.testing.assert_allclose(made.latents[0], ungroup_latents(whole, 2)[0], atol=1e-5)


def test_what_makes_no_image():
    assert reconstructor(config("features")) is None
    assert reconstructor(dataclasses.replace(config("pixels"), regressor=None)) is None
    assert make_objective(config("pixels"), ReconstructionConfig("none")) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distance": "cosine"}, "distance is no setting of kind 'denoise'"),
        ({"kind": "latent2pixel", "distance": "cosine"}, "distance is no setting of kind 'latent2pixel'"),
        ({"kind": "pixel", "condition_dropout": 0.1}, "condition_dropout is no setting of kind 'pixel'"),
        ({"options": (("drws", 2),)}, r"drws is no setting of kind 'denoise' \(did you mean 'draws'\?\)"),
        ({"kind": "pixels"}, r"kind 'pixels' is none of \['denoise', .*'none'\] \(did you mean 'pixel'\?\)"),
        ({"condition_dropout": 1.0}, r"condition_dropout 1.0 must be in \[0, 1\)"),
        ({"draws": 0}, "draws 0 must be at least 1"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        ReconstructionConfig(**settings)


@pytest.mark.parametrize(
    ("kind", "ross", "message"),
    [
        ("denoise", config("latents"), "reconstruction.kind 'denoise' needs model.denoiser, which is not there"),
        ("pixel", config("pixels", regressor=None), "'pixel' needs model.regressor, which is not there"),
        (
            "pixel",
            config("latents"),
            "'pixel' needs model.regressor.target 'pixels', not 'latents'; .*out_size 768, not 12",
        ),
        ("latent", config("pixels"), "'latent' needs model.autoencoder"),
        ("latent", config("features", teacher=None), "'latent' needs model.teacher"),
        ("latent2pixel", config("latents", autoencoder=None), "'latent2pixel' needs model.autoencoder"),
    ],
)
def test_models_that_lack_something(kind, ross, message):
    with pytest.raises(ValueError, match=message):
        ReconstructionConfig(kind).check(ross)


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"'pixel' needs model\.regressor\.out_size 768, not 12"):
        ReconstructionConfig("pixel").check(config("pixels", regressor=RegressorConfig("pixels", WIDTH, 12, 24)))
    with pytest.raises(ValueError, match="depth 0 must be at least 1"):
        RegressorConfig("pixels", WIDTH, 12, 24, 0)
    deep = AutoencoderConfig((4,) * 6, 1, 3, 4, 1.0, 0.0, (False,) * 6, (False,) * 6)
    with pytest.raises(ValueError, match="downsampling is 32, which does not divide the 16 pixels"):
        config("latents", autoencoder=deep)
