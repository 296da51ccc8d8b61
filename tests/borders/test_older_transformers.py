"""Exported checkpoints mean the same to the libraries of the reference, and come back as they were."""

import dataclasses
import json
import os
import shutil
import string
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from borders.test_tokenizer_files import contents, save_as_transformers_4
from configs import demo
from launcher import REPOSITORY
from ross_jax import checkpoints, export_model, import_model, load
from ross_jax.config import UserError, to_dict
from ross_jax.convert.autoencoder import autoencoder_settings
from ross_jax.convert.exporting import read_config
from ross_jax.data.tokenizer import fingerprint, load_tokenizer
from ross_jax.demo.tokenizer import build_tokenizer, save_tokenizer
from ross_jax.models.language import LanguageModel
from ross_jax.models.projector import ProjectorConfig
from ross_jax.models.ross import abstract_params
from ross_jax.models.vision import VisionEncoder
from ross_jax.tree import flatten, unflatten
from tiny import CONFIG
from tiny_model import write_model
from tokenizer_fixtures import sentencepiece_tokenizer

GOLDEN = REPOSITORY / "tests" / "golden"
TEXT = "The cat's  3 kittens:\n\n• naïve café 中文 <image> A</s>USER: Who?<|im_end|>\n"
PYTHON = REPOSITORY / ".venv-transformers4" / "bin" / "python"


@pytest.fixture(scope="module")
def old_python() -> Path:
    """Python of the old libraries."""
    if not PYTHON.is_file():
        pytest.skip("needs transformers 4.43: bash launch/setup.sh --env transformers4")
    return PYTHON


def trained(model: Path, folder: Path, **changes) -> Path:
    """A run's directory that started from an imported model and changed all its parameters a little."""
    rng, manifest = np.random.default_rng(0), checkpoints.read_manifest(model)
    config = dataclasses.replace(read_config(model), **changes)
    tree = flatten(checkpoints.restore_model(model, checkpoints.model_abstract(model)))
    new = {path: x for path, x in flatten(abstract_params(config)).items() if path not in tree}
    tree = {p: x + rng.normal(0, 0.02, x.shape).astype(np.float32) for p, x in tree.items()}
    tree |= {p: rng.normal(0, 0.1, x.shape).astype(np.float32) for p, x in new.items()}
    leaf = checkpoints.StreamedLeaf
    leaves = {path: leaf(x.shape, x.dtype, lambda x=x: iter([(None, x)])) for path, x in tree.items()}
    for name in ("files", "unused"):
        shutil.copytree(model / name, folder / name)
    checkpoints.save_streamed(folder / "params", unflatten(leaves))
    settings = {"config": to_dict(config), "template": "qwen_2", "image_mode": "pad"}
    settings["tokenizer"] = fingerprint(load_tokenizer(folder / "files" / ("ross" if not changes else "language")))
    checkpoints.write_manifest(folder, manifest | settings)
    return folder


def make_demo(folder: Path) -> Path:
    """The demo's model and tokenizer. Nothing of them was imported."""
    (folder / "autoencoder").mkdir()
    (folder / "autoencoder" / "config.json").write_text(json.dumps(autoencoder_settings(CONFIG.autoencoder)))
    model = write_model(folder / "demo", demo.model_config(folder / "autoencoder"))
    manifest = checkpoints.read_manifest(model)
    shutil.rmtree(model / "files" / "language")
    (model / "files" / "language").mkdir()
    save_tokenizer(build_tokenizer(["How many red marks are there? It's a cat."]), model / "files" / "language")
    checkpoints.write_manifest(model, manifest)
    return model


def make_golden(folder: Path, name: str) -> Path:
    source, parts = folder / f"{name} checkpoint", {}
    shutil.copytree(GOLDEN / name / "checkpoint", source)
    if name == "siglip_qwen2":
        save_as_transformers_4(source)
    else:
        save_sentencepiece(source)
    parts = {"vision_tower": GOLDEN / name / "vision_tower", "autoencoder": GOLDEN / name / "vae"}
    return trained(import_model(str(source), folder / f"{name} imported", **parts), folder / name)


def make_llava(folder: Path) -> Path:
    """A LLaVA that a run made of an imported language model and vision tower."""
    shutil.copytree(GOLDEN / "siglip_qwen2" / "llm", folder / "llm")
    save_as_transformers_4(folder / "llm")
    sources = [str(folder / "llm"), str(GOLDEN / "siglip_qwen2" / "vision_tower")]
    model = import_model(sources, folder / "llava imported")
    return trained(model, folder / "llava", projector=ProjectorConfig("mlp", 40, 72, 2))


