"""Exports in the layout of transformers' LLaVA, loaded and run by transformers alone."""

import numpy as np
import pytest
from PIL import Image

from convert.foreign import golden, import_model
from ross_jax import load
from ross_jax.convert.exporting import export
from ross_jax.inference.prompts import Request
from tokenizer_fixtures import byte_level_tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

QUESTIONS = ("What is it?", "How many marks are at the top of this picture?", "Why?")
LENGTH = 12


def our_ids(model, images, questions) -> list[list[int]]:
    """Greedy ids of our engine, one list for each question."""
    requests = [Request(image, text, max_new_tokens=LENGTH) for image, text in zip(images, questions, strict=True)]
    prompts = [model.prepare(request)[0] for request in requests]
    found: dict[int, list[int]] = {}

    def receive(number: int, ids, ended: bool) -> bool:
        found[number] = list(ids)
        return ended

    model.engine.run(prompts, len(prompts), receive)
    return [found[i] for i in range(len(prompts))]


def their_ids(model, processor, images, questions) -> list[list[int]]:
    """Greedy ids of transformers for one batch, padded on the left, from the chat template."""
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
        )
        for question in questions
    ]
    inputs = processor(images=list(images), text=texts, padding=True, return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=LENGTH)[:, inputs["input_ids"].shape[1] :].tolist()
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends or []
    return [row[: next((i + 1 for i, each in enumerate(row) if each in ends), LENGTH)] for row in ids]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "template"),
    [("siglip_qwen2", "qwen_2"), ("clip_vicuna", "v1")],
)
def test_transformers_answers_as_we_do(name, template, tmp_path):
    """Greedy ids of a left-padded batch and of single prompts are equal; no tensor is missing, and none left over."""
    checkpoint = golden(name, tmp_path)
    byte_level_tokenizer().save_pretrained(checkpoint)
    model = import_model(tmp_path / "model", checkpoint)
    own, lines = load(model, template=template), []
    export(model, tmp_path / "llava", "llava", template=template, progress=lines.append)
    assert not [line for line in lines if line.startswith("warning")]
    folder = str(tmp_path / "llava")
    processor = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
    theirs, loading = transformers.AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())
    arrays = np.random.default_rng(0).integers(0, 256, (3, 40, 70, 3), np.uint8)
    images = [Image.fromarray(array) for array in arrays]
    answers = our_ids(own, images, QUESTIONS)
    assert len({tuple(ids) for ids in answers}) == len(answers)
    assert their_ids(theirs, processor, images, QUESTIONS) == answers
    assert their_ids(theirs, processor, images[1:2], QUESTIONS[1:2]) == answers[1:2]
