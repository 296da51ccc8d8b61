"""Questions to a model: marks need images, and an answer ends where training ended it."""

import json
import re
import shutil

import pytest
from PIL import Image

from ross_jax.config import UserError
from ross_jax.data.encoders import build_encoder, stop_id, stop_ids
from ross_jax.inference.model import load
from tokenizer_fixtures import TINY


@pytest.mark.parametrize(
    ("prompt", "marks", "images"),
    [
        ("<image>\nWhat is it?", 1, 0),
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


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("template", ["plain", "v1", "qwen_2", "llama3", "chatml"])
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


def test_plain_ends_at_a_newline_inside_a_token():
    r"""Training ends "A cat.\n" with one token for both newlines; real tokenizers join a full stop, too."""
    tokenizer = TINY["byte_level"]()
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A cat.\n"}]
    labels = build_encoder("plain", tokenizer)({"id": 0, "image": "a.png", "conversations": turns}).labels
    ends = stop_ids("plain", tokenizer)
    assert tokenizer.decode(labels[-1:]) == "\n\n" and labels[-1] in ends
    assert ends[0] == stop_id("plain", tokenizer) and all(tokenizer.decode([i]).endswith("\n") for i in ends)


@pytest.mark.parametrize("kind", ["language", "ross"])
def test_ends_of_an_imported_model(kind, model_folder, tmp_path):
    """Qwen2's generation_config.json names `<|im_end|>` and `<|endoftext|>`; an answer ends at each."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    path = folder / "files" / kind / "generation_config.json"
    path.parent.mkdir(exist_ok=True)

    def ask(ends: int | list[int] | str) -> str:
        path.write_text(json.dumps({"eos_token_id": ends}))
        return load(folder).ask((), "What?", max_new_tokens=8)

    assert ask(400) != ""  # an id that the model does not have
    assert ask(list(range(320))) == ""
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id is '</s>', expected a token's id"):
        ask("</s>")
