"""The built-in ChatML templates give the ids and labels that transformers renders."""

import numpy as np
import pytest

from ross_jax.data.conversation import IGNORE, IMAGE_ID
from ross_jax.data.encoders import build_encoder, build_prompt_encoder, stop_id
from ross_jax.data.tokenizer import load_tokenizer
from tokenizer_fixtures import tokenizer_folder  # noqa: F401

# Qwen2.5's messages, and Qwen3's without thoughts. transformers marks what stands between the generation tags.
RENDERED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if loop.last and message['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
)
SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
DIALOGUES = {
    "one turn": ["What is 2+2?", "4"],
    "several turns": ["Hi!\n\nWho are you?", "A model.\n", " And  your name? ", "Ross — 罗斯 🙂", "Thanks", ""],
    "markers in the text": ["Say assistant\n", "<think>no</think> user\nassistant"],
}


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3"])
@pytest.mark.parametrize("texts", DIALOGUES.values(), ids=DIALOGUES)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_ids_and_labels_are_those_of_transformers(template, texts, system, tokenizer_folder):  # noqa: F811
    tokenizer = load_tokenizer(str(tokenizer_folder("qwen2")))
    roles = [("human", "gpt")[i % 2] for i in range(len(texts))]
    record = {"id": 1, "conversations": [dict(zip(("from", "value"), pair)) for pair in zip(roles, texts)]}  # noqa: B905
    record |= {"system": system} if system else {}
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    prompt = system or (SYSTEM if template == "qwen2_5" else None)
    messages = [*([{"role": "system", "content": prompt}] if prompt else []), *messages]
    options = {"chat_template": RENDERED, "return_dict": True}
    expected = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, **options)
    ids, mask = np.array(expected["input_ids"]), np.array(expected["assistant_masks"], bool)
    found = build_encoder(template, tokenizer)(record)
    np.testing.assert_array_equal(found.input_ids, ids)
    np.testing.assert_array_equal(found.labels, np.where(mask, ids, IGNORE))
    asked = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **options)["input_ids"]
    question = record | {"conversations": record["conversations"][:-1]}
    np.testing.assert_array_equal(build_prompt_encoder(template, tokenizer)(question), asked)


def test_images_and_the_tokenizers_own_template(tokenizer_folder):  # noqa: F811
    """An image stands in the first message. The tokenizer's template, not prefix-stable as Qwen3's, is not asked."""
    tokenizer = load_tokenizer(str(tokenizer_folder("qwen2")))
    tokenizer.chat_template = THINKING
    turns = [{"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "A dog."}]
    found = build_encoder("qwen3", tokenizer)({"id": 1, "image": "a.jpg", "conversations": turns})
    before, after = np.split(found.input_ids, np.flatnonzero(found.input_ids == IMAGE_ID))
    assert tokenizer.decode(before) == "<|im_start|>user\n"
    text = "\nWhat?<|im_end|>\n<|im_start|>assistant\nA dog.<|im_end|>\n"
    assert tokenizer.decode(after[1:]) == text and "<think>" not in text
    assert stop_id("qwen3", tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
