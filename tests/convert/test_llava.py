"""Layouts of LLaVA and adapters: names, chat templates, tokens, cards, and the way back."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convert.foreign import GOLDEN, assert_same, golden, identical, import_model, import_tree, state_of
from older import without_digests
from ross_jax.checkpoints import read_manifest, write_manifest
from ross_jax.config import UserError
from ross_jax.convert import chat_templates, llava
from ross_jax.convert.exporting import export, read_config
from ross_jax.data.images import encoder_image_config, preprocess
from ross_jax.data.tokenizer import load_tokenizer
from tokenizer_fixtures import TINY, byte_level_tokenizer, tokenizer_folder  # noqa: F401

KEYS = json.loads(Path(__file__).with_name("vllm_llava_keys.json").read_text())
NAMES = ("siglip_qwen2", "clip_vicuna")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Name of a golden -> its model directory, with a tokenizer."""
    folder, found = tmp_path_factory.mktemp("models"), {}
    for name in NAMES:
        checkpoint = golden(name, folder)
        byte_level_tokenizer().save_pretrained(checkpoint)
        found[name] = import_model(folder / name / "model", checkpoint)
    return found


@pytest.fixture(scope="module")
def llavas(models, tmp_path_factory) -> dict[str, Path]:
    """Name of a golden -> its export to transformers' LLaVA."""
    return {name: exported(models[name], tmp_path_factory.mktemp(name), "llava", template="v1") for name in NAMES}


def exported(model: Path, folder: Path, layout: str, **options) -> Path:
    export(model, folder / layout, layout, **options)
    return folder / layout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "templates"),
    [
        ("byte_level", ("v1", "qwen_2", "plain", "chatml")),
        ("sentencepiece", ("v1", "qwen_2", "llama3", "plain")),
        ("llama2", ("v1",)),
        ("llama3", ("llama3",)),
        ("qwen2", ("qwen_2",)),
    ],
)
def test_chat_templates_repeat_training(name, templates, tmp_path, tokenizer_folder):  # noqa: F811
    """transformers' ids of several conversations are training's, for real tokenizers and tiny ones.

    The comparison notices a template that differs in one space.
    """
    if name in TINY:
        TINY[name]().save_pretrained(tmp_path / name)
    folder = tmp_path / name if name in TINY else tokenizer_folder(name)
    for template in templates:
        tokenizer, original = load_tokenizer(folder), load_tokenizer(folder)
        text = chat_templates.chat_template(template, original)
        image_id = llava.add_image_token(tokenizer)
        tokenizer.chat_template = text
        tokenizer.save_pretrained(tmp_path / template)
        assert not chat_templates.differences(template, original, tmp_path / template, image_id)
        assert chat_templates.recognise(text, lambda original=original: original) == template
    if name in TINY:
        tokenizer.chat_template = text.replace("<image>{{", "<image> {{").replace(
            "'<image>' if not", "'<image> ' if not"
        )
        tokenizer.save_pretrained(tmp_path / template)
        assert chat_templates.differences(template, original, tmp_path / template, image_id)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_those_that_vllm_loads(name, llavas):
    names = state_of(llavas[name])
    assert {re.sub(r"\.\d+\.", ".{}.", key) for key in names} == set(KEYS[name])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", ["llava", "original-llava"])
def test_exports_come_back(layout, name, models, llavas, tmp_path):
    """Parameters are equal bit for bit, and the conversation template is told by the chat template."""
    folder = llavas[name] if layout == "llava" else exported(models[name], tmp_path, layout, template="v1")
    checkpoint = models[name].parent / "checkpoint"
    towers = {} if layout == "llava" else {"vision_tower": GOLDEN / name / "vision_tower"}
    before = import_tree(
        checkpoint, vision_tower=GOLDEN / name / "vision_tower", autoencoder_folder=GOLDEN / name / "vae"
    )
    after = import_tree(folder, **towers)
    assert set(after) == {path for path in before if path.split("/")[0] in ("vision", "projector", "language")}
    assert all(identical(before[path], values) for path, values in after.items())
    settings = json.loads((folder / "config.json").read_text())
    names = {"siglip_qwen2": ["LlavaQwenForCausalLM"], "clip_vicuna": ["LlavaLlamaForCausalLM"]}
    assert settings["architectures"] == (["LlavaForConditionalGeneration"] if layout == "llava" else names[name])
    assert not [field for field in settings if field.startswith(("mm_inv", "ross", "mm_pixel"))]
    if (layout, name) == ("llava", "siglip_qwen2"):
        again = import_model(tmp_path / "again", folder)
        assert read_manifest(again)["template"] == "v1"
        assert_same(state_of(folder), state_of(exported(again, tmp_path, "llava")))


