"""Every kind of model directory answers: imported models and runs of both stages, with and without images."""

import dataclasses

import numpy as np
import pytest

import ross_jax
from convert.foreign import QWEN2, component, import_model
from launcher import write_recipe
from ross_jax.command_line import load_recipe
from ross_jax.config import UserError
from ross_jax.inference.prompts import Request
from ross_jax.training.state import FreezeConfig
from tokenizer_fixtures import byte_level_tokenizer

pytestmark = pytest.mark.slow
IMAGE = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)


def test_runs_of_both_stages_and_kinds_answer(tmp_path):
    config = load_recipe(str(write_recipe(tmp_path)), ["--config.data.epochs=1"])
    first = FreezeConfig(("projector/.*", "denoiser/.*"))
    llava = {
        "model": dataclasses.replace(config.model, denoiser=None, autoencoder=None),
        "reconstruction": dataclasses.replace(config.reconstruction, kind="none"),
        "init_random": ("vision", "projector", "language"),
    }
    kinds = {
        "stage 1": dataclasses.replace(config, freeze=first),
        "stage 2": dataclasses.replace(config, init=(str(tmp_path / "stage 1"),), init_random=()),
        "llava": dataclasses.replace(config, **llava),
    }
    for name, kind in kinds.items():
        ross_jax.train(kind, tmp_path / name)
        model = ross_jax.load(tmp_path / name)
        assert model.context == 256, name
        requests = [Request(images, "What?", max_new_tokens=4) for images in ((), IMAGE, [IMAGE, IMAGE])]
        assert model.ask_many(requests) == [model.ask_many([request])[0] for request in requests], name
        with pytest.raises(UserError, match=r"the prompt has \d+ tokens, .* trained with at most 256;"):
            model.ask((), "What?" * 60)


def test_a_language_model_alone_answers(tmp_path):
    """It is imported without a vision encoder, and refuses images."""
    folder = component(tmp_path / "qwen2", QWEN2 | {"vocab_size": 320, "max_position_embeddings": 512})
    byte_level_tokenizer().save_pretrained(folder)
    model = ross_jax.load(import_model(tmp_path / "model", folder), template="qwen_2")
    assert model.context == 512
    requests = [Request((), question, max_new_tokens=4) for question in ("What?", "And why?")]
    assert model.ask_many(requests) == [model.ask_many([request])[0] for request in requests]
    with pytest.raises(UserError, match="it cannot see images; ask without images"):
        model.ask(IMAGE, "What?")
