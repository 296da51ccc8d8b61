"""The KL autoencoder equals diffusers' `AutoencoderKL`."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parity.helpers import assert_bfloat16, assert_close, channels_last, imported, randomise, torch
from ross_jax.models.autoencoder import Autoencoder, GroupNorm

diffusers = pytest.importorskip("diffusers")
safetensors = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.parity


def layout(channels: tuple[int, ...], attends: bool = False, **settings) -> dict:
    """Settings of diffusers. With `attends` the coarsest level has attention, as in LDM's KL-16."""
    down, up = ["DownEncoderBlock2D"] * len(channels), ["UpDecoderBlock2D"] * len(channels)
    if attends:
        down[-1], up[0] = "AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D"
    return {
        "block_out_channels": channels,
        "down_block_types": tuple(down),
        "up_block_types": tuple(up),
        "norm_num_groups": 4,
        **settings,
    }


FLUX = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
FLUX |= {"scaling_factor": 0.3611, "shift_factor": 0.1159}
LAYOUTS = {
    "flux": layout((8, 16, 24, 24), layers_per_block=2, **FLUX),
    "sd": layout((12, 8, 16, 16), layers_per_block=2, latent_channels=4),
    "ldm_kl16": layout((8, 8, 12, 12, 16), True, layers_per_block=2, latent_channels=16, scaling_factor=0.2325),
    "no_mid_attention": layout((8, 12), layers_per_block=1, mid_block_add_attention=False),
    "three_layers": layout((8, 16, 16), True, layers_per_block=3, latent_channels=3, use_quant_conv=False),
    "one_channel_per_group": layout((4, 8), layers_per_block=1),
    "one_level": layout((8,), layers_per_block=1, latent_channels=2, use_post_quant_conv=False),
}


def build(name: str):
    return randomise(diffusers.AutoencoderKL(**LAYOUTS[name]))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Function: name -> (torch module, folder that it was saved to)."""

    @functools.cache
    def save(name: str):
        folder, module = tmp_path_factory.mktemp(name), build(name)
        module.save_pretrained(folder)
        return module, folder

    return save


def random_images(height: int, width: int, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, (batch, height, width, 3)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(config, dtype, params, images, noise):
    """Posterior, a raw sample, its latents, and the decoded sample."""
    module, tree = Autoencoder(config, dtype), {"params": params}
    posterior = module.apply(tree, images, method="encode")
    sample = posterior.sample(noise)
    latents = module.normalise(sample)
    decoded = module.apply(tree, module.denormalise(latents), method="decode")
    return posterior.mean, posterior.logvar, sample, latents, decoded


def run_torch(module, images, noise):
    dtype, settings = module.dtype, module.config
    with torch.no_grad():
        posterior = module.encode(torch.tensor(images).movedim(-1, 1).to(dtype)).latent_dist
        sample = posterior.mean + posterior.std * torch.tensor(noise).movedim(-1, 1).to(dtype)
        latents = (sample - (settings.shift_factor or 0.0)) * settings.scaling_factor
        decoded = module.decode(sample).sample
    return [channels_last(x) for x in (posterior.mean, posterior.logvar, sample, latents, decoded)]


def compare(config, params, module, images) -> None:
    shape = (len(images), *(side // config.downsampling for side in images.shape[1:3]), config.latent_channels)
    noise = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    ours, theirs = run(config, jnp.float32, params, images, noise), run_torch(module, images, noise)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == jnp.float32
        assert_close(mine, other)


@pytest.mark.parametrize("name", LAYOUTS)
def test_encode_and_decode(saved, name):
    module, folder = saved(name)
    config, params = imported(folder)
    scale = config.downsampling
    compare(config, params, module, random_images(2 * scale, 3 * scale))


@pytest.mark.parametrize("old", [False, True])
def test_attention_keys(saved, old, tmp_path):
    """Attention keys of old diffusers, as in Stable Diffusion's published files, import like the present ones."""
    module, _ = saved("ldm_kl16")
    module.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"} if old else {}
    weights = {}
    for key, value in safetensors.load_file(path).items():
        for new, name in names.items():
            key = key.replace(f".{new}.", f".{name}.")
        weights[key] = value
    assert sum("attentions" in key and ".query." in key for key in weights) == old * 2 * 7  # weight and bias
    safetensors.save_file(weights, path)
    compare(*imported(tmp_path), module, random_images(16, 16, batch=1))


@pytest.mark.parametrize("colour", [(0.0, 0.0, 0.0), (1.0, -1.0, 0.3)])
@pytest.mark.parametrize("name", ["flux", "one_channel_per_group"])
def test_images_of_one_colour(saved, name, colour):
    """Images of one colour, as the dummy image of a text-only row, equal torch's in float64.

    A group of one channel is almost constant there, so torch's float32 norm is off by 1e-3.
    """
    module, folder = saved(name)
    images = np.broadcast_to(np.float32(colour), (1, 32, 32, 3)).copy()
    compare(*imported(folder), copy.deepcopy(module).double(), images)


def test_log_variance_is_clipped(saved, tmp_path):
    module, _ = saved("flux")
    module = copy.deepcopy(module)
    with torch.no_grad():
        module.encoder.conv_out.bias[16:24], module.encoder.conv_out.bias[24:] = 90.0, -90.0
    module.save_pretrained(tmp_path)
    config, params = imported(tmp_path)
    images = random_images(16, 16)
    noise = np.zeros((2, 2, 2, 16), np.float32)
    ours, theirs = run(config, jnp.float32, params, images, noise)[1], run_torch(module, images, noise)[1]
    assert (float(ours.min()), float(ours.max())) == (-30.0, 20.0)
    np.testing.assert_array_equal(ours, theirs)


def test_sides_must_fit(saved):
    config, params = imported(saved("flux")[1])
    with pytest.raises(ValueError, match="multiples of 8"):
        Autoencoder(config).apply({"params": params}, jnp.zeros((1, 16, 20, 3)), method="encode")


@pytest.mark.parametrize("name", ["flux", "ldm_kl16"])
def test_bfloat16(name, tmp_path):
    """With bfloat16 weights, float32 results equal torch's, and bfloat16 results are as close to float32 as torch's."""
    module = build(name).bfloat16()
    module.save_pretrained(tmp_path)
    config, params = imported(tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    side = 2 * config.downsampling
    images, noise = random_images(side, side, 4), np.zeros((4, 2, 2, config.latent_channels), np.float32)
    rounded, exact = run_torch(module, images, noise), run_torch(module.float(), images, noise)
    assert_close(run(config, jnp.float32, params, images, noise)[-1], exact[-1])
    ours = run(config, jnp.bfloat16, params, images, noise)
    for index in (0, 4):
        assert ours[index].dtype == jnp.float32
        assert_bfloat16(ours[index], rounded[index], exact[index])


def test_norm_of_bfloat16_is_float32_inside():
    """Statistics of values far from zero are computed in float32; only the result is rounded to bfloat16."""
    x = (20.0 + torch.randn(2, 12, 6, 5, generator=torch.Generator().manual_seed(0))).bfloat16()
    exact = channels_last(torch.nn.functional.group_norm(x.float(), 4, eps=1e-6))
    module = GroupNorm(4, jnp.bfloat16)
    params = {"params": {"scale": jnp.ones(12), "bias": jnp.zeros(12)}}
    found = module.apply(params, jnp.asarray(channels_last(x), jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float32), exact, rtol=2**-8, atol=1e-5)
