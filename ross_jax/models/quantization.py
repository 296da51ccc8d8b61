"""Weights of 8 bits, by qwix. They are quantised once, and dequantised where they are multiplied with.

kernel of dtype float      kernel of 8 bits: a qwix.QArray, which is a pytree
[layers, in, out]          qvalue [layers, in, out] int8 or float8, scale [layers, 1, out] float32
"""

import functools
import importlib.util
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from ross_jax.config import UserError

Kind = Literal["int8", "fp8"]

DTYPES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
"""Name -> dtype of quantised values."""
QUANTISED = r"language/layers/.*/kernel"
"""Pattern of the paths of parameters that are quantised: a language model's matrices, but for embedding and head."""


def check_quantization(kind: str | None) -> None:
    """Raises UserError if weights cannot be quantised in this way."""
    if kind is not None and kind not in DTYPES:
        raise UserError(f"quantize {kind!r}: one of {list(DTYPES)}")
    if kind is not None and importlib.util.find_spec("qwix") is None:
        raise UserError(f"quantize {kind!r} needs qwix, which is not installed: pip install 'ross_jax[quantize]'")


def is_quantised(path: str) -> bool:
    """Whether the parameter at a path is quantised."""
    return re.fullmatch(QUANTISED, path) is not None


@functools.partial(jax.jit, static_argnums=1, donate_argnums=0)
def quantize(kernel: Array, kind: Kind) -> Any:
    """A kernel in 8 bits, with a scale for each output."""
    import qwix

    axes = [axis for axis in range(kernel.ndim) if axis != kernel.ndim - 2]
    return qwix.quantize(kernel.astype(jnp.float32), DTYPES[kind], channelwise_axes=axes)


def dequantize(kernel: Any, dtype: DTypeLike) -> Array:
    """A kernel's values; a kernel that is not quantised is cast alone."""
    if isinstance(kernel, jax.Array):
        return kernel.astype(dtype)
    import qwix

    return qwix.dequantize(kernel).astype(dtype)
