"""Unsupported settings of foreign checkpoints: one error names the file, each field, and what is expected."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.foreign import ABSENT, CLIP, DINOV2, LLAMA, TINY, VAE, assert_says, component, edit_json, refused, save
from ross_jax.convert.importing import load, plan_import

# config.json.


def check_config(file: Path, changes: dict[str, Any], patterns: list[str], origin: Path, **flags: Any) -> None:
    edit_json(file, **changes)
    message = refused(origin, **flags)
    assert_says(message, re.escape(str(file)), *patterns)
    assert "Error" not in message  # no exception's name


SIZE = "expected a whole number from 1 to"


@pytest.mark.parametrize(
    "changes, patterns",
    [
        ({"hidden_size": ABSENT}, [f"hidden_size is missing, {SIZE}"]),
        (
            dict.fromkeys(
                ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
            ),
            [
                rf"{name} is missing, {SIZE}"
                for name in (
                    "hidden_size",
                    "intermediate_size",
                    "num_hidden_layers",
                    "num_attention_heads",
                    "vocab_size",
                )
            ],
        ),
        ({"hidden_size": "8"}, [f"hidden_size is '8', {SIZE}"]),
        ({"hidden_size": [8]}, [rf"hidden_size is \[8\], {SIZE}"]),
        ({"hidden_size": 8.0}, [f"hidden_size is 8.0, {SIZE}"]),
        ({"hidden_size": True}, [f"hidden_size is True, {SIZE}"]),
        ({"hidden_size": {}}, [f"hidden_size is {{}}, {SIZE}"]),
        ({"hidden_size": 0}, [f"hidden_size is 0, {SIZE}"]),
        ({"num_attention_heads": -2}, [f"num_attention_heads is -2, {SIZE}"]),
        ({"num_hidden_layers": 10**9}, [f"num_hidden_layers is 1000000000, {SIZE} 1000"]),
        ({"vocab_size": 10**30}, [f"vocab_size is 1000000000000000000000000000000, {SIZE}"]),
        ({"num_key_value_heads": "all"}, ["num_key_value_heads is 'all'"]),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, ["num_heads 3 is not a multiple of num_kv_heads 2"]),
        ({"head_dim": 3}, ["head_dim 3 is odd"]),
        ({"rms_norm_eps": "1e-6"}, ["rms_norm_eps is '1e-6', expected a number above 0"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps is nan, expected a number above 0"]),
        ({"rope_theta": 0}, ["rope_theta is 0, expected a number above 0"]),
        ({"tie_word_embeddings": "false"}, ["tie_word_embeddings is 'false', expected true or false"]),
        ({"attention_bias": 1}, ["attention_bias is 1, expected true or false"]),
        ({"hidden_act": "gelu"}, ["hidden_act 'gelu' is not supported; expected 'silu'"]),
        ({"hidden_act": ["silu"]}, [r"hidden_act \['silu'\] is not supported"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor 0.5 is not supported; expected 1"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config {'bits': 4} is not supported; .* unquantized"]),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, ["rope_scaling.type 'yarn' is not supported; .* llama3"]),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ["rope_scaling.rope_type 'dynamic' is not supp"]),
        ({"rope_scaling": {"type": "linear"}}, ["rope_scaling.factor is missing, expected a number above 0"]),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, ["rope_scaling.factor is '2', expected a number"]),
        (
            {"rope_scaling": {"type": "default", "mrope_section": [1]}},
            [r"rope_scaling.mrope_section \[1\] is not supp"],
        ),
        ({"rope_scaling": "linear"}, ["rope_scaling is 'linear', expected an object"]),
        ({"rope_parameters": {"rope_type": "longrope"}}, ["rope_parameters.rope_type 'longrope' is not supported"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types .* 'full_attention' in every layer"]),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1},
            ["sliding_window None is not supp"],
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
            ["sliding_window 7 is not supported; expected full attention"],
        ),
        (
            {
                "hidden_act": "relu",
                "vocab_size": None,
                "rope_scaling": {"type": "yarn"},
                "quantization_config": {"x": 1},
            },
            ["hidden_act 'relu'", "vocab_size is missing", "rope_scaling.type 'yarn'", "quantization_config"],
        ),
    ],
)
def test_language_settings(changes, patterns, tmp_path):
    original = save(tmp_path / "llm", {"x": np.zeros(1, np.float32)}, LLAMA)
    check_config(original / "config.json", changes, patterns, original)


def test_windows_that_no_layer_uses_are_fine(tmp_path):
    """Window settings without effect are accepted, as in Qwen2-7B's config.json."""
    settings = LLAMA | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3}
    for more in ({}, {"max_window_layers": 0, "use_sliding_window": False}, {"layer_types": ["full_attention"] * 3}):
        original = component(tmp_path / str(len(more)), settings | more)
        assert load(plan_import([str(original)]))


