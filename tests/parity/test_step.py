"""The jitted training step gives the goldens' losses, gradients and gradient norms, for both reductions."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ross_jax.parity.golden import read_golden
from ross_jax.parity.quantities import (
    TRAINED,
    channels_last,
    foreign_names,
    make_batch,
    recorded_draw,
    recorded_loss,
    training_batch,
)
from ross_jax.parity.verify import load_reference
from ross_jax.sharding import MeshConfig, batch_sharding, make_mesh, parameter_shardings
from ross_jax.training.state import state_shardings
from ross_jax.training.step import compile_step, make_state, make_train_step
from ross_jax.tree import flatten, unflatten

GOLDEN = Path(__file__).parents[1] / "golden"
RTOL = 1e-4
IMAGES_ALONE = {"siglip_qwen2": 2.2851939, "clip_vicuna": 1.9782456}
"""Golden -> the reference's reconstruction loss averaged over rows with an image, from the golden's README."""

KEEP_GRADIENTS = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params: (jax.tree.map(jnp.zeros_like, grads), grads),
)
"""An optimizer whose updates are zero and whose state is the gradients."""


def one_step(name: str, compat: str):
    """The golden, its config, and the state and metrics after one jitted step on the recorded batch."""
    golden = read_golden(GOLDEN / name / "golden.safetensors")
    reference, params = load_reference(GOLDEN / name / "checkpoint", golden.facts)
    config, images = reference.config, channels_last(golden.take("inputs/pixel_values"))
    batch = make_batch(reference, golden, "inputs/", images)
    loss = recorded_loss(config, recorded_draw(golden, len(images)), compat)
    params = reference.used(params)
    trained = {component: params[component] for component in TRAINED}
    frozen = {component: leaves for component, leaves in params.items() if component not in TRAINED}
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    tree = flatten(params)
    at = parameter_shardings(tree, mesh)
    specs = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at[path]) for path, leaf in tree.items()}
    state = make_state(trained, frozen, KEEP_GRADIENTS)
    shardings = state_shardings(jax.eval_shape(lambda: state), unflatten(specs), mesh)
    step = compile_step(make_train_step(loss, KEEP_GRADIENTS, jax.random.key(0)), shardings, batch_sharding(mesh))
    with jax.set_mesh(mesh):
        rows = jax.device_put(training_batch(config, batch), batch_sharding(mesh))
        state, metrics = step(jax.device_put(state, shardings), rows)
    return golden, config, state, {key: float(value) for key, value in metrics.items()}


def recorded(golden, name: str) -> float:
    return float(golden.tensors[name])


@pytest.mark.parametrize("name", IMAGES_ALONE)
def test_official_step_is_the_reference(name):
    golden, config, state, metrics = one_step(name, "official")
    assert metrics["text_loss"] == pytest.approx(recorded(golden, "vm/lm_loss"), rel=RTOL)
    assert metrics["reconstruction_loss"] == pytest.approx(recorded(golden, "vm/vm_loss"), rel=RTOL)
    assert metrics["loss"] == pytest.approx(recorded(golden, "vm/total_loss"), rel=RTOL)
    found = dict(foreign_names(config, state.opt_state))
    compared = 0
    for key, expected in golden.tensors.items():
        if key.startswith("grad/"):
            np.testing.assert_allclose(
                found[key[5:]], expected, rtol=0, atol=RTOL * np.abs(expected).max(), err_msg=key
            )
            compared += 1
    assert compared
    for key, norm in golden.gradient_norms.items():
        assert float(jnp.linalg.norm(found[key])) == pytest.approx(norm, rel=RTOL), key
    # The recorded norms leave out the position table, which the reference freezes.
    table = float(jnp.linalg.norm(state.opt_state["denoiser"]["position_embedding"]))
    total = np.sqrt(sum(norm**2 for norm in golden.gradient_norms.values()) + table**2)
    assert metrics["gradient_norm"] == pytest.approx(total, rel=RTOL)


@pytest.mark.parametrize("name", IMAGES_ALONE)
def test_default_step_averages_the_recorded_image_losses(name):
    """The default loss is the mean of the reference's losses over rows with an image; the text loss is the same."""
    golden, _, _, metrics = one_step(name, "default")
    items = np.asarray(golden.tensors["vm/loss_per_item"]).reshape(4, -1)
    real = (np.asarray(golden.tensors["inputs/input_ids"]) == -200).any(axis=1)
    expected = float(items[:, real].mean())
    assert metrics["reconstruction_loss"] == pytest.approx(expected, rel=RTOL)
    assert metrics["reconstruction_loss"] == pytest.approx(IMAGES_ALONE[name], rel=RTOL)
    assert metrics["text_loss"] == pytest.approx(recorded(golden, "vm/lm_loss"), rel=RTOL)
    assert metrics["loss"] == pytest.approx(metrics["text_loss"] + expected, rel=RTOL)
    assert metrics["reconstruction_loss"] != pytest.approx(recorded(golden, "vm/vm_loss"), rel=RTOL)
