"""The denoiser equals a DiT in PyTorch that this test defines from the reference's description."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parity.helpers import assert_bfloat16, assert_close, imported, numpy, randomise, torch
from ross_jax.models.denoiser import (
    Denoiser,
    DenoiserConfig,
    default_width,
    normalise_condition,
    position_table,
    timestep_embedding,
)
from ross_jax.models.ross import RossConfig, abstract_params

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity
nn, functional = torch.nn, torch.nn.functional


class Block(nn.Module):
    """A DiT block: six modulations per token, norms without parameters, both branches gated."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, condition):
        width = x.shape[-1]
        table = self.adaLN_modulation(condition)
        shift1, scale1, gate1, shift2, scale2, gate2 = (table[..., i * width : (i + 1) * width] for i in range(6))
        y = functional.layer_norm(x, (width,), eps=1e-6) * (1 + scale1) + shift1
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.attn["qkv"](y).chunk(3, dim=-1)
        )
        weights = torch.softmax(q @ k.transpose(2, 3) * q.shape[-1] ** -0.5, dim=-1)
        x = x + gate1 * self.attn["proj"]((weights @ v).transpose(1, 2).flatten(2))
        y = functional.layer_norm(x, (width,), eps=1e-6) * (1 + scale2) + shift2
        return x + gate2 * self.mlp["fc2"](functional.gelu(self.mlp["fc1"](y), approximate="tanh"))


class TorchDenoiser(nn.Module):
    """Predicts noise from latents, timestep and normalised visual outputs, all [batch, channels, rows, columns]."""

    def __init__(self, condition: int, latent: int, grid: int, width: int, depth: int, heads: int, ratio: float):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, grid**2, width))
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(latent, width, 1)})
        self.z_embedder = nn.Sequential(nn.SiLU(), nn.Linear(condition, width))
        time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.t_embedder = nn.ModuleDict({"mlp": time})
        self.blocks = nn.ModuleList(Block(width, heads, int(width * ratio)) for _ in range(depth))
        modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.final_layer = nn.ModuleDict({"adaLN_modulation": modulation, "linear": nn.Linear(width, latent)})

    def forward(self, noised, timesteps, context):
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(128, dtype=torch.float32) / 128)
        angles = timesteps[:, None].float() * frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.pos_embed.dtype)
        x = self.x_embedder["proj"](noised).flatten(2).transpose(1, 2) + self.pos_embed
        condition = self.t_embedder["mlp"](features)[:, None] + self.z_embedder(context.flatten(2).transpose(1, 2))
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.final_layer["adaLN_modulation"](condition).chunk(2, dim=-1)
        x = functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        return self.final_layer["linear"](x).transpose(1, 2).unflatten(2, noised.shape[2:])


# (condition, latent, grid, width, depth, heads, MLP ratio)
SIZES = [(40, 64, 3, 48, 3, 16, 4.0), (24, 12, 5, 32, 1, 4, 2.5), (96, 16, 2, 64, 2, 16, 1.0), (8, 4, 1, 12, 4, 3, 4.0)]


def save(module, folder) -> None:
    prefix = "model.mm_inv_projector.net."
    torch.save({prefix + key: value for key, value in module.state_dict().items()}, folder / "mm_inv_projector.bin")


def inputs(sizes):
    condition, latent, grid, *_ = sizes
    generator = torch.Generator().manual_seed(1)
    timesteps = torch.tensor([0, 1, 500, 999])
    return (
        torch.randn(4, latent, grid, grid, generator=generator),
        timesteps,
        torch.randn(4, condition, grid, grid, generator=generator),
    )


def tokens(grid: torch.Tensor) -> np.ndarray:
    return numpy(grid.flatten(2).transpose(1, 2))


@functools.partial(jax.jit, static_argnums=(0, 1))
def predict(config, dtype, params, noised, timesteps, context):
    return Denoiser(config, dtype).apply({"params": params}, noised, timesteps, context)


@pytest.mark.parametrize("sizes", SIZES)
def test_denoiser(sizes, tmp_path):
    module = randomise(TorchDenoiser(*sizes))
    save(module, tmp_path)
    config, params = imported(tmp_path, num_heads=sizes[5])
    assert config == DenoiserConfig(*sizes)
    noised, timesteps, context = inputs(sizes)
    with torch.no_grad():
        theirs = tokens(module(noised, timesteps, context))
    ours = predict(config, jnp.float32, params, tokens(noised), timesteps.int().numpy(), tokens(context))
    assert_close(ours, theirs)


def test_bfloat16(tmp_path):
    sizes = SIZES[0]
    module = randomise(TorchDenoiser(*sizes)).bfloat16()
    save(module, tmp_path)
    config, params = imported(tmp_path)
    noised, timesteps, context = (x.bfloat16() if x.is_floating_point() else x for x in inputs(sizes))
    with torch.no_grad():
        rounded = tokens(module(noised, timesteps, context))
        exact = tokens(module.float()(noised.float(), timesteps, context.float()))
    arguments = params, tokens(noised), timesteps.int().numpy(), tokens(context)
    assert_close(predict(config, jnp.float32, *arguments), exact)
    assert_bfloat16(predict(config, jnp.bfloat16, *arguments), rounded, exact)


def test_condition_norm():
    """`ln_pre` has no parameters and eps 1e-5, and maps the zeros of a row without an image to zeros."""
    states = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0)) * 0.01
    states[1] = 0.0
    ours = normalise_condition(jnp.asarray(numpy(states)))
    assert_close(ours, numpy(functional.layer_norm(states, (40,), eps=1e-5)))
    assert not np.asarray(ours[1]).any()


@pytest.mark.parametrize(("width", "grid"), [(16, 3), (48, 27), (1024, 2)])
def test_position_table(width, grid):
    theirs = diffusers.models.embeddings.get_2d_sincos_pos_embed(width, grid, base_size=grid, output_type="pt")
    assert_close(position_table(width, grid), theirs.double().numpy(), 1e-6)


@pytest.mark.parametrize("size", [2, 33, 256])
def test_timestep_embedding(size):
    timesteps = torch.tensor([0, 1, 37, 999])
    theirs = diffusers.models.embeddings.get_timestep_embedding(
        timesteps, size, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    # float32 rounds angles of up to 999 radians by 3e-5.
    assert_close(timestep_embedding(jnp.asarray(timesteps.int().numpy()), size), theirs.numpy(), 1e-4)


@pytest.mark.parametrize(("depth", "width"), [(3, 1024), (8, 1280), (12, 1536)])
def test_published_sizes(depth, width):
    """`denoiser_vitNx` of a 7B model has as many parameters as the torch module on the meta device."""
    sizes = (3584, 64, 27, width, depth, 16, 4.0)
    with torch.device("meta"):
        module = TorchDenoiser(*sizes)
    assert default_width(depth) == width
    tree = abstract_params(RossConfig(denoiser=DenoiserConfig(*sizes)))
    ours = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
    assert ours == sum(parameter.numel() for parameter in module.parameters())