@pytest.mark.parametrize(
    "changes, patterns",
    [
        ({"image_size": [9, 9]}, [rf"image_size is \[9, 9\], {SIZE}"]),
        ({"patch_size": 0}, [f"patch_size is 0, {SIZE}"]),
        ({"patch_size": 10}, ["image_size 9 is smaller than patch_size 10"]),
        ({"num_attention_heads": None}, [f"num_attention_heads is missing, {SIZE}"]),
        ({"num_attention_heads": 3}, ["hidden_size 8 is not a multiple of num_heads 3"]),
        ({"hidden_act": "relu"}, ["hidden_act 'relu' is not supported; expected one of gelu_pytorch_tanh, quick_gelu"]),
        ({"hidden_act": {}}, ["hidden_act is {}, expected a string"]),
        ({"layer_norm_eps": []}, [r"layer_norm_eps is \[\], expected a number above 0"]),
        ({"num_channels": 4}, ["num_channels 4 is not supported; expected 3"]),
        ({"model_type": "clip", "vision_config": 5}, ["vision_config is 5, expected an object"]),
        (
            {"model_type": "siglip", "vision_config": {"patch_size": "4", "num_channels": 1}},
            ["vision_config.patch_size is '4'", "vision_config.num_channels 1 is not supported"],
        ),
    ],
)
def test_vision_settings(changes, patterns, tmp_path):
    original = save(tmp_path / "clip", {"x": np.zeros(1, np.float32)}, CLIP)
    check_config(original / "config.json", changes, patterns, original)


@pytest.mark.parametrize(
    "changes, patterns",
    [
        ({"qkv_bias": False}, ["qkv_bias False is not supported; expected True"]),
        ({"mlp_ratio": 2.5}, [r"mlp_ratio is 2\.5, expected a whole number from 1 to 64"]),
        ({"mlp_ratio": 10**30}, ["mlp_ratio is 1000000000000000000000000000000, expected a whole number"]),
        ({"use_swiglu_ffn": "yes"}, ["use_swiglu_ffn is 'yes', expected true or false"]),
        ({"image_size": [11, 11]}, [rf"image_size is \[11, 11\], {SIZE}"]),
        (
            {"model_type": "dinov2_with_registers", "num_register_tokens": -1},
            [f"num_register_tokens is -1, {SIZE} 1024"],
        ),
    ],
)
def test_dinov2_settings(changes, patterns, tmp_path):
    original = save(tmp_path / "dinov2", {"x": np.zeros(1, np.float32)}, DINOV2)
    check_config(original / "config.json", changes, patterns, original)


