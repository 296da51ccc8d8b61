"""Export of components that were never imported: config.json is written from their sizes."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from convert.foreign import LLAMA, ROSS, assert_same, component, full, import_model, import_tree, state_of
from ross_jax import checkpoints
from ross_jax.config import ConfigError, UserError, to_dict
from ross_jax.convert import autoencoder, language, vision
from ross_jax.convert.exporting import export, read_config
from ross_jax.convert.importing import plan_import
from ross_jax.data.tokenizer import load_tokenizer
from ross_jax.models.autoencoder import AutoencoderConfig
from ross_jax.models.language import LanguageConfig, RopeScaling
from ross_jax.models.ross import RossConfig, abstract_params
from ross_jax.models.tiny_autoencoder import TinyAutoencoderConfig
from ross_jax.models.vision import VisionConfig
from ross_jax.tree import flatten, unflatten
from tiny_model import SIZED, write_model

QWEN = LanguageConfig(11, 8, 12, 3, 4, 2, 2, 1e6, 1e-6, qkv_bias=True)
CLIP = VisionConfig("clip", 30, 15, 24, 40, 4, 2, "quick_gelu", 1e-5, -3)
DINOV2 = VisionConfig("dinov2", 30, 15, 24, 72, 2, 2, "gelu", 1e-6, registers=2)

LAST = dataclasses.replace(SIZED.vision, select_layer=-1)


def settings_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    "config",
    [
        QWEN,
        dataclasses.replace(QWEN, qkv_bias=False, tied_head=True),
        dataclasses.replace(QWEN, qkv_bias=False, mlp_bias=True, head_dim=6),
        dataclasses.replace(QWEN, out_bias=True, rope_scaling=RopeScaling("linear", 4.0)),
        dataclasses.replace(QWEN, qkv_bias=False, qk_norm=True, head_dim=6),
        dataclasses.replace(QWEN, qkv_bias=False, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 512)),
    ],
)
def test_language_models(config):
    settings = language.language_settings(config)
    assert language.language_config(settings["model_type"], settings, "") == config
    new = {name: value for name, value in settings.items() if name not in ("rope_theta", "rope_scaling")}
    assert language.for_both(new) == settings  # transformers 5 writes `rope_parameters` alone
    for name in ("rope_parameters", "rope_scaling"):
        new.pop(name, None)
        old = {key: value for key, value in settings.items() if key != "rope_parameters"}
        assert language.language_config(settings["model_type"], old, "") == config
        assert language.for_both(old) == old


def test_no_family_has_these_biases():
    with pytest.raises(ConfigError, match=r"no language model of transformers has qkv_bias False, out_bias True"):
        language.language_settings(dataclasses.replace(QWEN, qkv_bias=False, out_bias=True))


@pytest.mark.parametrize("config", [SIZED.vision, dataclasses.replace(CLIP, select_layer=-2), DINOV2])
def test_vision_encoders(config):
    settings = vision.vision_settings(config)
    assert vision.vision_config(settings, "") == config
    whole = vision.vision_settings(dataclasses.replace(config, kind="dinov2", swiglu=True, intermediate_size=64))
    assert vision.vision_config(whole, "").intermediate_size == 64
    with pytest.raises(ConfigError, match="activation 'silu'"):
        vision.vision_settings(dataclasses.replace(config, activation="silu"))


@pytest.mark.parametrize(
    "config",
    [
        SIZED.autoencoder,
        AutoencoderConfig((2, 4), 2, 3, 2, 0.3, 0.0, (False, True), (True, False), False, True, True),
        TinyAutoencoderConfig(2, 3, (1, 2), (2, 1), 4, 0.5, 0.1),
    ],
)
def test_autoencoders(config):
    assert autoencoder.autoencoder_config(autoencoder.autoencoder_settings(config), "") == config


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model that was never imported."""
    return write_model(tmp_path_factory.mktemp("made") / "model")


def check_again(model, again) -> None:
    """Checks that a model that was exported and imported has the same config and parameters."""
    assert read_config(again) == read_config(model)
    trees = [flatten(checkpoints.restore_model(each, abstract_params(read_config(model)))) for each in (model, again)]
    assert_same(*trees)


