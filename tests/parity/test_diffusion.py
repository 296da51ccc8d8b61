"""The noising process equals diffusers' `DDPMScheduler`. tests/objectives compares with the reference's records."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parity.helpers import assert_close, torch
from ross_jax.objectives.diffusion import (
    SCHEDULES,
    add_noise,
    make_diffusion,
    prediction_target,
    sample_ancestral,
    step_distribution,
)
from ross_jax.objectives.samplers import sample_ddim, sample_dpm

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

SHAPE = (3, 4, 6)


def scheduler(clip: bool = False):
    """diffusers' scheduler with alphas_cumprod in float64, because its float32 product is off by 6e-5 near the end."""
    process = diffusers.DDPMScheduler(
        1000, beta_schedule="squaredcos_cap_v2", variance_type="fixed_large", clip_sample=clip
    )
    process.alphas_cumprod = torch.cumprod(1.0 - torch.tensor(make_diffusion().betas), 0)
    return process


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def double(x: jax.Array) -> torch.Tensor:
    return torch.tensor(np.asarray(x)).double()


@pytest.fixture
def feed(monkeypatch):
    """Function: noise -> None. Makes diffusers' scheduler use the given noise instead of drawing it."""

    def set_noise(noise: jax.Array) -> None:
        monkeypatch.setattr(diffusers.schedulers.scheduling_ddpm, "randn_tensor", lambda *_, **__: double(noise))

    return set_noise


def test_betas():
    assert_close(make_diffusion().betas, diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2").betas.numpy(), 1e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear", {}),
        ("scaled_linear", {"beta_start": 0.00085, "beta_end": 0.012}),  # Stable Diffusion's settings
        ("sigmoid", {}),
    ],
)
def test_other_schedules(name, options):
    theirs = diffusers.DDPMScheduler(beta_schedule=name, **options).betas.numpy()
    assert_close(SCHEDULES[name](), theirs, 1e-6)


def test_add_noise():
    start, noise, steps = normal(0, 4, 5, 6), normal(1, 4, 5, 6), jnp.array([0, 3, 500, 999])
    theirs = scheduler().add_noise(double(start), double(noise), torch.tensor([0, 3, 500, 999]))
    assert_close(add_noise(make_diffusion(), start, steps, noise), theirs.numpy())


def test_velocity():
    start, noise, steps = normal(0, 4, 5, 6), normal(1, 4, 5, 6), jnp.array([0, 3, 500, 999])
    theirs = scheduler().get_velocity(double(start), double(noise), torch.tensor([0, 3, 500, 999]))
    assert_close(prediction_target(make_diffusion(), "v", start, steps, noise), theirs.numpy())


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("respacing", [None, "50", "7", "ddim25"])
def test_step(feed, respacing, clip):
    """A reverse step at several timesteps equals diffusers'."""
    ours, theirs = make_diffusion(respacing=respacing), scheduler(clip)
    if respacing:
        theirs.set_timesteps(timesteps=ours.timestep_map[::-1].tolist())
    for index in (0, 1, ours.steps // 2, ours.steps - 1):
        time = int(ours.timestep_map[index])
        noised, predicted, noise = normal(index, *SHAPE), normal(index + 1, *SHAPE), normal(index + 2, *SHAPE)
        feed(noise)
        expected = theirs.step(double(predicted), time, double(noised))
        found = step_distribution(ours, predicted, noised, jnp.full(SHAPE[0], index), clip)
        sample = found.mean + (index > 0) * jnp.sqrt(found.variance)[:, None, None] * noise
        assert_close(found.start, expected.pred_original_sample.numpy())
        assert_close(sample, expected.prev_sample.numpy())
        np.testing.assert_allclose(found.log_variance, np.log(found.variance), atol=1e-6)


@pytest.mark.parametrize(("respacing", "clip"), [("8", False), ("25", True)])
def test_sampling_loop(feed, respacing, clip):
    """Each sample of the loop equals diffusers', for a prediction that depends on sample and timestep."""
    process, theirs = make_diffusion(respacing=respacing), scheduler(clip)
    theirs.set_timesteps(timesteps=process.timestep_map[::-1].tolist())
    initial, noise = normal(5, *SHAPE), normal(6, process.steps, *SHAPE)

    def predict(noised, timesteps):
        return 0.6 * noised + 0.3 * jnp.tanh(noised[:, ::-1]) + 1e-3 * timesteps[:, None, None]

    found = jax.jit(lambda x, n: sample_ancestral(process, predict, x, n, clip=clip))(initial, noise)
    sample = double(initial)
    for time, fresh, ours in zip(theirs.timesteps, noise, found, strict=True):
        feed(fresh)
        predicted = 0.6 * sample + 0.3 * torch.tanh(sample.flip(1)) + 1e-3 * time
        sample = theirs.step(predicted, time, sample).prev_sample
        assert_close(ours, sample.numpy())


@pytest.mark.parametrize("count", [8, 20])
@pytest.mark.parametrize("kind", ["ddim", "dpm"])
def test_deterministic_samplers(kind, count):
    """The last sample equals diffusers', for a prediction that depends on sample and timestep."""
    process = make_diffusion(respacing=f"ddim{count}")
    initial = normal(7, *SHAPE)
    # The weight of the best prediction for unit normal data: early steps, where float32 errors grow, change little.
    weight = np.sqrt(1.0 - make_diffusion().alphas_cumprod)
    if kind == "ddim":
        theirs = diffusers.DDIMScheduler(1000, beta_schedule="squaredcos_cap_v2", clip_sample=False)
        theirs.set_timesteps(count)
    else:
        theirs = diffusers.DPMSolverMultistepScheduler(
            1000, beta_schedule="squaredcos_cap_v2", lower_order_final=True, final_sigmas_type="zero"
        )
    theirs.alphas_cumprod = torch.tensor(make_diffusion().alphas_cumprod)

    def predict(noised, timesteps):
        return jnp.asarray(weight)[timesteps][:, None, None] * (0.9 * noised + 0.1 * jnp.tanh(noised[:, ::-1]))

    sampler = {"ddim": sample_ddim, "dpm": sample_dpm}[kind]
    found = jax.jit(lambda x: sampler(process, predict, x))(initial)
    times, sample = process.timestep_map[::-1].tolist(), double(initial)
    if kind == "dpm":
        theirs.set_timesteps(timesteps=times)
    assert theirs.timesteps.tolist() == times
    for time in times:
        predicted = weight[time] * (0.9 * sample + 0.1 * torch.tanh(sample.flip(1)))
        sample = theirs.step(predicted, time, sample).prev_sample
    assert_close(found, sample.numpy(), 1e-4)