@pytest.mark.parametrize(
    "changes, patterns",
    [
        (
            {"_class_name": "VQModel"},
            ["_class_name 'VQModel' is not supported; expected 'AutoencoderKL' or 'AutoencoderTiny'"],
        ),
        ({"_class_name": ["AutoencoderKL"]}, ["_class_name .* is not supported"]),
        ({"act_fn": "relu"}, ["act_fn 'relu' is not supported; expected 'silu'"]),
        ({"in_channels": 4, "out_channels": 1}, ["in_channels 4 is not supported; expected 3", "out_channels 1"]),
        ({"latents_mean": [1.0]}, [r"latents_mean \[1.0\] is not supported; expected null"]),
        (
            {"down_block_types": ["X", "DownEncoderBlock2D"]},
            ["down_block_types .* expected DownEncoderBlock2D or Attn"],
        ),
        ({"up_block_types": "UpDecoderBlock2D"}, ["up_block_types is 'UpDecoderBlock2D', expected a list"]),
        ({"up_block_types": [["UpDecoderBlock2D"]]}, ["up_block_types is .*expected a list of at most 10 strings"]),
        ({"up_block_types": ["UpDecoderBlock2D"]}, [r"up_attention must have one value per level \(2\)"]),
        ({"block_out_channels": []}, [r"block_out_channels is \[\], expected a list of 1 to 10 whole numbers"]),
        ({"block_out_channels": [2, "4"]}, ["block_out_channels is .*expected a list"]),
        ({"block_out_channels": [2] * 11}, ["block_out_channels is .*expected a list"]),
        ({"norm_num_groups": 3}, ["2 channels do not divide into 3 groups"]),
        ({"norm_num_groups": 0}, [f"norm_num_groups is 0, {SIZE}"]),
        ({"layers_per_block": 10**6}, [f"layers_per_block is 1000000, {SIZE} 16"]),
        ({"scaling_factor": 0}, ["scaling_factor is 0, expected a number above 0"]),
        ({"shift_factor": "0"}, ["shift_factor is '0', expected a number"]),
        ({"use_quant_conv": "no"}, ["use_quant_conv is 'no', expected true or false"]),
    ],
)
def test_autoencoder_settings(changes, patterns, tmp_path):
    original = save(tmp_path / "vae", {"x": np.zeros(1, np.float32)}, VAE, "diffusion_pytorch_model")
    check_config(original / "config.json", changes, patterns, original)


@pytest.mark.parametrize(
    "changes, patterns",
    [
        ({"act_fn": "silu"}, ["act_fn 'silu' is not supported; expected 'relu'"]),
        ({"upsample_fn": "bilinear"}, ["upsample_fn 'bilinear' is not supported; expected 'nearest'"]),
        ({"upsampling_scaling_factor": 4}, ["upsampling_scaling_factor 4 is not supported; expected 2"]),
        ({"in_channels": 4, "out_channels": 1}, ["in_channels 4 is not supported; expected 3", "out_channels 1"]),
        ({"use_midblock_gn": True}, ["use_midblock_gn True is not supported; expected null"]),
        (
            {"encoder_block_out_channels": [2, 2, 4], "decoder_block_out_channels": [3, 4, 3]},
            [r"encoder_block_out_channels \[2, 2, 4\] .*expected the same", "decoder_block_out_channels .* the same"],
        ),
        ({"decoder_block_out_channels": 3}, ["decoder_block_out_channels is 3, expected a list of 1 to 10 whole"]),
        ({"num_encoder_blocks": [1, 2]}, [r"num_encoder_blocks \[1, 2\] .* one number for each of the 3 levels"]),
        ({"num_encoder_blocks": [1, 0, 1]}, [r"num_encoder_blocks is \[1, 0, 1\], expected a list"]),
        ({"num_decoder_blocks": [1, 17, 1]}, ["num_decoder_blocks .* at most 16 blocks per level"]),
        (
            {"num_encoder_blocks": [1, 1], "encoder_block_out_channels": [2, 2]},
            ["encoder_blocks has 2 levels, decoder_blocks 3"],
        ),
        ({"latent_channels": 0}, [f"latent_channels is 0, {SIZE}"]),
        ({"scaling_factor": -1}, ["scaling_factor is -1, expected a number above 0"]),
        ({"shift_factor": [0]}, [r"shift_factor is \[0\], expected a number"]),
    ],
)
def test_tiny_autoencoder_settings(changes, patterns, tmp_path):
    original = save(tmp_path / "vae", {"x": np.zeros(1, np.float32)}, TINY, "diffusion_pytorch_model")
    check_config(original / "config.json", changes, patterns, original)


