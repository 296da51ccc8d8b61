"""Exports in the layout of transformers' LLaVA, loaded by transformers alone."""

import numpy as np
import pytest

from convert.foreign import golden, import_model
from ross_jax import load
from ross_jax.convert.exporting import export
from ross_jax.data.conversation import V1_SYSTEM
from ross_jax.inference.prompts import Request
from tokenizer_fixtures import byte_level_tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["siglip_qwen2", "clip_vicuna"])
def test_transformers_answers_as_we_do(name, tmp_path):
    """Greedy ids of a left-padded batch are equal; the export has exactly the tensors that transformers expects."""
    checkpoint = golden(name, tmp_path)
    byte_level_tokenizer().save_pretrained(checkpoint)
    model = import_model(tmp_path / "model", checkpoint)
    own = load(model, template="v1")
    export(model, tmp_path / "llava", "llava")
    folder = str(tmp_path / "llava")
    processor = transformers.AutoProcessor.from_pretrained(folder)
    theirs, loading = transformers.AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 70, 3), np.uint8)
    questions = ["What is it?", "How many marks are at the top of this?", "Why?"]
    answers = own.ask_many([Request(*each, max_new_tokens=12) for each in zip(images, questions, strict=True)])
    system = V1_SYSTEM
    texts = [f"{system} USER: <image>\n{question} ASSISTANT:" for question in questions]
    inputs = processor(images=list(images), text=texts, padding=True, padding_side="left", return_tensors="pt")
    ids = theirs.generate(**inputs, do_sample=False, max_new_tokens=12)[:, inputs["input_ids"].shape[1] :]
    assert [processor.tokenizer.decode(each).replace("</s>", "").strip() for each in ids] == answers
