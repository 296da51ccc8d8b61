"""Images without text: a template's tokens before the image, the image, and nothing after it."""

import pickle

import numpy as np
import pytest

from ross_jax.data.conversation import IGNORE, IMAGE_ID, ConversationError
from ross_jax.data.encoders import build_encoder, build_image_encoder, build_training_encoder
from tokenizer_fixtures import TINY

TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A tench."}]
RECORD = {"id": "n01440764/1.JPEG", "image": "n01440764/1.JPEG"}


@pytest.mark.parametrize("compat", ["default", "official"])
@pytest.mark.parametrize("tokenizer", TINY)
@pytest.mark.parametrize("template", ["plain", "v1", "qwen_2", "llama3"])
def test_what_stands_before_an_image(template, tokenizer, compat):
    tokenizer = TINY[tokenizer]()
    whole = build_encoder(template, tokenizer, compat)({**RECORD, "conversations": TURNS}).input_ids.tolist()
    encode = pickle.loads(pickle.dumps(build_image_encoder(template, tokenizer, compat)))
    for record in (RECORD, {**RECORD, "conversations": TURNS, "label": 0}):
        found = encode(record)
        assert found.input_ids.tolist() == whole[: whole.index(IMAGE_ID) + 1]
        assert (found.labels == IGNORE).all() and len(found.labels) == len(found.input_ids)
    several = encode({**RECORD, "image": ["a", "b", "c"]}).input_ids
    assert several[-1] == IMAGE_ID and np.count_nonzero(several == IMAGE_ID) == 3


def test_conversations_are_read_only_with_a_text_loss():
    tokenizer = TINY["byte_level"]()
    record = {**RECORD, "conversations": TURNS}
    with_text, without = (build_training_encoder("v1", tokenizer, text_loss=text) for text in (True, False))
    conversation, images = build_encoder("v1", tokenizer), build_image_encoder("v1", tokenizer)
    for encode, given, expected in [
        (with_text, record, conversation(record)),
        (with_text, RECORD, images(RECORD)),
        (without, record, images(RECORD)),
    ]:
        np.testing.assert_array_equal(encode(given).input_ids, expected.input_ids)
        np.testing.assert_array_equal(encode(given).labels, expected.labels)
    text_only = {"id": 7, "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]}
    assert with_text(text_only).num_supervised
    with pytest.raises(ConversationError, match="sample 7: no image"):
        without(text_only)
