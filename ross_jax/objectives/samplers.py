"""Deterministic samplers: DDIM, and DPM-Solver++(2M) for few steps. Ancestral sampling is in `diffusion`.

Both samplers follow the probability flow from noise to data, so the same x_T always gives the same image. Steps of the
(usually respaced) process run from the last to the first. The result is x_0 itself.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ross_jax.objectives.diffusion import Diffusion, Predict


def sample_ddim(process: Diffusion, predict: Predict, initial: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
    """DDIM without added noise (Song et al., 2021, equation 12 with sigma 0).

    Args:
      process: the process to reverse, usually respaced.
      predict: predicts noise from x_t and the timestep of the training process.
      initial: x_T.
    """

    def step(noised, index):
        signal, signal_next, timestep = index
        noise = predict(noised, jnp.full(len(noised), timestep))
        start = (noised - jnp.sqrt(1.0 - signal) * noise) / jnp.sqrt(signal)
        return jnp.sqrt(signal_next) * start + jnp.sqrt(1.0 - signal_next) * noise, None

    return jax.lax.scan(step, initial, _descending(process))[0]


def sample_dpm(process: Diffusion, predict: Predict, initial: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
    """DPM-Solver++(2M) (Lu et al., 2022, algorithm 2). Its first step and its last step are of first order.

    Args:
      process: the process to reverse, usually respaced.
      predict: predicts noise from x_t and the timestep of the training process.
      initial: x_T.
    """
    signals, next_signals, timesteps = _descending(process)
    # Half the logarithm of the signal-to-noise ratio, which is infinite at x_0.
    lambdas = 0.5 * np.log(process.alphas_cumprod / (1.0 - process.alphas_cumprod))[::-1]
    widths = np.append(np.diff(lambdas), np.inf)
    # Weights of the difference to the previously predicted x_0. The first step has no previous x_0, and the last step
    # is of first order: both have weight 0.
    weights = np.zeros_like(widths)
    weights[1:-1] = 0.5 * widths[1:-1] / widths[:-2]

    def step(carry, index):
        noised, previous = carry
        signal, signal_next, timestep, width, weight = index
        noise = predict(noised, jnp.full(len(noised), timestep))
        start = (noised - jnp.sqrt(1.0 - signal) * noise) / jnp.sqrt(signal)
        aimed = start + weight * (start - previous)
        shrink = jnp.sqrt((1.0 - signal_next) / (1.0 - signal))
        return (shrink * noised - jnp.sqrt(signal_next) * jnp.expm1(-width) * aimed, start), None

    table = (signals, next_signals, timesteps, jnp.asarray(widths, jnp.float32), jnp.asarray(weights, jnp.float32))
    return jax.lax.scan(step, (initial, jnp.zeros_like(initial)), table)[0][0]


def _descending(process: Diffusion) -> tuple[Array, Array, Array]:
    """Share of signal before and after each step, and the timestep that the network receives; most noised first."""
    signals = jnp.asarray(process.alphas_cumprod[::-1], jnp.float32)
    after = jnp.asarray(process.alphas_cumprod_prev[::-1], jnp.float32)
    return signals, after, jnp.asarray(process.timestep_map[::-1])
