"""The PyTorch step of `launch/bench.py step --compare torch` computes what the JAX step computes."""

import dataclasses

import numpy as np
import pytest

from configs import bench as recipe
from parity.helpers import torch
from ross_jax.bench import step as bench
from ross_jax.config import ConfigError, UserError, from_dict
from ross_jax.sharding import MeshConfig
from ross_jax.training.recipe import RunConfig
from tiny import CONFIG

pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity
from ross_jax.bench.peer import Peer  # noqa: E402


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Shows JAX one device, which the comparison needs, instead of the eight virtual ones."""
    import jax

    monkeypatch.setattr("jax.device_count", lambda: 1)
    first = jax.devices()[:1]
    monkeypatch.setattr("jax.devices", lambda *_: first)


def tiny(**changes) -> RunConfig:
    """A recipe of two rows with several conversations each, with clipped gradients and a high learning rate."""
    config = from_dict(RunConfig, recipe.get_config().to_dict())
    packing = dataclasses.replace(config.data.packing, length=256)
    step = dataclasses.replace(config.step, remat="none")
    optimizer = dataclasses.replace(config.optimizer, learning_rate=1e-2, max_gradient_norm=0.1)
    config = dataclasses.replace(
        config,
        model=CONFIG,
        data=dataclasses.replace(config.data, packing=packing),
        optimizer=optimizer,
        step=step,
        mesh=MeshConfig(1, 1, 1),
    )
    return dataclasses.replace(config, **changes)


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "dtype"), [("none", "float32"), ("full", "float32"), ("full", "bfloat16")])
def test_losses_agree_step_after_step(remat, dtype):
    config = tiny()
    config = dataclasses.replace(
        config,
        step=dataclasses.replace(config.step, remat=remat, dtype=dtype),
        freeze=dataclasses.replace(config.freeze, dtype=dtype, autoencoder_dtype=dtype),
    )
    stepper = bench.Stepper(config)
    peer = Peer(config, stepper.params, stepper.batch)
    assert np.count_nonzero(stepper.batch["image_ids"] == 0) and np.count_nonzero(stepper.batch["image_ids"])
    before = None
    for step in range(4):
        losses, expected = stepper(), peer(step)
        for name in ("text_loss", "reconstruction_loss"):
            assert losses[name] == pytest.approx(expected[name], rel=bench.AGREEMENT[dtype]), (step, name)
        assert losses["text_loss"] != before  # parameters move
        before = losses["text_loss"]


def test_figures():
    found = bench.against_torch(tiny(), 1)
    assert found["torch_over_jax"] == pytest.approx(found["torch_step_s"] / found["step_s"])
    assert found["torch_threads"] == torch.get_num_threads()


def test_another_computation_is_not_timed(monkeypatch):
    """A PyTorch step with other noise has other losses, which ends the comparison."""
    call = Peer.__call__
    monkeypatch.setattr(Peer, "__call__", lambda self, step: call(self, step + 10))
    with pytest.raises(UserError, match=r"reconstruction_loss is .* they do not compute the same"):
        bench.against_torch(tiny(), 1)


@pytest.mark.slow
def test_what_the_peer_does_not_compute():
    config = tiny()
    config = dataclasses.replace(
        config,
        step=dataclasses.replace(config.step, dtype="bfloat16"),
        optimizer=dataclasses.replace(config.optimizer, weight_decay=0.1),
    )
    with pytest.raises(ConfigError, match=r"step.dtype.* must all be .*; optimizer.algorithm must be adamw"):
        bench.against_torch(config, 1)
