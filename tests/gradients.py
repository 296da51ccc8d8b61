"""Gradients held against central differences."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Array


def assert_gradient(gradient: Array, shifted: Callable[[Array], Array], step: float, rtol: float = 1e-2) -> None:
    """Along a direction that is random, and leans to the gradient.

    Args:
      shifted: the scalar function, at the point moved by its argument.
      step: of the difference; float32 loses a few digits in it, and it adds its square.
    """
    direction = jax.random.normal(jax.random.key(5), gradient.shape)
    direction = direction / jnp.linalg.norm(direction) + gradient / jnp.linalg.norm(gradient)
    up, down = (float(shifted(sign * step * direction)) for sign in (1, -1))
    expected = float(jnp.vdot(gradient, direction))
    assert abs(expected) > 1e-3
    assert (up - down) / (2 * step) == pytest.approx(expected, rel=rtol)
