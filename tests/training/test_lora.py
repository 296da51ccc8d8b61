"""Low-rank updates in training: the step of a dense run whose update is a product, frozen bases, and runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ross_jax import checkpoints
from ross_jax.config import ConfigError
from ross_jax.lora import LoraConfig, factors_of, is_factor, updated_kernels
from ross_jax.models.ross import TARGET_ENCODERS, abstract_params
from ross_jax.objectives.loss import make_loss
from ross_jax.objectives.reconstruction import ReconstructionConfig
from ross_jax.sharding import MeshConfig
from ross_jax.training.optimizer import OptimizerConfig, make_optimizer
from ross_jax.training.run import Run as RunDirectory
from ross_jax.tree import flatten, merge, unflatten
from tiny import MODELS, STAGE2, Run, make_batch
from training.test_run import data, make_config, parameters  # noqa: F401

BOTH = LoraConfig(4, 6.0, targets=(r"language/layers/(query|value|down)/kernel", r"projector/linear_0/kernel"))


def dense(trained: dict, frozen: dict) -> dict:
    """All parameters, with each kernel's update multiplied out by the formula of the paper."""
    flat = flatten(merge(trained, frozen))
    for kernel in updated_kernels(flat):
        a, b, _ = (flat.pop(path) for path in factors_of(kernel))
        flat[kernel] = flat[kernel] + 6.0 / 4 * jnp.einsum("...ir,...ro->...io", a, b)
    return unflatten(flat)


@pytest.mark.parametrize("name", ["denoise", pytest.param("latent of a teacher", marks=pytest.mark.slow)])
def test_equals_a_dense_run_whose_update_is_a_product(name):
    """Losses, gradient norms and parameters on a mesh are those of a dense model on one device, step by step.

    The dense model has no factors: its kernels are computed from A and B, which its gradients reach by autodiff.
    """
    config, reconstruction = MODELS[name], ReconstructionConfig(name.split()[0])
    run = Run(MeshConfig(1, 2, 2), 4, 2, config=config, reconstruction=reconstruction, updates=BOTH, remat="full")
    trained, frozen = jax.tree.map(jnp.asarray, jax.device_get((run.state.params, run.state.frozen)))
    flat = flatten(trained)
    factors = [path for path in flat if path.startswith(("language/", "projector/"))]
    assert len(factors) == 8 and all(is_factor(path) for path in factors)
    assert not any(flat[path].any() for path in factors if path.endswith("lora_b"))
    width = flat["language/layers/down/lora_a"]
    assert np.abs(width).max() <= 128**-0.5 and width.std() == pytest.approx((3 * 128) ** -0.5, rel=0.1)

    encoders = {name: frozen[name] for name in TARGET_ENCODERS if name in frozen}
    loss = make_loss(config, reconstruction)
    optimizer = make_optimizer(OptimizerConfig(1e-3, ((r"denoiser/.*", 1e-4),)), steps=10)
    moments = optimizer.init(trained)

    @jax.jit
    def step(params, moments, batch, key):
        function = jax.value_and_grad(lambda p: loss(dense(p, frozen), encoders, batch, loss.counts(batch), key)[0])
        value, gradients = function(params)
        updates, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments, value, optax.tree.norm(gradients)

    params = trained
    for i in range(4):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 1), i)
        params, moments, value, norm = step(params, moments, make_batch(seed=i), key)
        found = run.run(make_batch(seed=i))
        assert found["loss"] == pytest.approx(float(value), rel=2e-5)
        assert found["gradient_norm"] == pytest.approx(float(norm), rel=2e-4)
    for path, leaf in flatten(params).items():
        moved = np.abs(leaf - flat[path]).max()
        assert moved > (1e-4 if is_factor(path) else 0) or path.endswith("position_embedding"), path
        np.testing.assert_allclose(flatten(run.state.params)[path], leaf, atol=0.05 * moved + 1e-7, err_msg=path)
    for path, leaf in flatten(run.state.frozen).items():
        np.testing.assert_array_equal(leaf, flatten(frozen)[path], err_msg=path)