@pytest.mark.parametrize(
    "changes, patterns",
    [
        ({"mm_use_im_start_end": True}, ["mm_use_im_start_end True is not supported; expected False"]),
        ({"mm_patch_merge_type": "spatial"}, ["mm_patch_merge_type 'spatial' is not supported; expected 'flat'"]),
        ({"mm_vision_select_feature": "cls_patch"}, ["mm_vision_select_feature 'cls_patch' .* expected 'patch'"]),
        ({"image_aspect_ratio": "anyres"}, ["image_aspect_ratio 'anyres' .* expected 'pad' or 'square' or 'crop'"]),
        ({"mm_projector_type": "resampler"}, ["'resampler' is not supported; expected linear, mlpNx_gelu or identity"]),
        ({"mm_projector_type": 3}, ["mm_projector_type is 3, expected a string"]),
        ({"mm_projector_type": "mlp0x_gelu"}, ["mm_projector_type 'mlp0x_gelu': depth 0 must be at least 1"]),
        ({"mm_vision_select_layer": "-2"}, ["mm_vision_select_layer is '-2', expected a whole number"]),
        ({"mm_vision_select_layer": 4}, ["mm_vision_select_layer 4 does not exist in 3 layers"]),
        ({"image_embed_len": 5}, ["image_embed_len 5 is not supported; expected 4"]),
        ({"decode_image_size": 33}, ["decode_image_size 33 is not supported; expected 32"]),
        ({"image_mean": 0.5}, ["image_mean is 0.5, expected a list of 3 numbers"]),
        ({"image_mean": [0, 0], "image_std": ["a", 1, 1]}, ["image_mean is", "image_std is .*a list of 3 numbers"]),
        ({"mm_hidden_size": []}, [rf"mm_hidden_size is \[\], {SIZE}"]),
        ({"mm_vision_tower": "/home/alice/clip"}, ["mm_vision_tower is '/home/alice/clip'.*pass --vision-tower DIR"]),
        ({"mm_vision_tower": 7}, ["mm_vision_tower is 7, .*pass --vision-tower DIR"]),
        ({"mm_vision_tower": None}, ["mm_vision_tower is None, .*pass --vision-tower DIR"]),
        ({"model_type": ["ross_llama"]}, [r"model_type is \['ross_llama'\], expected a string"]),
        ({"model_type": "ross_lama"}, [r"'ross_lama' is not supported \(did you mean 'ross_llama'\?\)"]),
        ({"model_type": "mistral"}, ["model_type 'mistral' is not supported.*expected one of .*'qwen2'"]),
        ({"model_type": None}, ["model_type is None, expected a string"]),
        (
            {"hidden_act": "gelu", "image_aspect_ratio": "anyres", "mm_use_im_start_end": True, "mm_vision_tower": "x"},
            [
                r": 3 problem\(s\)",
                "hidden_act 'gelu'",
                "image_aspect_ratio 'anyres'",
                "mm_use_im_start_end",
                "--vision-tower",
            ],
        ),
    ],
)
def test_settings_of_a_full_checkpoint(changes, patterns, copy):
    check_config(copy / "config.json", changes, patterns, copy)


def test_a_checkpoint_that_only_calls_itself_llava(copy):
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | {"model_type": "llava", "text_config": {}}))
    message = refused(copy)
    assert_says(message, r"model\.safetensors: model\.norm\.weight belongs to no component of LLaVA")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"{}", b'"x"', b"[" * 50_000])
def test_config_that_is_no_object(content, copy):
    (copy / "config.json").write_bytes(content)
    assert_says(refused(copy), rf"{copy}/config\.json: (not valid JSON|expected a JSON object|missing or empty)")


def test_settings_of_the_tower_that_is_pointed_to(copy):
    tower = copy.parents[1] / "towers/clip/config.json"
    check_config(tower, {"hidden_act": "relu"}, ["hidden_act 'relu'"], copy)
    edit_json(tower, model_type="vit")
    assert_says(
        refused(copy), rf"{tower}: model_type 'vit' is no vision tower; expected one of \['siglip_vision_model'"
    )
    tower.write_text("[]")
    assert_says(refused(copy), f"{tower}: expected a JSON object, found list")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ('{"image_mean": [1, 2]}', r"image_mean is \[1, 2\], expected a list of 3 numbers"),
        ('{"do_rescale": false}', "do_rescale False is not supported"),
        ('{"do_normalize": false}', "do_normalize False is not supported"),
        ('{"rescale_factor": 0.00784}', "rescale_factor 0.00784 is not supported; expected 0.0039215686"),
    ],
)
def test_processor_of_the_tower(copy, settings, message):
    processor = copy.parents[1] / "towers/clip/preprocessor_config.json"
    processor.write_text(settings)
    assert_says(refused(copy), f"{processor}: {message}")
