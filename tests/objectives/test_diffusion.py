"""Noise schedules equal those that the reference recorded; noising and sampling follow the papers' formulas."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from ross_jax.config import ConfigError
from ross_jax.models.denoiser import position_table, timestep_embedding
from ross_jax.objectives.diffusion import (
    add_noise,
    cosine_betas,
    implied_noise,
    make_diffusion,
    prediction_target,
    sample_ancestral,
    space_timesteps,
    step_distribution,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "diffusion"
RECORDED = load_file(GOLDEN / "schedules.safetensors")
RESPACING = json.loads((GOLDEN / "respacing.json").read_text())
TIMESTEP_ANGLES = 1e-4
"""Absolute tolerance. At t = 999 one float32 rounding of a frequency moves an angle by 6e-5."""


@pytest.mark.parametrize("respacing", [None, "1000", "50", "8", "ddim25"])
def test_schedule_is_the_recorded_one(respacing):
    process = make_diffusion(respacing=respacing)
    name = f"cosine_{respacing or 'train'}/"
    signal = process.alphas_cumprod
    of_start, of_noised = process.posterior_mean_coefficients
    computed = {
        "betas": process.betas,
        "timestep_map": process.timestep_map,
        "alphas_cumprod": signal,
        "alphas_cumprod_prev": process.alphas_cumprod_prev,
        "sqrt_alphas_cumprod": np.sqrt(signal),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - signal),
        "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / signal),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / signal - 1.0),
        "posterior_variance": process.posterior_variance,
        "posterior_mean_coef1": of_start,
        "posterior_mean_coef2": of_noised,
        "model_variance": process.model_variance,
        "model_log_variance": np.log(process.model_variance),
    }
    for quantity, value in computed.items():
        assert value.dtype == (np.int32 if quantity == "timestep_map" else np.float64)
        np.testing.assert_allclose(value, RECORDED[name + quantity], rtol=1e-12, err_msg=quantity)
    assert process.steps == len(RECORDED[name + "betas"])


@pytest.mark.parametrize("case", RESPACING["space_timesteps"], ids=lambda case: str(case["section_counts"]))
def test_respacing_is_the_recorded_one(case):
    assert space_timesteps(case["num_timesteps"], case["section_counts"]) == case["steps"]


@pytest.mark.parametrize(
    ("steps", "request_"),
    [(case["num_timesteps"], case["section_counts"]) for case in RESPACING["errors"]]
    + [(10, "0"), (10, "5,6"), (10, [3, -1]), (10, "ddim"), (10, "5,x"), (10, ""), (10, "ddim0")],
)
def test_respacing_errors(steps, request_):
    with pytest.raises(ConfigError, match="respacing"):
        space_timesteps(steps, request_)


def test_one_step_has_no_second_variance():
    """A process needs two steps, because the first step takes its variance from the second."""
    with pytest.raises(ConfigError, match="at least 2 steps"):
        make_diffusion(respacing="1")


@pytest.mark.parametrize("size", [256, 33])
def test_timestep_embedding(size):
    found = timestep_embedding(jnp.asarray(RECORDED["timestep_embedding/t"]), size)
    np.testing.assert_allclose(found, RECORDED[f"timestep_embedding/dim{size}"], atol=TIMESTEP_ANGLES, rtol=0)
    assert found.shape[1] == size
    assert size % 2 == 0 or not np.asarray(found[:, -1]).any()


@pytest.mark.parametrize(("width", "grid"), [(16, 3), (48, 5)])
def test_position_table(width, grid):
    np.testing.assert_allclose(
        position_table(width, grid), RECORDED[f"pos_embed/dim{width}_grid{grid}"], rtol=1e-12, atol=1e-15
    )


def test_betas_reach_their_limit():
    betas = cosine_betas(1000)
    assert betas.max() == betas[-1] == 0.999
    assert (np.diff(betas) >= 0).all()


class Formulas:
    """The process in float64: Ho et al. (2020), equations 4, 7 and 15, with the betas of Improved DDPM."""

    def __init__(self, kept: list[int], steps: int = 1000):
        f = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        signal = 1.0
        self.signal = []
        for i in range(steps):
            signal *= 1.0 - min(1.0 - f[i + 1] / f[i], 0.999)
            self.signal.append(signal)
        self.signal = [self.signal[i] for i in kept]
        self.kept = kept

    def step(self, t: int, x: np.ndarray, epsilon: np.ndarray, clip: bool) -> tuple[np.ndarray, float, np.ndarray]:
        """Mean of x_(t-1), standard deviation of the noise to add, and predicted x_0."""
        signal, before = self.signal[t], self.signal[t - 1] if t else 1.0
        alpha = signal / before
        start = (x - math.sqrt(1 - signal) * epsilon) / math.sqrt(signal)
        if clip:
            start = np.clip(start, -1, 1)
            mean = math.sqrt(before) * (1 - alpha) * start + math.sqrt(alpha) * (1 - before) * x
            mean = mean / (1 - signal)
        else:
            mean = (x - (1 - alpha) / math.sqrt(1 - signal) * epsilon) / math.sqrt(alpha)
        return mean, math.sqrt(1 - alpha) if t else 0.0, start


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def relative(found, expected) -> float:
    return float(np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max())


def test_add_noise():
    formulas = Formulas(list(range(1000)))
    start, noise, steps = normal(0, 5, 3, 4), normal(1, 5, 3, 4), [0, 1, 250, 998, 999]
    found = add_noise(make_diffusion(), start, jnp.array(steps), noise)
    for item, t in enumerate(steps):
        signal = formulas.signal[t]
        expected = math.sqrt(signal) * np.float64(start[item]) + math.sqrt(1 - signal) * np.float64(noise[item])
        assert relative(found[item], expected) < 1e-6


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_predictions_imply_the_noise(prediction):
    """A perfect prediction of any kind implies the noise that was added, at the first and last timestep too."""
    process, steps = make_diffusion(), jnp.array([0, 1, 250, 998, 999])
    start, noise = normal(0, 5, 3, 4), normal(1, 5, 3, 4)
    noised = add_noise(process, start, steps, noise)
    said = prediction_target(process, prediction, start, steps, noise)
    found = implied_noise(process, prediction, said, noised, steps)
    np.testing.assert_allclose(found, noise, atol=2e-4)
    formulas = Formulas(list(range(1000)))
    expected = {
        "epsilon": lambda signal, x, e: e,
        "x0": lambda signal, x, e: x,
        "v": lambda signal, x, e: math.sqrt(signal) * e - math.sqrt(1 - signal) * x,
    }[prediction]
    for item, t in enumerate(steps.tolist()):
        values = expected(formulas.signal[t], np.float64(start[item]), np.float64(noise[item]))
        assert relative(said[item], values) < 1e-6


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("respacing", [None, "10", "ddim50"])
def test_step_distribution(respacing, clip):
    process = make_diffusion(respacing=respacing)
    formulas = Formulas(process.timestep_map.tolist())
    steps = [0, 1, process.steps // 2, process.steps - 1]
    noised, predicted = normal(2, 4, 6), normal(3, 4, 6)
    found = step_distribution(process, predicted, noised, jnp.array(steps), clip)
    for item, t in enumerate(steps):
        mean, deviation, start = formulas.step(t, np.float64(noised[item]), np.float64(predicted[item]), clip)
        # At the last timestep 1 / sqrt(signal) is 2e4, and the mean is a small difference of large terms.
        scale = np.abs(start).max() if not clip else 1.0
        assert np.abs(found.mean[item] - mean).max() < 1e-5 * max(scale * 1e-3, np.abs(mean).max())
        assert relative(found.start[item], start) < 1e-6
        if t:
            np.testing.assert_allclose(found.variance[item], deviation**2, rtol=1e-6)
        np.testing.assert_allclose(np.exp(found.log_variance[item]), found.variance[item], rtol=1e-5)


@pytest.mark.parametrize(("temperature", "clip"), [(1.0, False), (0.7, True), (0.0, True)])
def test_sampling_loop(temperature, clip):
    process = make_diffusion(respacing="9")
    formulas = Formulas(process.timestep_map.tolist())
    initial, noise = normal(4, 2, 5), normal(5, 9, 2, 5)

    def predict(noised, timesteps, xp=jnp):
        return 0.5 * noised + xp.sin(3 * noised[:, ::-1]) + 1e-3 * timesteps[:, None]

    found = sample_ancestral(process, predict, initial, noise, temperature, clip)
    sample = np.float64(initial)
    for index in range(9):
        t = 8 - index
        told = np.full(2, formulas.kept[t], np.float64)
        mean, deviation, _ = formulas.step(t, sample, predict(sample, told, np), clip)
        sample = mean + temperature * deviation * np.float64(noise[index])
        assert relative(found[index], sample) < 1e-5
        sample = np.float64(found[index])  # errors of earlier steps do not add up


@pytest.mark.parametrize(("respacing", "bias"), [(None, 0.005), ("40", 0.1)])
def test_sampling_of_a_gaussian(respacing, bias):
    """Samples have the exact mean and variance if the data are N(mu, s^2) and the noise is predicted optimally.

    Each step is then affine, which gives the mean and variance of the samples. With few steps the variance is biased,
    because `FIXED_LARGE` adds too much noise.
    """
    mean, deviation, count = 0.8, 0.4, 10_000
    process = make_diffusion(respacing=respacing)
    formulas = Formulas(process.timestep_map.tolist())
    shares = jnp.asarray(make_diffusion().alphas_cumprod, jnp.float32)

    def best(noised, share):
        return (1 - share) ** 0.5 * (noised - share**0.5 * mean) / (share * deviation**2 + 1 - share)

    expected_mean, expected_variance = 0.0, 1.0
    for t in reversed(range(process.steps)):
        at_zero, noise, _ = formulas.step(t, 0.0, best(0.0, formulas.signal[t]), False)
        at_one, _, _ = formulas.step(t, 1.0, best(1.0, formulas.signal[t]), False)
        slope = at_one - at_zero
        expected_mean, expected_variance = slope * expected_mean + at_zero, slope**2 * expected_variance + noise**2
    assert abs(expected_mean - mean) < bias * deviation
    assert abs(expected_variance / deviation**2 - 1) < bias

    @jax.jit
    def sample(key):
        noise = jax.random.normal(key, (process.steps + 1, 1, count))
        return sample_ancestral(process, lambda x, t: best(x, shares[t][:, None]), noise[0], noise[1:])[-1]

    found = np.asarray(sample(jax.random.key(7)))
    # Four standard errors of the estimates.
    assert abs(found.mean() - expected_mean) < 4 * math.sqrt(expected_variance / count)
    assert abs(found.var() / expected_variance - 1) < 4 * math.sqrt(2 / count)
