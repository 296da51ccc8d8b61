"""Comparison of gradients with central differences."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Array


def assert_gradient(gradient: Array, shifted: Callable[[Array], Array], step: float, rtol: float = 1e-2) -> None:
    """Compares the derivative along the sum of a random direction and the gradient's direction.

    Args:
      shifted: the scalar function of the offset from the point where `gradient` was computed.
      step: length of the offset. Short steps lose digits of float32; the error of long steps is quadratic in the step.
    """
    direction = jax.random.normal(jax.random.key(5), gradient.shape)
    direction = direction / jnp.linalg.norm(direction) + gradient / jnp.linalg.norm(gradient)
    up, down = (float(shifted(sign * step * direction)) for sign in (1, -1))
    expected = float(jnp.vdot(gradient, direction))
    assert abs(expected) > 1e-3
    assert (up - down) / (2 * step) == pytest.approx(expected, rel=rtol)
