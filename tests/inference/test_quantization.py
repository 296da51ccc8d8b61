"""Weights of 8 bits: answers of the rounded weights, their size, and launchers that take them."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launcher import load_script
from ross_jax.config import UserError
from ross_jax.inference.model import load
from ross_jax.models.quantization import check_quantization, dequantize
from ross_jax.models.ross import Ross
from ross_jax.tree import flatten, unflatten


def test_without_qwix_the_error_names_it(model_folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"quantize 'int8' needs qwix.*ross_jax\[quantize\]"):
        load(model_folder, quantize="int8")
    with pytest.raises(UserError, match="quantize 'int3': one of"):
        check_quantization("int3")


def rounded(kernel: np.ndarray, kind: str) -> np.ndarray:
    """A kernel after symmetric rounding, and the scale of each output: the formula of the papers."""
    most = np.abs(kernel).max(-2, keepdims=True)
    if kind == "int8":
        scale = most / 127.5
        return np.clip(np.round(kernel / scale), -128, 127) * scale, scale
    scale = most / 448
    return (kernel / scale).astype(jnp.float8_e4m3fn).astype(np.float32) * scale, scale


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_answers_come_from_rounded_weights(model_folder, kind, capsys):
    """Matrices are rounded as by the formula, and the model computes with them; the launcher gives its answer."""
    pytest.importorskip("qwix")
    whole, small = load(model_folder), load(model_folder, quantize=kind)
    before, after = flatten(whole.params), flatten(small.params)
    names = [path for path in before if path.startswith("language/layers/") and path.endswith("/kernel")]
    assert len(names) == 7 and {path for path, leaf in after.items() if not isinstance(leaf, jax.Array)} == set(names)
    for path in names:
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(after[path]))
        assert held < 0.27 * before[path].nbytes
        values, (expected, scale) = dequantize(after[path], np.float32), rounded(np.asarray(before[path]), kind)
        differs = np.abs(values - expected) > 1e-6
        assert differs.mean() < 0.01 and (np.abs(values - expected) < 1.01 * scale).all()  # ties, at the largest value
    dense = unflatten({path: dequantize(leaf, np.float32) for path, leaf in after.items()})
    ids = jnp.asarray(np.random.default_rng(0).integers(1, 320, (1, 12)), jnp.int32)
    inputs = (ids, jnp.arange(12)[None], jnp.ones_like(ids), jnp.zeros((1, 1, 28, 28, 3)), jnp.asarray([[12]]))
    found, ours, plain = (
        np.asarray(Ross(small.config).apply({"params": jax.tree.map(jnp.asarray, params)}, *inputs).hidden)
        for params in (small.params, dense, whole.params)
    )
    np.testing.assert_allclose(found, ours, atol=1e-5 * np.abs(plain).max())
    assert 0.3 > np.abs(found - plain).max() / np.abs(plain).max() > 1e-3
    answer = small.ask([], "What?", max_new_tokens=6)
    flags = ["--max-new-tokens", "6", "--quantize", kind]
    assert load_script("generate").main(["--checkpoint", str(model_folder), "--prompt", "What?", *flags]) == 0
    assert capsys.readouterr().out.strip() == answer.strip()
