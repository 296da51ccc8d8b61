"""The denoiser's blocks `vit` and `mlp` of the paper's ablation: transformer layers, and blocks without attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parity.helpers import assert_close, torch
from ross_jax.models.denoiser import Denoiser, DenoiserConfig, timestep_embedding

pytestmark = pytest.mark.parity
functional = torch.nn.functional
WIDTH, HEADS, DEPTH, GRID, LATENT, CONDITION = 32, 4, 2, 3, 12, 20


@pytest.fixture(params=["vit", "mlp"])
def setting(request):
    """Config, random parameters, and the arguments of a call."""
    config = DenoiserConfig(CONDITION, LATENT, GRID, WIDTH, DEPTH, HEADS, 2.0, block=request.param)
    module, rng = Denoiser(config), np.random.default_rng(0)
    spec = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in module.input_spec()]
    shapes = jax.eval_shape(module.init, jax.random.key(0), *spec)["params"]
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), shapes)
    noised, context = (jnp.asarray(rng.normal(size=(2, GRID**2, n)), jnp.float32) for n in (LATENT, CONDITION))
    return config, params, (noised, jnp.array([3, 977]), context)


def double(leaf) -> torch.Tensor:
    return torch.tensor(np.asarray(leaf, np.float64))


def linear(params, x: torch.Tensor) -> torch.Tensor:
    return x @ double(params["kernel"]) + double(params["bias"])


def entering(params, noised, timesteps, context) -> tuple[torch.Tensor, torch.Tensor]:
    """Embedded latents with positions, and the condition of each token."""
    features = double(timestep_embedding(timesteps, 256))
    time = linear(params["timestep_out"], functional.silu(linear(params["timestep_in"], features)))
    condition = time[:, None] + linear(params["condition_embedding"], functional.silu(double(context)))
    return linear(params["latent_embedding"], double(noised)) + double(params["position_embedding"]), condition


def modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return functional.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale) + shift


def plain_layers(params, x: torch.Tensor) -> torch.Tensor:
    """Applies torch's pre-norm encoder layers with our parameters."""
    blocks = params["blocks"]
    for i in range(DEPTH):
        layer = torch.nn.TransformerEncoderLayer(
            WIDTH,
            HEADS,
            2 * WIDTH,
            dropout=0.0,
            activation=lambda y: functional.gelu(y, approximate="tanh"),
            layer_norm_eps=1e-6,
            batch_first=True,
            norm_first=True,
        ).double()
        dense = {
            "self_attn.in_proj_": ("attention", "qkv"),
            "self_attn.out_proj.": ("attention", "out"),
            "linear1.": ("mlp", "up"),
            "linear2.": ("mlp", "down"),
        }
        state = {}
        for theirs, (part, ours) in dense.items():
            state[theirs + "weight"] = double(blocks[part][ours]["kernel"][i]).T
            state[theirs + "bias"] = double(blocks[part][ours]["bias"][i])
        for name in ("norm1", "norm2"):
            state[name + ".weight"] = double(blocks[name]["scale"][i])
            state[name + ".bias"] = double(blocks[name]["bias"][i])
        layer.load_state_dict(state)
        x = layer(x)
    return x


def expected(block: str, params, arguments) -> torch.Tensor:
    x, condition = entering(params, *arguments)
    if block == "vit":
        x = plain_layers(params, x + condition)
        norm = params["final_norm"]
        x = functional.layer_norm(x, (WIDTH,), double(norm["scale"]), double(norm["bias"]), 1e-6)
        return linear(params["final"], x)
    blocks = params["blocks"]
    for i in range(DEPTH):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], blocks)
        shift, scale, gate = linear(layer["modulation"], functional.silu(condition)).chunk(3, dim=-1)
        y = functional.gelu(linear(layer["mlp"]["up"], modulated(x, shift, scale)), approximate="tanh")
        x = x + gate * linear(layer["mlp"]["down"], y)
    shift, scale = linear(params["final_modulation"], functional.silu(condition)).chunk(2, dim=-1)
    return linear(params["final"], modulated(x, shift, scale))


def test_forward(setting):
    config, params, arguments = setting
    found = jax.jit(Denoiser(config).apply)({"params": params}, *arguments)
    with torch.no_grad():
        assert_close(found, expected(config.block, params, arguments).numpy())


def test_who_sees_whom(setting):
    """A token affects itself alone in blocks without attention, and all tokens in blocks with it."""
    config, params, (noised, timesteps, context) = setting
    run = jax.jit(Denoiser(config).apply)
    before = run({"params": params}, noised, timesteps, context)
    after = run({"params": params}, noised.at[:, 4].add(1.0), timesteps, context.at[:, 4].add(1.0))
    moved = np.abs(np.asarray(after - before)).max((0, 2)) > 1e-6
    assert moved.tolist() == [config.block == "vit" or token == 4 for token in range(GRID**2)]


def test_starts_by_predicting_nothing(setting):
    config, _, arguments = setting
    params = jax.jit(Denoiser(config).init)(jax.random.key(0), *arguments)
    assert not np.asarray(Denoiser(config).apply(params, *arguments)).any()
