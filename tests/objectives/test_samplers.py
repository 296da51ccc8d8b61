"""Deterministic samplers on Gaussian data, whose probability flow is known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ross_jax.objectives.diffusion import lookup, make_diffusion
from ross_jax.objectives.samplers import sample_ddim, sample_dpm

MEAN, DEVIATION = 1.5, 0.4
SHAPE = (3, 5, 4)


def optimal_noise(noised, timesteps):
    """Expected noise in x_t if x_0 is normal with MEAN and DEVIATION."""
    signal = lookup(make_diffusion().alphas_cumprod, timesteps, noised.ndim)
    variance = signal * DEVIATION**2 + 1.0 - signal
    return jnp.sqrt(1.0 - signal) * (noised - jnp.sqrt(signal) * MEAN) / variance


def exact(process, initial) -> np.ndarray:
    """x_0 to which the probability flow takes x_T: it keeps its distance from the mean in standard deviations."""
    signal = process.alphas_cumprod[-1]
    spread = np.sqrt(signal * DEVIATION**2 + 1.0 - signal)
    return MEAN + DEVIATION * (np.asarray(initial, np.float64) - np.sqrt(signal) * MEAN) / spread


def error(sampler, steps: int) -> float:
    process = make_diffusion(respacing=str(steps))
    initial = jax.random.normal(jax.random.key(0), SHAPE)
    found = jax.jit(lambda x: sampler(process, optimal_noise, x))(initial)
    return float(np.abs(np.asarray(found) - exact(process, initial)).max())


@pytest.mark.parametrize(("sampler", "lowest", "highest"), [(sample_ddim, 1.6, 2.6), (sample_dpm, 3.2, 5.0)])
def test_convergence(sampler, lowest, highest):
    """Twice the steps halve the error of DDIM (first order) and quarter that of DPM-Solver++(2M) (second order)."""
    errors = [error(sampler, steps) for steps in (50, 100, 200)]
    assert errors[-1] < 0.01
    for coarse, fine in itertools.pairwise(errors):
        assert lowest < coarse / fine < highest, errors
