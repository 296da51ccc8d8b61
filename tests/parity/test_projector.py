"""The projector equals LLaVA's `nn.Sequential`, imported from an adapter file as stage 1 saves it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parity.helpers import assert_bfloat16, assert_close, imported, numpy, randomise, torch
from ross_jax.config import ConfigError
from ross_jax.convert.projector import projector_config
from ross_jax.models.projector import Projector

pytestmark = pytest.mark.parity


def build(kind: str, vision: int, width: int) -> torch.nn.Module:
    if kind == "linear":
        return randomise(torch.nn.Linear(vision, width))
    modules = [torch.nn.Linear(vision, width)]
    for _ in range(1, int(kind[3])):
        modules += [torch.nn.GELU(), torch.nn.Linear(width, width)]
    return randomise(torch.nn.Sequential(*modules))


def save(module, folder) -> None:
    torch.save({f"model.mm_projector.{key}": value for key, value in module.state_dict().items()}, folder)


def apply(config, params, features, dtype=jnp.float32):
    return jax.jit(lambda p, x: Projector(config, dtype).apply({"params": p}, x))(params, jnp.asarray(features))


@pytest.mark.parametrize(("vision", "width"), [(24, 40), (33, 16)])
@pytest.mark.parametrize("kind", ["linear", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu"])
def test_projector(kind, vision, width, tmp_path):
    module = build(kind, vision, width)
    save(module, tmp_path / "mm_projector.bin")
    config, params = imported(tmp_path)
    assert config == projector_config(kind, vision, width, "")
    features = 2.0 * np.random.default_rng(0).normal(size=(3, 7, vision)).astype(np.float32)
    assert_close(apply(config, params, features), numpy(module(torch.tensor(features))))


def test_identity():
    config = projector_config("identity", 12, 12, "")
    features = np.random.default_rng(0).normal(size=(2, 3, 12)).astype(np.float32)
    assert Projector(config).init(jax.random.key(0), jnp.asarray(features)) == {}
    np.testing.assert_array_equal(apply(config, {}, features), features)
    with pytest.raises(ConfigError, match="12 features to 13"):
        projector_config("identity", 12, 13, "")


def test_bfloat16(tmp_path):
    module = build("mlp2x_gelu", 64, 96).bfloat16()
    save(module, tmp_path / "mm_projector.bin")
    config, params = imported(tmp_path)
    features = torch.tensor(np.random.default_rng(0).normal(size=(4, 16, 64)).astype(np.float32)).bfloat16()
    rounded, exact = numpy(module(features)), numpy(module.float()(features.float()))
    assert_close(apply(config, params, numpy(features)), exact)
    assert_bfloat16(apply(config, params, numpy(features), jnp.bfloat16), rounded, exact)