@pytest.mark.slow
def test_a_full_checkpoint(made, tmp_path):
    """The config.json points to folders that the reference accepts, and import finds them after a move."""
    export(made, tmp_path / "out", "ross")
    settings, tokenizer = settings_of(tmp_path / "out"), load_tokenizer(made / "files" / "language")
    expected = {"model_type": "ross_qwen2", "torch_dtype": "float32", "dtype": "float32", "ross_enable": True}
    expected |= {"eos_token_id": tokenizer.eos_token_id, "mm_vision_tower": f"{tmp_path}/out/siglip_vision_tower"}
    expected |= {"mm_pixel_decoder": f"{tmp_path}/out/vae", "image_aspect_ratio": "square", "decode_image_size": 32}
    expected |= {"mm_inv_projector_type": "denoiser_vit2x", "mm_inv_num_heads": 4, "image_embed_len": 4}
    assert settings.items() >= expected.items()
    tower = state_of(tmp_path / "out" / "siglip_vision_tower")
    assert all(key.startswith("vision_model.") for key in tower)
    scope = "model.vision_tower.vision_tower."
    found = {k.removeprefix(scope): x for k, x in state_of(tmp_path / "out").items() if k.startswith(scope)}
    assert_same(found, tower)
    check_again(made, import_model(tmp_path / "again", tmp_path / "out"))
    moved = shutil.move(tmp_path / "out", tmp_path / "moved")
    check_again(made, import_model(tmp_path / "moved again", moved))
    export(tmp_path / "moved again", tmp_path / "third", "ross")
    assert_same(state_of(tmp_path / "third"), state_of(moved))
    assert settings_of(tmp_path / "third") == settings


@pytest.mark.slow
def test_folders_of_components(made, tmp_path):
    """Also in another dtype, and for CLIP and a teacher, whose selected layers only the adapters' config.json tells."""
    teacher = dataclasses.replace(DINOV2, select_layer=-1, final_norm=True)
    projector = dataclasses.replace(SIZED.projector, in_size=24)
    config = dataclasses.replace(SIZED, vision=CLIP, projector=projector, teacher=teacher, teacher_std=(0.1, 0.2, 0.3))
    model = write_model(tmp_path / "model", config)
    export(model, tmp_path / "out", "components")
    parts = [tmp_path / "out" / name for name in ("llm", "vision_tower", "vae", "adapters")]
    check_again(model, import_model(tmp_path / "again", *parts, teacher=str(tmp_path / "out" / "teacher")))
    export(made, tmp_path / "half", "components", "bfloat16", without=["language"])
    assert settings_of(tmp_path / "half" / "vision_tower")["torch_dtype"] == "bfloat16"
    assert state_of(tmp_path / "half" / "vision_tower")["vision_model.post_layernorm.weight"].dtype.name == "bfloat16"


def test_what_the_reference_cannot_have(tmp_path):
    deep = dataclasses.replace(SIZED.vision, select_layer=-3)
    scaled = dataclasses.replace(SIZED.language, rope_scaling=RopeScaling("linear", 2.0), head_dim=16)
    model = write_model(tmp_path / "model", RossConfig(vision=deep, projector=SIZED.projector, language=scaled))
    with pytest.raises(UserError) as caught:
        export(model, tmp_path / "out", "ross")
    for text in ("SigLIP's hidden state -2, this model -3", "does not scale rotary", "8 heads of 16 in width 64"):
        assert f"{text}" in str(caught.value)
    assert str(caught.value).count("use --format components") == 3


@pytest.mark.slow
def test_a_tower_whose_last_layer_is_selected(tmp_path):
    """A full checkpoint, whose readers take SigLIP's hidden state -2, gets one more layer; components do not."""
    model = write_model(tmp_path / "model", dataclasses.replace(SIZED, vision=LAST))
    export(model, tmp_path / "out", "components")
    parts = [tmp_path / "out" / name for name in ("llm", "vision_tower", "vae", "adapters")]
    check_again(model, import_model(tmp_path / "again", *parts))
    export(model, tmp_path / "ross", "ross")
    config = plan_import([str(tmp_path / "ross")]).config.vision
    assert (config.num_layers, config.select_layer) == (LAST.num_layers + 1, -2)
    assert_same(import_tree(tmp_path / "ross"), import_tree(*parts))


