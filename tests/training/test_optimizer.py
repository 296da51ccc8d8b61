"""AdamW and Muon: weight decay and orthogonalised updates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ross_jax.models.ross import abstract_params
from ross_jax.training.optimizer import OptimizerConfig, make_optimizer
from ross_jax.tree import flatten, unflatten
from tiny import CONFIG


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    tree = {name: part for name, part in abstract_params(CONFIG).items() if name != "autoencoder"}
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), tree)


def first_update(params, gradients, **settings) -> dict[str, np.ndarray]:
    config = OptimizerConfig(1e-3, ((r"denoiser/.*", 1e-4),), warmup_ratio=0.0, **settings)
    optimizer = make_optimizer(config, steps=10)
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    return {path: np.asarray(leaf) for path, leaf in flatten(updates).items()}


@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_norms_and_biases_do_not_decay(params, algorithm):
    """Without gradients a decaying parameter moves by -rate x decay x value, any other not at all."""
    updates = first_update(params, jax.tree.map(jnp.zeros_like, params), weight_decay=0.5, algorithm=algorithm)
    for path, leaf in flatten(params).items():
        rate = 1e-4 if path.startswith("denoiser/") else 1e-3
        decays = path.endswith("kernel") if algorithm == "muon" else not path.endswith(("scale", "bias"))
        expected = -0.5 * rate * leaf if decays else 0.0
        np.testing.assert_allclose(updates[path], np.broadcast_to(expected, leaf.shape), atol=1e-9, err_msg=path)


def test_muon_orthogonalises_each_layers_matrix(params):
    """Most singular values of an update are within half of their median, as Newton-Schulz makes them."""
    gradients = unflatten({path: leaf * jnp.linspace(1, 20, leaf.shape[-1]) for path, leaf in flatten(params).items()})
    updates = first_update(params, gradients, algorithm="muon", max_gradient_norm=1e9)
    adamw = first_update(params, gradients, max_gradient_norm=1e9)
    matrices = [path for path in updates if path.endswith("kernel")]
    assert "language/layers/up/kernel" in matrices and "vision/patch_embedding/kernel" in matrices
    for path in matrices:
        update = updates[path]
        stacked = "/layers/" in path or "/blocks/" in path
        for layer in update if stacked else [update]:
            values = np.linalg.svd(layer.reshape(-1, layer.shape[-1]), compute_uv=False)
            near = np.abs(values / np.median(values) - 1.0) < 0.5
            assert near.mean() > 0.85, path  # square matrices have some very small singular values
            # An update of full rank is as large as a usual one of AdamW: 0.2 of the learning rate.
            size = np.sqrt(np.mean(layer**2)) / np.abs(adamw[path]).max()
            assert 0.1 < size < 0.3, path
    for path in set(updates) - set(matrices):
        assert np.all(np.sign(updates[path]) == np.sign(adamw[path])), path


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="warmup_ratio"):
        OptimizerConfig(1e-3, warmup_ratio=1.0)
