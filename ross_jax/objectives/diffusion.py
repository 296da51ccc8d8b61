"""Gaussian diffusion: noise schedules, respacing, and ancestral sampling.

The defaults are Improved DDPM's process as DiT and the reference use it: cosine schedule, epsilon prediction, fixed
large variance. Other schedules and predictions are available.

Tables are float64 on the host, and are converted to float32 before timesteps are looked up.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ross_jax.config import ConfigError
from ross_jax.models.denoiser import Prediction, Schedule

Predict = Callable[[Float[Array, "batch ..."], Int[Array, " batch"]], Float[Array, "batch ..."]]
"""Function that predicts noise from x_t and the timestep of the training process."""


@dataclasses.dataclass(frozen=True, eq=False)
class Diffusion:
    """A discrete noising process. Tables are indexed by its own steps, not by the training process's timesteps.

    Attributes:
      betas: `[steps]` variance added at each step.
      timestep_map: `[steps]` timestep of the training process that each step stands for, which the network receives.
    """

    betas: np.ndarray
    timestep_map: np.ndarray

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.betas)

    @property
    def alphas_cumprod(self) -> np.ndarray:
        """Share of the signal's variance that is left after each step."""
        return np.cumprod(1.0 - self.betas)

    @property
    def alphas_cumprod_prev(self) -> np.ndarray:
        """Share of the signal's variance that is left before each step; 1 before the first."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @property
    def posterior_variance(self) -> np.ndarray:
        """Variance of q(x_{t-1} | x_t, x_0)."""
        return self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @property
    def posterior_mean_coefficients(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights of x_0 and x_t in the mean of q(x_{t-1} | x_t, x_0)."""
        scale = 1.0 - self.alphas_cumprod
        start = self.betas * np.sqrt(self.alphas_cumprod_prev) / scale
        noised = (1.0 - self.alphas_cumprod_prev) * np.sqrt(1.0 - self.betas) / scale
        return start, noised

    @property
    def model_variance(self) -> np.ndarray:
        """Variance of a sampling step (`FIXED_LARGE`): the betas, with the second posterior variance in place of the
        first beta."""
        return np.append(self.posterior_variance[1], self.betas[1:])


