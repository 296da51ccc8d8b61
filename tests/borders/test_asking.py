"""Questions to a model: marks need images, and an answer ends where training ended it."""

import re

import pytest
from PIL import Image

from ross_jax.data.encoders import build_encoder, stop_id
from tokenizer_fixtures import TINY


@pytest.mark.parametrize(
    ("prompt", "marks", "images"),
    [
        pytest.param(
            "<image>\nWhat is it?",
            1,
            0,
            marks=[
                pytest.mark.xfail(strict=True, raises=AssertionError, reason="a mark without any image is text"),
                pytest.mark.slow,  # as long as it generates an answer
            ],
        ),
        ("<image><image>\nWhat differs?", 2, 1),
        ("<image>\nWhat is it?", 1, 2),
    ],
)
def test_marks_and_images_of_a_prompt_differ(prompt, marks, images, model_folder, call, tmp_path):
    """A prompt from a script has image marks, and the command names another number of images."""
    Image.new("RGB", (28, 28), "red").save(tmp_path / "a.png")
    files = ["--image", tmp_path / "a.png"] * images
    question = ("--prompt", prompt, "--max-new-tokens", 1)
    status, answer, said = call("generate", "--checkpoint", model_folder, *files, *question)
    assert status == 1 and not answer
    assert said.startswith("error: ") and "<image>" in said
    for count in (marks, images):
        assert re.search(rf"\b{count or '(0|no)'}\b", said), said


WAITS = pytest.mark.xfail(
    strict=True, raises=AssertionError, reason="generation waits for a token that was never trained"
)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(
    "template",
    [pytest.param("plain", marks=WAITS), "v1", "qwen_2", "llama3", pytest.param("chatml", marks=WAITS)],
)
def test_generation_ends_where_training_ended_an_answer(template, name):
    """A user asks a model that was trained with this template; an answer should end before the limit."""
    tokenizer = TINY[name]()
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a cat"}]
    labels = build_encoder(template, tokenizer)({"id": 0, "image": "a.png", "conversations": turns}).labels
    assert stop_id(template, tokenizer) == labels[labels >= 0][-1]


def test_chatml_with_the_end_that_its_template_writes():
    """The tokenizer of a chat model names `<|im_end|>` as its end-of-sequence token."""
    tokenizer = TINY["byte_level"]()
    tokenizer.eos_token = "<|im_end|>"
    assert stop_id("chatml", tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
