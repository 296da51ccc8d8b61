"""`compat="official"` gives the reference's ids and labels in each recorded case."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from ross_jax.config import UserError
from ross_jax.data.conversation import IGNORE, ConversationError
from ross_jax.data.encoders import build_encoder, build_prompt_encoder
from ross_jax.data.tokenizer import load_tokenizer
from tokenizer_fixtures import byte_level_tokenizer, tokenizer_folder  # noqa: F401

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenization"
BLOCKS = {name: json.loads((GOLDEN / f"{name}.json").read_text()) for name in ("v1", "qwen_2", "llama3")}
for _name, _block in json.loads((GOLDEN / "plain.json").read_text())["by_tokenizer"].items():
    BLOCKS[f"plain/{_name}"] = _block


def cases(key):
    """(block, case) of each recorded case under `key`, with readable test ids."""
    found = {name: block.get(key, []) for name, block in BLOCKS.items()}
    return [
        pytest.param(name, case, id=f"{name}-{case['id']}")
        for name, group in found.items()
        for case in (group["cases"] if isinstance(group, dict) else group)
    ]


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):  # noqa: F811
    made = {}

    def get(block, max_length):
        meta = BLOCKS[block]["meta"]
        name = meta["tokenizer"]
        if name not in made:
            made[name] = load_tokenizer(tokenizer_folder(name))
        made[name].model_max_length = max_length
        assert made[name].pad_token_id == meta["pad_token_id"]
        return made[name]

    return get


def encode(block, tokenizer, case):
    sample = {"id": case["id"], "conversations": case["conversations"]}
    if case["has_image"]:
        sample["image"] = "picture.png"
    return build_encoder(BLOCKS[block]["meta"]["template"], tokenizer, "official")(sample)


def check(encoded, case):
    assert encoded.input_ids.tolist() == case["input_ids"]
    assert encoded.labels.tolist() == case["labels"]
    assert encoded.num_supervised == case["n_supervised"]
    if case["tokenization_mismatch"]:
        assert (encoded.labels == IGNORE).all()


@pytest.mark.parametrize(("block", "case"), cases("cases"))
def test_case(tokenizer, block, case):
    used = tokenizer(block, 2048)
    if case["error"]:
        with pytest.raises(ConversationError, match=f"sample '{case['id']}'"):
            encode(block, used, case)
        return
    check(encode(block, used, case), case)


@pytest.mark.parametrize(("block", "case"), cases("truncated"))
def test_truncated_case(tokenizer, block, case):
    check(encode(block, tokenizer(block, BLOCKS[block]["truncated"]["model_max_length"]), case), case)


@pytest.mark.parametrize("block", ["v1", "qwen_2", "llama3"])
def test_generation_prompts(tokenizer, block):
    prompt = build_prompt_encoder(block, tokenizer(block, 2048), "official")
    assert BLOCKS[block]["generation_prompts"]
    for golden in BLOCKS[block]["generation_prompts"]:
        turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(golden["turns"])]
        sample = {"conversations": turns}
        if "<image>" in golden["turns"][0]:
            sample["image"] = "picture.png"
        assert prompt(sample).tolist() == golden["input_ids"]


@pytest.mark.parametrize("block", ["v1", "qwen_2", "llama3"])
def test_collated(tokenizer, block):
    """Ids and labels equal those of the reference's padded batch where its attention mask is set."""
    by_id = {case["id"]: case for case in BLOCKS[block]["cases"]}
    assert len(BLOCKS[block]["collated"]) == 2
    for golden in BLOCKS[block]["collated"]:
        length = golden["model_max_length"]
        used = tokenizer(block, length)
        for i, name in enumerate(golden["case_ids"]):
            encoded = encode(block, used, by_id[name])
            seen = np.array(golden["attention_mask"][i], bool)
            assert encoded.input_ids[:length].tolist() == np.array(golden["input_ids"][i])[seen].tolist()
            assert encoded.labels[:length].tolist() == np.array(golden["labels"][i])[seen].tolist()


# Behaviour of the reference without recorded cases, on tiny tokenizers


def official(template, *turns, image=False, **kwargs):
    sample = {"id": "s", "conversations": [{"from": role, "value": text} for role, text in turns]}
    return build_encoder(template, byte_level_tokenizer(**kwargs), "official")(
        sample | ({"image": "x"} if image else {})
    )


@pytest.mark.parametrize(("template", "keeps_labels"), [("qwen_2", False), ("v1", False), ("llama3", True)])
def test_pad_id_inside_a_text_vanishes_and_costs_the_labels(template, keeps_labels):
    pad = byte_level_tokenizer().pad_token
    without = official(template, ("human", "Hi"), ("gpt", "Yo"))
    padded = official(template, ("human", f"Hi{pad}"), ("gpt", f"Yo{pad}"))
    np.testing.assert_array_equal(padded.input_ids, without.input_ids)
    assert without.num_supervised
    np.testing.assert_array_equal(
        padded.labels, without.labels if keeps_labels else np.full_like(without.labels, IGNORE)
    )


def test_a_leading_answer_is_dropped():
    with_it = official("v1", ("gpt", "Welcome"), ("human", "Hi"), ("gpt", "Yo"))
    without = official("v1", ("human", "Hi"), ("gpt", "Yo"))
    np.testing.assert_array_equal(with_it.labels, without.labels)


def test_images_of_a_message_shrink_to_one_in_front():
    several = official("llama3", ("human", "Is <image> like <image>?"), ("gpt", "Yo"), image=True)
    one = official("llama3", ("human", "<image>\nIs  like ?"), ("gpt", "Yo"), image=True)
    assert several.num_images == 1
    np.testing.assert_array_equal(several.input_ids, one.input_ids)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([("system", "x"), ("human", "Hi"), ("gpt", "Yo")], "the reference has no system turns"),
        ([("human", "Hi"), ("human", "Hi")], "two 'human' turns in a row"),
        ([("gpt", "Yo")], "an answer without a question"),
    ],
)
def test_what_the_reference_raises_is_an_error_here(turns, message):
    with pytest.raises(ConversationError, match=message):
        official("qwen_2", *turns)


def test_v1_needs_a_marker_for_its_image():
    with pytest.raises(ConversationError, match="has an image, its text no <image>"):
        official("v1", ("human", "Hi"), ("gpt", "Yo"), image=True)


def test_templates_of_the_reference():
    with pytest.raises(UserError, match=r"template 'chatml': the reference does not have it.*compat='official' knows"):
        build_encoder("chatml", byte_level_tokenizer(), "official")
    with pytest.raises(UserError, match="the reference does not have it"):
        build_prompt_encoder("chatml", byte_level_tokenizer(), "official")


def test_encoders_can_be_pickled():
    encoder = build_encoder("v1", byte_level_tokenizer(), "official")
    sample = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(encoder))(sample).labels, encoder(sample).labels)
