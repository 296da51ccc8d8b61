"""Answers in batches, held against the full forward pass of one prompt at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ross_jax.config import UserError
from ross_jax.data.conversation import IMAGE_ID
from ross_jax.data.encoders import build_prompt_encoder, stop_id
from ross_jax.inference.answer import answer
from ross_jax.inference.model import load_model
from ross_jax.models.ross import Ross, normalise

NEW = 5


def question(number: int, text: str, count: int) -> dict:
    value = "<image>\n" * count + text
    images = [f"{i}.png" for i in range(count)]
    return {"id": f"q{number}", "image": images, "conversations": [{"from": "human", "value": value}]}


@pytest.fixture(scope="module")
def model(model_folder):
    return load_model(model_folder)


@pytest.fixture(scope="module")
def asked():
    rng = np.random.default_rng(1)
    texts = ["What?", "Which of the two is it, and why?", "Left or right?", "How many are there?", "No picture."]
    counts = [1, 1, 2, 1, 0]
    records = [question(i, text, count) for i, (text, count) in enumerate(zip(texts, counts, strict=True))]
    return records, [[rng.integers(0, 256, (28, 28, 3), dtype=np.uint8) for _ in range(count)] for count in counts]


def one_by_one(model, record, pixels) -> str:
    """Greedy decoding without a cache, without padding: the whole sequence again for every token."""
    tokenizer = model.tokenizer()
    ids = build_prompt_encoder("qwen_2", tokenizer)(record)
    count = model.config.vision.num_tokens
    tokens, starts = [], []
    for i in ids:
        if i == IMAGE_ID:
            starts.append(len(tokens))
        tokens += [0] * count if i == IMAGE_ID else [int(i)]
    images = normalise(model.config, jnp.asarray(np.stack(pixels))[None])
    ross, new = Ross(model.config), []
    forward = jax.jit(lambda *arguments: ross.apply({"params": model.params}, *arguments).hidden[0, -1])
    for _ in range(NEW):
        row = jnp.asarray([tokens + new], jnp.int32)
        hidden = forward(row, jnp.arange(row.size)[None], jnp.ones_like(row), images, jnp.asarray([starts]))
        new.append(int(jnp.argmax(ross.apply({"params": model.params}, hidden, method="logits"))))
        if new[-1] == stop_id("qwen_2", tokenizer):
            new.pop()
            break
    return tokenizer.decode(new).strip()


@pytest.mark.slow
def test_batches_answer_as_single_prompts_do(model, asked):
    records, images = asked
    found = answer(model, records, images, NEW, rows=2)
    assert len(set(found)) > 3
    with_images = [i for i, record in enumerate(records) if record["image"]]
    assert [found[i] for i in with_images] == [one_by_one(model, records[i], images[i]) for i in with_images]
    assert answer(model, records, images, NEW, rows=5) == found


def test_bad_prompts_are_refused(model, asked):
    records, images = asked
    assert answer(model, [], []) == []
    with pytest.raises(UserError, match="q0: 1 <image> marks for 0 pictures"):
        answer(model, records[:1], [[]])
    answered = {**records[0], "conversations": [*records[0]["conversations"], {"from": "gpt", "value": "Yes."}]}
    with pytest.raises(UserError, match="must end with a human turn"):
        answer(model, [answered], images[:1])
    with pytest.raises(UserError, match="does not say its conversation template"):
        answer(dataclasses.replace(model, template=None), records, images)