def with_denoiser(model, folder) -> None:
    """Makes a run's directory that started from an imported LLaVA and trained SIZED's denoiser."""
    manifest = checkpoints.read_manifest(model)
    config = read_config(model)
    denoiser = dataclasses.replace(SIZED.denoiser, condition_size=config.language.hidden_size, grid=config.vision.grid)
    more = write_model(folder.parent / "denoiser", RossConfig(denoiser=denoiser, autoencoder=SIZED.autoencoder))
    config = dataclasses.replace(config, denoiser=denoiser, autoencoder=SIZED.autoencoder)
    tree = {}
    for each in (model, more):
        tree |= checkpoints.restore_model(each, checkpoints.model_abstract(each))
    leaf = checkpoints.StreamedLeaf
    leaves = {path: leaf(x.shape, x.dtype, lambda x=x: iter([(None, x)])) for path, x in flatten(tree).items()}
    shutil.copytree(model / "files", folder / "files")
    checkpoints.save_streamed(folder / "params", unflatten(leaves))
    checkpoints.write_manifest(folder, manifest | {"config": to_dict(config), "image_mode": "pad"})


@pytest.mark.slow
def test_llava_with_a_denoiser(tmp_path):
    """The config.json of a LLaVA gets the fields and the architecture of Ross; those of LLaVA stay."""
    settings = LLAMA | {"model_type": "llava_llama", "mm_vision_tower": "towers/clip", "mm_hidden_size": 8}
    settings |= {
        "mm_projector_type": "mlp2x_gelu",
        "architectures": ["LlavaForCausalLM"],
        "tokenizer_padding_side": "left",
    }
    llava = import_model(tmp_path / "llava", full(tmp_path, settings))
    export(llava, tmp_path / "same", "ross")
    assert settings_of(tmp_path / "same") == settings
    with_denoiser(llava, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out", "ross")
    found = settings_of(tmp_path / "out")
    added = {"ross_enable": True, "use_mm_inv_proj": True, "mm_inv_hidden_size": 64, "image_embed_len": 4}
    added |= {"mm_pixel_decoder": f"{tmp_path}/out/vae", "decode_image_size": 32, "image_aspect_ratio": "pad"}
    kept = {name: value for name, value in settings.items() if name not in ("model_type", "architectures")}
    assert found.items() >= (added | kept).items()
    assert (found["model_type"], found["architectures"]) == ("ross_llama", ["RossLlamaForCausalLM"])
    assert np.allclose(found["image_mean"], read_config(llava).image_mean)
    flags = {"vision_tower": tmp_path / "towers" / "clip"}
    check_again(tmp_path / "run", import_model(tmp_path / "again", tmp_path / "out", **flags))
    assert plan_import([str(tmp_path / "out")], **flags).config.denoiser.num_heads == 4


def test_a_run_without_its_first_models_denoiser(tmp_path):
    """The config.json of a run says nothing of a denoiser that only the model it started from had."""
    checkpoint = full(tmp_path, ROSS | {"ross_enable": True, "use_mm_inv_proj": True})
    model = import_model(tmp_path / "start", checkpoint)
    config = dataclasses.replace(read_config(model), denoiser=None)
    manifest = checkpoints.read_manifest(model) | {"config": to_dict(config)}
    for name, settings in (("imported", {}), ("run", {"reconstruction": {"kind": "none"}})):
        shutil.copytree(model, tmp_path / name)
        checkpoints.write_manifest(tmp_path / name, manifest | settings)
        export(tmp_path / name, tmp_path / f"{name} exported", "ross")
    imported, run = (settings_of(tmp_path / f"{name} exported") for name in ("imported", "run"))
    assert imported["ross_enable"] and not run["ross_enable"]
    assert "use_mm_inv_proj" in imported and "use_mm_inv_proj" not in run


def test_a_tower_in_a_folder_of_another_name(tmp_path):
    """The reference takes a path with `clip` for CLIP, and with `siglip` for SigLIP; it knows no others."""
    parts = [component(tmp_path / "llm", LLAMA), component(tmp_path / "eye", vision.vision_settings(SIZED.vision))]
    model = import_model(tmp_path / "model", *parts)
    for folder, expected in {"out": f"{tmp_path}/out/siglip_vision_tower", "eclipse": "siglip_vision_tower"}.items():
        export(model, tmp_path / folder, "ross")
        assert settings_of(tmp_path / folder)["mm_vision_tower"] == expected
        assert settings_of(tmp_path / folder / "siglip_vision_tower") == settings_of(tmp_path / "eye")
        assert_same(import_tree(tmp_path / folder), import_tree(*parts))