def test_the_base_has_no_float32_copy_and_no_moments():
    """The state holds the language model in bfloat16, and its factors in float32 with two moments each."""
    freeze = dataclasses.replace(STAGE2, dtype="bfloat16")
    run = Run(MeshConfig(1, 2, 4), 8, freeze=freeze, updates=BOTH)
    found = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(run.state)
        if "'language'" in jax.tree_util.keystr(path)
    }
    sizes = {True: 0, False: 0}
    for path, leaf in found.items():
        factor = "lora_" in path
        assert leaf.dtype == (jnp.float32 if factor else jnp.bfloat16), path
        sizes[factor] += leaf.size * (1 if factor else 0)
    trained = sum(leaf.size for path, leaf in found.items() if path.startswith(".params"))
    assert sizes[True] == 3 * trained + 3 * run.state.frozen["language"]["layers"]["query"]["lora_scale"].size
    layers = run.state.params["language"]["layers"]
    for factor, split in (
        (layers["query"]["lora_a"], 2),
        (layers["query"]["lora_b"], 4),
        (layers["down"]["lora_a"], 4),
    ):
        assert factor.addressable_shards[0].data.size * split == factor.size


def test_dropout_zeroes_inputs_of_updates_in_training():
    """Without B the masks change nothing. With B the loss differs from that without dropout, and from step to step."""
    batch = make_batch()
    runs = [Run(updates=dataclasses.replace(BOTH, dropout=share), learning_rate=0.0) for share in (0.0, 0.5)]
    assert runs[1].run(batch)["loss"] == runs[0].run(batch)["loss"]
    for run in runs:
        layer = run.state.params["language"]["layers"]["down"]
        layer["lora_b"] = layer["lora_b"] + 0.3
    (plain, again), (dropped, later) = [[run.run(batch)["text_loss"] for _ in range(2)] for run in runs]
    assert plain == again and len({plain, dropped, later}) == 3


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ((r"language/layers/querry/kernel",), "did you mean 'language/layers/query/kernel'"),
        ((r"language/.*", r"denoiser/.*"), "'denoiser/.*' matches no kernel"),
        ((r"language/embedding",), "'language/embedding' matches no kernel"),
        (("(",), "is no pattern"),
        ((), "is empty"),
    ],
)
def test_targets_that_match_nothing_are_refused(data, targets, message):  # noqa: F811
    with pytest.raises((ConfigError, ValueError), match=message.replace("(", r"\(")):
        make_config(data, lora=LoraConfig(4, targets=targets))


def test_a_run_continues_bit_for_bit_and_starts_others(data, tmp_path):  # noqa: F811
    """A stopped run ends like an uninterrupted one. Its factors go on in a run of the same rank, or are merged."""
    lora = dataclasses.replace(BOTH, dropout=0.1)
    changes = {"lora": lora, "optimizer": OptimizerConfig(1e-2), "reconstruction": ReconstructionConfig("none")}
    config = make_config(data, MeshConfig(4, 2, 1), **changes)
    whole = RunDirectory(config, tmp_path / "whole")
    whole.train()
    RunDirectory(config, tmp_path / "again").train(stop_at=lambda step: step == 3)
    again = RunDirectory(config, tmp_path / "again")
    assert again.step == 3 and again.train() == whole.steps
    for path, leaf in parameters(again).items():
        np.testing.assert_array_equal(leaf, parameters(whole)[path], err_msg=path)
    merged = flatten(jax.device_get(dense(whole.state.params, whole.state.frozen)))
    stored = checkpoints.restore_model(tmp_path / "whole", abstract_params(config.model))
    assert set(flatten(stored)) == set(merged) == set(flatten(checkpoints.model_abstract(tmp_path / "whole")))
    for path, leaf in flatten(stored).items():
        np.testing.assert_allclose(leaf, merged[path], atol=1e-6, err_msg=path)
    init = (str(tmp_path / "whole"),)
    same = RunDirectory(dataclasses.replace(config, init=init), tmp_path / "same")
    for path, leaf in parameters(same).items():
        np.testing.assert_array_equal(leaf, parameters(whole)[path], err_msg=path)
    for name, changed in {"rank": dataclasses.replace(lora, rank=2), "full": LoraConfig()}.items():
        run = RunDirectory(dataclasses.replace(config, init=init, lora=changed), tmp_path / name)
        found = flatten(merge(run.state.params, run.state.frozen))
        for path, leaf in merged.items():
            np.testing.assert_allclose(found[path], leaf, atol=1e-6, err_msg=f"{name} {path}")
        assert not any(np.any(leaf) for path, leaf in found.items() if path.endswith("lora_b"))