def cosine_betas(steps: int = 1000, max_beta: float = 0.999) -> np.ndarray:
    """Betas of Improved DDPM's squared-cosine schedule."""

    def signal(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array([min(1 - signal((i + 1) / steps) / signal(i / steps), max_beta) for i in range(steps)])


def linear_betas(steps: int = 1000) -> np.ndarray:
    """Betas of DDPM's schedule, which rise evenly. Their sum does not depend on the number of steps."""
    return 1000 / steps * np.linspace(1e-4, 0.02, steps)


def scaled_linear_betas(steps: int = 1000) -> np.ndarray:
    """Betas of latent diffusion's schedule, whose square roots rise evenly."""
    return 1000 / steps * np.square(np.linspace(math.sqrt(0.00085), math.sqrt(0.012), steps))


def sigmoid_betas(steps: int = 1000) -> np.ndarray:
    """Betas of GeoDiff's schedule: a sigmoid over [-6, 6]."""
    return 1000 / steps * (1e-4 + (0.02 - 1e-4) / (1.0 + np.exp(-np.linspace(-6.0, 6.0, steps))))


SCHEDULES: dict[Schedule, Callable[[], np.ndarray]] = {
    "cosine": cosine_betas,
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "sigmoid": sigmoid_betas,
}
"""Name of a schedule in a denoiser's config -> function that returns its 1000 betas."""


def space_timesteps(steps: int, request: str | Sequence[int]) -> list[int]:
    """Steps of a process of `steps` steps that a respaced process keeps, ascending.

    Args:
      request: number of steps to keep.
        "ddim50"      50 steps at one fixed stride
        "50"          50 steps, spread evenly
        "10,15,20"    numbers of steps for three sections of equal length

    Raises:
      ConfigError: no stride keeps that many steps, or a section has fewer steps than requested.
    """
    if isinstance(request, str) and request.startswith("ddim"):
        count = _integer(request.removeprefix("ddim"), request)
        for stride in range(1, steps):
            if len(range(0, steps, stride)) == count:
                return list(range(0, steps, stride))
        raise ConfigError(f"respacing {request!r}: no fixed stride takes {count} of {steps} steps")
    if isinstance(request, str):
        request = [_integer(part, request) for part in request.split(",")]
    base, extra = divmod(steps, len(request))
    kept, first = [], 0
    for i, count in enumerate(request):
        size = base + (i < extra)
        if not 1 <= count <= size:
            raise ConfigError(f"respacing {request!r}: section {i} has {size} steps and cannot keep {count}")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # Repeated addition instead of multiplication, so that `round` breaks ties as in the reference.
        position = 0.0
        for _ in range(count):
            kept.append(first + round(position))
            position += stride
        first += size
    return sorted(set(kept))


def _integer(text: str, request: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"respacing {request!r}: {text!r} is not a number of steps") from None


def make_diffusion(betas: np.ndarray | None = None, respacing: str | Sequence[int] | None = None) -> Diffusion:
    """The process with these betas, respaced to fewer steps for sampling if requested.

    Args:
      betas: default: cosine schedule, 1000 steps.
      respacing: steps to keep, as in `space_timesteps`. None: all steps.

    Raises:
      ConfigError: the respacing is impossible, or leaves fewer than two steps.
    """
    betas = cosine_betas() if betas is None else np.asarray(betas, np.float64)
    full = Diffusion(betas, np.arange(len(betas), dtype=np.int32))
    if respacing is None:
        return full
    kept = np.array(space_timesteps(full.steps, respacing), np.int32)
    if len(kept) < 2:  # the first step uses the second step's variance
        raise ConfigError(f"respacing {respacing!r}: sampling needs at least 2 steps")
    signal = full.alphas_cumprod[kept]
    return Diffusion(1.0 - signal / np.append(1.0, signal[:-1]), kept)


def lookup(table: np.ndarray, steps: Int[Array, " batch"], ndim: int) -> Float[Array, "batch ..."]:
    """Entries of a table at `steps`, float32, shaped to broadcast over a batch with `ndim` axes."""
    return jnp.asarray(table, jnp.float32)[steps].reshape(-1, *(1,) * (ndim - 1))


def add_noise(
    process: Diffusion,
    start: Float[Array, "batch ..."],
    steps: Int[Array, " batch"],
    noise: Float[Array, "batch ..."],
) -> Float[Array, "batch ..."]:
    """x_t: a sample of q(x_t | x_0), made from x_0 (`start`) and standard normal `noise`."""
    signal = process.alphas_cumprod
    return lookup(np.sqrt(signal), steps, start.ndim) * start + lookup(np.sqrt(1.0 - signal), steps, start.ndim) * noise


def prediction_target(
    process: Diffusion,
    prediction: Prediction,
    start: Float[Array, "batch ..."],
    steps: Int[Array, " batch"],
    noise: Float[Array, "batch ..."],
) -> Float[Array, "batch ..."]:
    """The value that a network should predict from x_t: the noise, x_0, or v (Salimans and Ho, 2022)."""
    if prediction == "epsilon":
        return noise
    if prediction == "x0":
        return start
    signal, ndim = process.alphas_cumprod, start.ndim
    return lookup(np.sqrt(signal), steps, ndim) * noise - lookup(np.sqrt(1.0 - signal), steps, ndim) * start


def implied_noise(
    process: Diffusion,
    prediction: Prediction,
    predicted: Float[Array, "batch ..."],
    noised: Float[Array, "batch ..."],
    steps: Int[Array, " batch"],
) -> Float[Array, "batch ..."]:
    """The noise in x_t that corresponds to a network's prediction."""
    if prediction == "epsilon":
        return predicted
    signal, ndim = process.alphas_cumprod, noised.ndim
    if prediction == "x0":
        scaled = noised - lookup(np.sqrt(signal), steps, ndim) * predicted
        return scaled * lookup(np.sqrt(1.0 / (1.0 - signal)), steps, ndim)
    return lookup(np.sqrt(1.0 - signal), steps, ndim) * noised + lookup(np.sqrt(signal), steps, ndim) * predicted


class StepDistribution(NamedTuple):
    """The distribution p(x_{t-1} | x_t).

    Attributes:
      mean: mean of x_{t-1}.
      variance, log_variance: variance of each item, and its logarithm.
      start: predicted x_0.
    """

    mean: Float[Array, "batch ..."]
    variance: Float[Array, " batch"]
    log_variance: Float[Array, " batch"]
    start: Float[Array, "batch ..."]


def step_distribution(
    process: Diffusion,
    predicted: Float[Array, "batch ..."],
    noised: Float[Array, "batch ..."],
    steps: Int[Array, " batch"],
    clip: bool = False,
) -> StepDistribution:
    """The distribution of the next, less noised sample.

    Args:
      predicted: the network's noise.
      noised: x_t.
      steps: steps of `process`, not timesteps of the training process.
      clip: clips the predicted x_0 to [-1, 1].
    """
    signal, ndim = process.alphas_cumprod, noised.ndim
    start = (
        lookup(np.sqrt(1.0 / signal), steps, ndim) * noised
        - lookup(np.sqrt(1.0 / signal - 1.0), steps, ndim) * predicted
    )
    if clip:
        start = jnp.clip(start, -1.0, 1.0)
    start_weight, noised_weight = process.posterior_mean_coefficients
    mean = lookup(start_weight, steps, ndim) * start + lookup(noised_weight, steps, ndim) * noised
    variance = process.model_variance
    return StepDistribution(mean, lookup(variance, steps, 1), lookup(np.log(variance), steps, 1), start)


def sample_ancestral(
    process: Diffusion,
    predict: Predict,
    initial: Float[Array, "batch ..."],
    noise: Float[Array, "steps batch ..."],
    temperature: float = 1.0,
    clip: bool = False,
) -> Float[Array, "steps batch ..."]:
    """Ancestral sampling as one scan.

    Args:
      process: the process to reverse, usually respaced.
      predict: predicts noise from x_t and the timestep of the training process.
      initial: x_T.
      noise: standard normal noise for each step in order of execution, most noised step first. The last step adds none.
      temperature: factor of the noise added at each step.
      clip: clips the predicted x_0 to [-1, 1].

    Returns:
      The sample after each step. The last entry is the result.
    """

    def step(noised, inputs):
        index, fresh = inputs
        steps = jnp.full(noised.shape[:1], index)
        predicted = predict(noised, jnp.asarray(process.timestep_map)[steps])
        mean, _, log_variance, _ = step_distribution(process, predicted, noised, steps, clip)
        deviation = jnp.where(index > 0, jnp.exp(0.5 * log_variance) * temperature, 0.0)
        noised = mean + deviation.reshape(-1, *(1,) * (noised.ndim - 1)) * fresh
        return noised, noised

    return jax.lax.scan(step, initial, (jnp.arange(process.steps - 1, -1, -1), noise))[1]