def test_the_vocabulary_grows_where_it_is_full(models, tmp_path):
    """A row for `<image>` is added to the table and the head, in both layouts; other rows keep their bits."""
    model = without_digests(shutil.copytree(models["clip_vicuna"], tmp_path / "model"))
    rows = read_manifest(model)["config"]["language"]["vocab_size"]
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(rows - len(tokenizer))])
    tokenizer.save_pretrained(model / "files" / "ross")
    for layout, prefix in (("llava", "language_model."), ("original-llava", "")):
        folder = exported(model, tmp_path, layout, template="v1")
        state = state_of(folder)
        settings = json.loads((folder / "config.json").read_text())
        assert settings["image_token_index"] == rows
        assert settings.get("text_config", settings)["vocab_size"] == rows + 1
        before = state_of(models["clip_vicuna"].parent / "checkpoint")
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            values = state[prefix + key]
            assert values.shape[0] == rows + 1
            assert identical(np.ascontiguousarray(values[:-1]), before[key])


@pytest.mark.parametrize("layout", ["adapters", "adapters-bin"])
def test_adapters_alone(layout, models, tmp_path):
    """Projector and denoiser travel alone, and fit the model again that they are from."""
    model = models["siglip_qwen2"]
    folder = exported(model, tmp_path, layout)
    suffix = "bin" if layout == "adapters-bin" else "safetensors"
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "README.md", "SHA256SUMS"),
        *(f"{stem}.{suffix}" for stem in ("mm_projector", "mm_inv_projector")),
    }
    whole = import_tree(
        model.parent / "checkpoint",
        vision_tower=GOLDEN / "siglip_qwen2" / "vision_tower",
        autoencoder_folder=GOLDEN / "siglip_qwen2" / "vae",
    )
    alone = import_tree(folder)
    assert {path.split("/")[0] for path in alone} == {"projector", "denoiser"}
    assert all(identical(whole[path], values) for path, values in alone.items())


def test_adapters_of_another_denoiser(models, tmp_path):
    """config.json tells what a denoiser predicts; the reference's files cannot, so they are refused."""
    model = shutil.copytree(models["siglip_qwen2"], tmp_path / "model")
    manifest = read_manifest(model)
    manifest["config"]["denoiser"]["prediction"] = "v"
    manifest["foreign"] = {}  # as after training from nothing
    write_manifest(model, manifest)
    with pytest.raises(UserError, match="its denoiser has prediction 'v', foreign layouts know only 'epsilon'"):
        exported(model, tmp_path, "adapters-bin")
    folder = exported(model, tmp_path, "adapters")
    again = import_model(tmp_path / "again", folder)
    assert read_manifest(again)["config"]["denoiser"]["prediction"] == "v"


@pytest.mark.parametrize("mode", ["pad", "square", "crop"])
@pytest.mark.parametrize("name", NAMES)
def test_images_equal_ours(name, mode, models, tmp_path):
    """transformers' processor makes the bits that training reads, of pictures of any shape."""
    from transformers import AutoImageProcessor

    config = read_config(models[name])
    llava.write_processor(config, mode, tmp_path)
    mean, std, vision = config.image_mean, config.image_std, config.vision
    ours = encoder_image_config(vision.kind, vision.image_size, mean, std, mode, config.image_resample)
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    for shape in ((40, 70), (71, 33), (97, 61), (30, 30), (200, 13)):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8))
        pixels = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        restored = (pixels * np.float32(std) + np.float32(mean)) * 255
        assert np.abs(restored - np.rint(restored)).max() < 0.01
        np.testing.assert_array_equal(np.rint(restored).astype(np.uint8), preprocess(image, ours, "image"))


def test_a_card_says_where_a_model_is_from(models, tmp_path):
    model = shutil.copytree(models["siglip_qwen2"], tmp_path / "model")
    (model / "results.json").write_text(json.dumps({"pope": {"title": "POPE", "metric": "f1", "score": 88.25}}))
    text = (exported(model, tmp_path, "llava", template="v1") / "README.md").read_text()
    for part in ("siglip", "checkpoint`", "| POPE (f1) | 88.25 |", "AutoModelForImageTextToText", "vllm serve"):
        assert part in text
    assert str(tmp_path) not in text


def test_what_the_layouts_cannot_hold(models, tmp_path):
    """No tokenizer, another projector, and a word `<image>` are refused; a model without a template is warned of."""
    model = without_digests(shutil.copytree(models["siglip_qwen2"], tmp_path / "model"))
    lines: list[str] = []
    exported(model, tmp_path, "llava", progress=lines.append)
    assert any("does not say its conversation template" in line for line in lines)
    word = shutil.copytree(model, tmp_path / "word")
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["<image>"])
    tokenizer.save_pretrained(word / "files" / "ross")
    with pytest.raises(UserError, match="has '<image>' as ordinary text"):
        exported(word, tmp_path / "a", "llava", template="v1")
    for path in (model / "files" / "ross").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match="has no tokenizer, and this layout needs one"):
        exported(model, tmp_path / "b", "llava", template="v1")
    assert not (tmp_path / "b").exists() or not list((tmp_path / "b").iterdir())
    with pytest.raises(UserError, match="has no vision"):
        exported(model, tmp_path / "c", "llava", without=["vision"])