def save_sentencepiece(folder: Path) -> None:
    """Writes a sentencepiece tokenizer in the format of transformers 4."""
    tokenizer = sentencepiece_tokenizer(string.ascii_letters[:27] + string.digits)  # the golden embeds 320 ids
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    settings |= {
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def ours(model: Path, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """What `transformers4.py` computes."""
    config = read_config(model)
    shapes = abstract_params(config)
    params = checkpoints.restore_model(model, {name: shapes[name] for name in ("vision", "language")})
    ids = jnp.arange(3, 40)[None]
    positions, segments = jnp.arange(ids.shape[1])[None], jnp.ones_like(ids)

    def logits(module: LanguageModel):
        output = module(module.embed(ids), positions, segments)
        return module.logits(output.hidden)

    apply = jax.jit(lambda p: LanguageModel(config.language).apply({"params": p}, method=logits))
    features = jax.jit(lambda p, x: VisionEncoder(config.vision).apply({"params": p}, x))
    encoded = np.array(load_model_tokenizer(model)(TEXT).input_ids)
    found = {"slow_ids": encoded, "fast_ids": encoded, "logits": apply(params["language"])}
    return found | {"features": features(params["vision"], pixels)}


def load_model_tokenizer(model: Path):
    return load(model, ("language",)).tokenizer


@pytest.mark.slow
def test_exports_are_read_by_transformers_4(old_python, tmp_path, monkeypatch):
    """transformers 4.43 finds all keys, and gives the model's ids, logits and features."""
    models = [make_demo(tmp_path), make_golden(tmp_path, "siglip_qwen2"), make_golden(tmp_path, "clip_vicuna")]
    models.append(make_llava(tmp_path))
    with pytest.raises(UserError, match=r"has prediction 'v', .* leave it out with --without denoiser"):
        export_model(models[0], tmp_path / "refused", layout="ross")
    folders = [tmp_path / f"{model.name} exported" for model in models]
    for model, folder in zip(models, folders, strict=True):
        export_model(model, folder, layout="ross", without=["denoiser"] if model is models[0] else [])
    monkeypatch.chdir(GOLDEN)  # towers of the goldens are named relative to it
    script = Path(__file__).parent / "transformers4.py"
    command = [str(old_python), str(script), str(tmp_path / "theirs.npz"), TEXT, *map(str, folders)]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "newly initialized" not in done.stderr
    theirs = np.load(tmp_path / "theirs.npz")
    for i, (model, folder) in enumerate(zip(models, folders, strict=True)):
        size = read_config(model).vision.image_size
        pixels = np.sin(np.arange(3.0 * size * size, dtype=np.float32)).reshape(1, 3, size, size)
        for name, expected in ours(model, pixels.transpose(0, 2, 3, 1)).items():
            found = theirs[f"{i}/{name}"]
            assert found.shape == expected.shape, (model.name, name)
            np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), err_msg=f"{model} {name}")
        flags = {}
        if model.name == "siglip_qwen2" or model.name == "clip_vicuna":
            flags = {"vision_tower": GOLDEN / model.name / "vision_tower", "autoencoder": GOLDEN / model.name / "vae"}
        again = import_model(str(folder), tmp_path / f"{model.name} again", **flags)
        check_again(model, again)


def check_again(model: Path, again: Path) -> None:
    """The exported and imported model has the same parameters and tokenizer, and gives the same answer."""
    config = dataclasses.replace(read_config(model), denoiser=read_config(again).denoiser)
    assert read_config(again) == config
    trees = [flatten(checkpoints.restore_model(each, abstract_params(config))) for each in (model, again)]
    for path, leaf in trees[0].items():
        np.testing.assert_array_equal(trees[1][path], leaf, err_msg=path)
    pixels, answers = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8), []
    for each in (model, again):
        loaded = load(each, template="qwen_2")
        answers.append(loaded.ask([pixels], "How many?", max_new_tokens=4))
        assert fingerprint(loaded.tokenizer) == fingerprint(load_model_tokenizer(model))
    assert answers[0] == answers[1]
    found = [contents(find) for find in (model / "files" / "language", model / "files" / "ross") if find.is_dir()]
    assert contents(again / "files" / "ross") == next(files for files in found if files)
