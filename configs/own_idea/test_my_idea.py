"""Unit tests of `my_idea.py`, on a CPU. The README says how they are run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ross_jax  # noqa: F401  switches the checks of shapes on, before my_idea is imported

import my_idea  # isort: skip

ENCODER = my_idea.PatchConfig("patches", 28, 7, 32, 32, 1, 1, "gelu", 1e-6, select_layer=-1).build()
DENOISER = my_idea.MeanDenoiserConfig(condition_size=64, latent_size=16, grid=4, width=32, num_heads=4).build()


@pytest.mark.parametrize("module", [ENCODER, DENOISER], ids=["encoder", "denoiser"])
def test_shapes(module):
    inputs = [jnp.zeros(spec.shape, spec.dtype) for spec in module.input_spec(2)]
    output, _ = module.init_with_output(jax.random.key(0), *inputs)
    assert output.shape == ((2, 16, 32) if module is ENCODER else (2, 16, 16))


def test_a_wrong_shape_says_where():
    """A picture without its batch: the error names function, argument and shape."""
    with pytest.raises(Exception, match=r"(?s)images.*f32\[28,28,3\]|f32\[28,28,3\].*images") as caught:
        ENCODER.init(jax.random.key(0), jnp.zeros((28, 28, 3)))
    assert "PatchEncoder" in str(caught.value)


def test_the_source():
    source = my_idea.ColourConfig("colours", count=4).open(2**20)
    assert len(source) == 4 and source[1].record["conversations"][1]["value"] == "green"
    assert np.frombuffer(source[1].images[0].read()[:4], np.uint8)[1:].tobytes() == b"PNG"
