"""Import and export of diffusers' `AutoencoderTiny`."""

import json

import ml_dtypes
import numpy as np
import pytest

from convert.foreign import (
    LLAMA,
    TINY,
    VAE,
    assert_says,
    component,
    component_state,
    edit_json,
    edit_tensors,
    files_of,
    full,
    import_model,
    import_tree,
    refused,
    round_trip,
    save,
    scoped,
    state_of,
)
from ross_jax import checkpoints
from ross_jax.config import UserError
from ross_jax.convert.exporting import export, read_config
from ross_jax.models.tiny_autoencoder import TinyAutoencoderConfig

STEM = "diffusion_pytorch_model"
CONFIG = TinyAutoencoderConfig(2, 3, (1, 2, 1), (2, 1, 1), 4)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_round_trip(dtype, tmp_path):
    original = component(tmp_path / "original", TINY, dtype=dtype)
    assert files_of(round_trip(tmp_path, "components", original) / "vae") == files_of(original)
    assert read_config(tmp_path / "imported").autoencoder == CONFIG
    manifest = checkpoints.read_manifest(tmp_path / "imported")
    assert json.loads(json.dumps(manifest["config"]["autoencoder"]))["kind"] == "tiny"


def test_places_of_the_layers(tmp_path):
    """Numbers of layers in diffusers' Sequential, counted by hand, include activations and upsampling."""
    original = component(tmp_path / "original", TINY)
    tree, state = import_tree(original), state_of(original)
    places = {
        "encoder/conv_in": "encoder.layers.0",
        "encoder/block_0_0/conv1": "encoder.layers.1.conv.0",
        "encoder/downsample_1": "encoder.layers.2",
        "encoder/block_1_1/conv3": "encoder.layers.4.conv.4",
        "encoder/downsample_2": "encoder.layers.5",
        "encoder/conv_out": "encoder.layers.7",
        "decoder/conv_in": "decoder.layers.0",
        "decoder/block_0_1/conv2": "decoder.layers.3.conv.2",
        "decoder/upsample_1": "decoder.layers.5",
        "decoder/block_1_0/conv1": "decoder.layers.6.conv.0",
        "decoder/upsample_2": "decoder.layers.8",
        "decoder/conv_out": "decoder.layers.10",
    }
    for path, name in places.items():
        kernel = state[f"{name}.weight"].transpose(2, 3, 1, 0)
        np.testing.assert_array_equal(tree[f"autoencoder/{path}/kernel"], kernel)
        assert (f"{name}.bias" in state) == (f"autoencoder/{path}/bias" in tree) == ("sample" not in path)


def test_defaults_are_taesd(tmp_path):
    """Missing fields get diffusers' defaults; fields that are not read may have any value."""
    settings = {"_class_name": "AutoencoderTiny", "latent_magnitude": 7, "latent_shift": None, "force_upcast": True}
    save(tmp_path / "original", component_state(settings), settings, STEM)
    model = import_model(tmp_path / "model", tmp_path / "original")
    assert read_config(model).autoencoder == TinyAutoencoderConfig(64, 64, (1, 3, 3, 3), (3, 3, 3, 1), 4)


def test_what_does_not_fit_is_all_named(tmp_path):
    original = component(tmp_path / "original", TINY)
    changes = {
        "encoder.layers.0.weight": np.zeros((2, 3, 1, 1), np.float32),
        "decoder.layers.5.bias": np.zeros(3, np.float32),
        "encoder.layers.8.pool.0.weight": np.zeros((8, 2, 1, 1), np.float32),
    }
    edit_tensors(original / f"{STEM}.safetensors", **changes)
    edit_json(original / "config.json", latent_channels=5)
    assert_says(
        refused(original),
        r"wrong shape: encoder\.layers\.0\.weight, expected \[2, 3, 3, 3\], found \[2, 3, 1, 1\]",
        r"wrong shape: encoder\.layers\.7\.bias, expected \[5\], found \[4\]",
        r"wrong shape: decoder\.layers\.0\.weight, expected \[3, 5, 3, 3\], found \[3, 4, 3, 3\]",
        r"unmapped: decoder\.layers\.5\.bias, shape \[3\]",
        r"unmapped: encoder\.layers\.8\.pool\.0\.weight",
    )


@pytest.mark.parametrize("settings, other", [(TINY, "AutoencoderKL"), (VAE, "AutoencoderTiny")])
def test_weights_of_the_other_kind(settings, other, tmp_path):
    original = component(tmp_path / "original", settings)
    replaced = {**(VAE if settings is TINY else TINY), "_class_name": other}
    (original / "config.json").write_text(json.dumps(replaced))
    assert_says(refused(original), "missing: encoder", "unmapped: encoder")


def test_both_kinds_are_one_component(tmp_path):
    tiny, kl = component(tmp_path / "tiny", TINY), component(tmp_path / "kl", VAE)
    assert_says(refused(tiny, kl), "both hold the component autoencoder; name only one")


def test_the_references_layout_has_no_place_for_it(tmp_path):
    model = import_model(tmp_path / "model", component(tmp_path / "llm", LLAMA), component(tmp_path / "vae", TINY))
    with pytest.raises(UserError, match=r"AutoencoderTiny; the reference loads only .* --format components"):
        export(model, tmp_path / "out", "ross")
    assert not (tmp_path / "out").exists()
    export(model, tmp_path / "out", "components")
    assert files_of(tmp_path / "out/vae") == files_of(tmp_path / "vae")


def test_a_full_checkpoint_that_points_to_one(tmp_path):
    """A full checkpoint with a tiny autoencoder is imported, although the reference cannot write one."""
    checkpoint = full(tmp_path)
    state = state_of(checkpoint) | scoped(component_state(TINY), "autoencoder")
    save(checkpoint, state, None)
    edit_json(checkpoint / "config.json", mm_pixel_decoder="somebody/tiny")
    vae = component(tmp_path / "vae", TINY)
    model = import_model(tmp_path / "imported", checkpoint, autoencoder_folder=vae)
    assert read_config(model).autoencoder == CONFIG
