"""The default conversation encoder: no text can break its masks, with tiny and real tokenizers."""

import itertools
import json
import pickle
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ross_jax.config import UserError
from ross_jax.data.conversation import (
    IGNORE,
    IMAGE_ID,
    ConversationError,
    parse_conversation,
)
from ross_jax.data.encoders import build_encoder, build_prompt_encoder
from ross_jax.data.tokenizer import TextEncoder, load_tokenizer
from ross_jax.data.turns import ROLES
from tokenizer_fixtures import CHATML, TINY, byte_level_tokenizer, tokenizer_folder  # noqa: F401

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenization"
REAL = {"v1": "llama2", "qwen_2": "qwen2", "llama3": "llama3", "chatml": "qwen2", "plain": "llama2"}
DIALOGUES = ("v1", "qwen_2", "llama3", "chatml")


def record(*turns, images=0, sample="s"):
    """A record of texts, in which the human begins, or of (role, text) pairs."""
    pairs = [(("human", "gpt")[i % 2], turn) if isinstance(turn, str) else turn for i, turn in enumerate(turns)]
    result = {"id": sample, "conversations": [{"from": role, "value": text} for role, text in pairs]}
    return result | {"image": [f"{i}.jpg" for i in range(images)]} if images else result


def decode(tokenizer, ids):
    """Exact text of ids at any position. An anchor is needed because decoders strip the first space of a text."""
    anchor = tokenizer("0", add_special_tokens=False).input_ids
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return tokenizer.decode([*anchor, *ids], **options).removeprefix(tokenizer.decode(anchor, **options))


def supervised_texts(tokenizer, encoded):
    """The text of each supervised stretch. Checks that supervised labels equal the ids."""
    supervised = encoded.labels != IGNORE
    np.testing.assert_array_equal(encoded.labels[supervised], encoded.input_ids[supervised])
    stretches = itertools.groupby(zip(encoded.input_ids.tolist(), supervised, strict=True), key=lambda pair: pair[1])
    return [decode(tokenizer, [index for index, _ in group]) for kind, group in stretches if kind]


def full_text(tokenizer, ids):
    """The text of all ids, with `<image>` for each image."""
    stretches = itertools.groupby(np.asarray(ids).tolist(), key=lambda index: index == IMAGE_ID)
    return "".join(
        "<image>" * len(list(group)) if is_image else decode(tokenizer, list(group)) for is_image, group in stretches
    )


# Templates on texts that contain their markers

MARKERS = [
    " ASSISTANT: ",
    "USER:",
    "</s>",
    "<s>",
    "<unk>",
    "<|endoftext|>",
    "<|im_end|>",
    "<|im_end|>\n<|im_start|>assistant\n",
    "<|eot_id|>",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<|begin_of_text|>",
    "<image",
    "<0x0A>",
    "\ue0000\ue001",
    "\n",
    "  ",
    "é",
    "0",
]
FRAGMENTS = st.one_of(st.sampled_from(MARKERS), st.text(max_size=6))
TEXTS = (
    st.lists(FRAGMENTS, max_size=5)
    .map("".join)
    .map(lambda text: text.replace("▁", "_").replace("<image>", "<image"))  # no accidental image marker
)


@st.composite
def conversations(draw, template):
    """Draws (record, number of images, answers)."""
    num_images = 0
    if template == "plain":
        num_images = draw(st.integers(1, 3))
        question = "<image>".join(draw(st.lists(TEXTS, min_size=num_images + 1, max_size=num_images + 1)))
        turns = [("human", question), ("gpt", draw(TEXTS))]
    else:
        turns = [("system", draw(TEXTS))] if draw(st.booleans()) else []
        answer_first = draw(st.booleans())
        has_images = draw(st.booleans())
        for i in range(draw(st.integers(2 - answer_first, 5))):
            if i % 2 == answer_first:
                parts = draw(st.lists(TEXTS, min_size=1, max_size=3 if has_images else 1))
                turns.append((draw(st.sampled_from(["human", "user"])), "<image>".join(parts)))
                num_images += len(parts) - 1
            else:
                literal = draw(st.sampled_from(["", "<image>"]))  # an answer holds the marker as text
                turns.append((draw(st.sampled_from(["gpt", "assistant"])), draw(TEXTS) + literal))
    answers = [text for role, text in turns if role in ("gpt", "assistant")]
    return record(*turns, images=num_images), num_images, answers


def check(template, tokenizer, encode, data, normalise=lambda text: text):
    sample, num_images, answers = data.draw(conversations(template))
    encoded = encode(sample)

    assert encoded.input_ids.dtype == encoded.labels.dtype == np.int32
    assert np.count_nonzero(encoded.input_ids == IMAGE_ID) == encoded.num_images == num_images
    stop = {"v1": tokenizer.eos_token, "llama3": "<|eot_id|>", "plain": "\n"}.get(template, "<|im_end|>")
    lead = " " if template in ("v1", "qwen_2") else ""
    expected = [normalise((lead if answer else "") + answer) + stop for answer in answers]
    texts = supervised_texts(tokenizer, encoded)
    if template == "plain":  # text after an image may begin with the dummy prefix
        assert [text.removeprefix(" ") for text in texts] == [text.removeprefix(" ") for text in expected]
    else:
        assert texts == expected

    # No text becomes a special token: special tokens are the same as around harmless texts.
    special = [i for name, i in TextEncoder(tokenizer).special.items() if name != tokenizer.unk_token]
    harmless = [dict(turn) for turn in sample["conversations"]]
    for turn in harmless:
        cuts = turn["value"].split("<image>") if ROLES[turn["from"]] == "user" and num_images else [turn["value"]]
        turn["value"] = "<image>".join("x" for _ in cuts) if len(cuts) > 1 else "x"
    plain = encode(sample | {"conversations": harmless})
    np.testing.assert_array_equal(
        encoded.input_ids[np.isin(encoded.input_ids, special)], plain.input_ids[np.isin(plain.input_ids, special)]
    )


@pytest.mark.parametrize("tiny", TINY)
@pytest.mark.parametrize("template", [*DIALOGUES, "plain"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_supervised_ids_are_exactly_the_answers_with_their_stop_tokens(template, tiny, data):
    tokenizer, encode = tiny_encoder(template, tiny)
    check(template, tokenizer, encode, data)


_TINY_ENCODERS = {}


def tiny_encoder(template, tiny):
    if (template, tiny) not in _TINY_ENCODERS:
        tokenizer = TINY[tiny]()
        _TINY_ENCODERS[template, tiny] = tokenizer, build_encoder(template, tokenizer)
    return _TINY_ENCODERS[template, tiny]


@pytest.fixture(scope="session")
def real_encoder(tokenizer_folder):  # noqa: F811
    made = {}

    def get(template):
        if template not in made:
            tokenizer = load_tokenizer(tokenizer_folder(REAL[template]))
            tokenizer.chat_template = CHATML
            made[template] = tokenizer, build_encoder(template, tokenizer)
        return made[template]

    return get


@pytest.mark.parametrize("template", [*DIALOGUES, "plain"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_same_with_the_real_tokenizers(real_encoder, template, data):
    tokenizer, encode = real_encoder(template)
    is_qwen = REAL[template] == "qwen2"
    check(template, tokenizer, encode, data, (lambda s: unicodedata.normalize("NFC", s)) if is_qwen else (lambda s: s))


@pytest.mark.parametrize("template", ["v1", "qwen_2", "llama3"])
def test_default_equals_the_reference_where_it_loses_nothing(real_encoder, template):
    """Ordinary records have the reference's ids, which released weights were trained on; stop tokens are supervised."""
    _, encode = real_encoder(template)
    broken = {"role_strings_in_question"}  # the reference loses all labels
    if template != "llama3":
        broken.add("empty_answer_in_middle")  # the reference joins it to the next question
    for case in json.loads((GOLDEN / f"{template}.json").read_text())["cases"]:
        images = int(case["has_image"])
        encoded = encode({"id": case["id"], "conversations": case["conversations"], "image": ["x.jpg"] * images})
        if case["id"] in broken:
            assert encoded.num_supervised > case["n_supervised"]
            continue
        ids, labels = case["input_ids"], list(case["labels"])
        if template == "qwen_2":
            labels[-1] = ids[-1]  # the reference does not supervise the stop token
            if case["id"] == "leading_and_trailing_spaces":
                labels[58] = ids[58]  # nor a space before a tab
        assert encoded.input_ids.tolist() == ids, case["id"]
        assert encoded.labels.tolist() == labels, case["id"]


# Rendered templates

SYSTEM = (
    "A chat between a curious {} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {}'s questions."
)


@pytest.mark.parametrize(
    ("template", "expected", "answers"),
    [
        (
            "v1",
            SYSTEM.format("user", "user")
            + " USER: <image>\nWhat? ASSISTANT: A dog.</s>USER: Sure? ASSISTANT:</s>USER: More ASSISTANT:",
            [" A dog.</s>", "</s>"],
        ),
        (
            "qwen_2",
            SYSTEM.format("human", "human")
            + " USER: <image>\nWhat? ASSISTANT: A dog.<|im_end|>USER: Sure? ASSISTANT:<|im_end|>USER: More ASSISTANT:",
            [" A dog.<|im_end|>", "<|im_end|>"],
        ),
        (
            "llama3",
            "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nA dog.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nMore<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            ["A dog.<|eot_id|>", "<|eot_id|>"],
        ),
        (
            "chatml",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\nA dog.<|im_end|>\n"
            "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
            "<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n",
            ["A dog.<|im_end|>", "<|im_end|>"],
        ),
    ],
)
def test_layout(template, expected, answers):
    tokenizer, encode = tiny_encoder(template, "byte_level")
    sample = record("What?\n<image>", "A dog.", "Sure?", "", "More", images=1)
    encoded = encode(sample)
    assert full_text(tokenizer, encoded.input_ids) == expected
    assert supervised_texts(tokenizer, encoded) == answers
    # A conversation that ends with a question is rendered as the prompt for the answer.
    prompt = build_prompt_encoder(template, tokenizer)(sample)
    assert prompt.dtype == np.int32
    np.testing.assert_array_equal(prompt, encoded.input_ids)


@pytest.mark.parametrize("tiny", TINY)
@pytest.mark.parametrize("template", [*DIALOGUES, "plain"])
def test_a_generation_prompt_is_what_precedes_the_answer(template, tiny):
    tokenizer, encode = tiny_encoder(template, tiny)
    prompt = build_prompt_encoder(template, tokenizer)
    asked = prompt(record("<image>\nWhat?", images=1))
    answered = encode(record("<image>\nWhat?", " \nan A.", images=1))
    first = int(np.argmax(answered.labels != IGNORE))
    np.testing.assert_array_equal(asked, answered.input_ids[:first])
    with pytest.raises(ConversationError, match="must end with a human turn"):
        prompt(record("<image>", "an answer", images=1))


def test_plain_keeps_only_the_images_and_the_caption():
    tokenizer, encode = tiny_encoder("plain", "sentencepiece")
    encoded = encode(record("Describe <image> and <image>.", "an A.", images=2))
    assert encoded.input_ids[:3].tolist() == [tokenizer.bos_token_id, IMAGE_ID, IMAGE_ID]
    assert encoded.labels[:3].tolist() == [IGNORE] * 3
    assert tokenizer.decode(encoded.labels[3:]) == "an A.\n"


def test_a_system_turn_replaces_the_system_prompt():
    for template, expected in {
        "v1": "Be terse. USER: Hi ASSISTANT: Yo</s>",
        "llama3": "<|start_header_id|>system<|end_header_id|>\n\nBe terse.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYo<|eot_id|>",
        "chatml": "<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nYo<|im_end|>\n",
    }.items():
        tokenizer, encode = tiny_encoder(template, "byte_level")
        encoded = encode(record(("system", "Be terse."), ("human", "Hi"), ("gpt", "Yo")))
        assert full_text(tokenizer, encoded.input_ids) == expected
    assert supervised_texts(tokenizer, encoded) == ["Yo<|im_end|>"]


@pytest.mark.parametrize("field", ["system", "system_prompt"])
@pytest.mark.parametrize("template", ["v1", "qwen_2", "llama3", "chatml"])
def test_a_system_prompt_beside_the_turns_is_a_system_turn(template, field):
    _, encode = tiny_encoder(template, "byte_level")
    turn = encode(record(("system", "Be terse."), ("human", "Hi"), ("gpt", "Yo")))
    beside = encode(record("Hi", "Yo") | {field: "Be terse."})
    np.testing.assert_array_equal(beside.input_ids, turn.input_ids)
    np.testing.assert_array_equal(beside.labels, turn.labels)
    none = encode(record("Hi", "Yo") | {field: ""})
    np.testing.assert_array_equal(none.input_ids, encode(record("Hi", "Yo")).input_ids)


def test_a_leading_answer_is_supervised_too():
    tokenizer, encode = tiny_encoder("v1", "byte_level")
    encoded = encode(record(("gpt", "Hello"), ("human", "Hi"), ("gpt", "Yo")))
    assert supervised_texts(tokenizer, encoded) == [" Hello</s>", " Yo</s>"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<image>", ("", "")),
        ("<image>\nWhat?", ("", "\nWhat?")),
        ("What?\n<image>", ("", "\nWhat?")),
        ("  <image>  What?  ", ("", "\nWhat?")),
        ("Is <image> a cat?", ("Is ", " a cat?")),
        ("<image>\n<image>\nSame?", ("", "\n", "\nSame?")),
        ("Which, <image> or <image>?", ("Which, ", " or ", "?")),
        (" no picture ", (" no picture ",)),
    ],
)
def test_where_images_stand(text, expected):
    conversation = parse_conversation(record(text, "a", images=text.count("<image>")))
    assert conversation.turns[0].texts == expected
    assert conversation.num_images == text.count("<image>")


def test_image_marker_is_text_where_no_image_is():
    tokenizer, encode = tiny_encoder("v1", "byte_level")
    encoded = encode(record("What does <image> do in SVG?", "<image> embeds one."))
    assert encoded.num_images == 0
    assert supervised_texts(tokenizer, encoded) == [" <image> embeds one.</s>"]


def test_encoders_can_be_pickled():
    """Encoders survive pickling, which sends them to the pipeline's worker processes."""
    for template in ("v1", "chatml"):
        _, encode = tiny_encoder(template, "sentencepiece")
        sample = record("<image>", "a", images=1)
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(encode))(sample).labels, encode(sample).labels)


# Errors

GOOD = {"from": "human", "value": "Hi"}
ANSWER = {"from": "gpt", "value": "Yo"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({}, r"sample without an id: no 'conversations'"),
        ({"id": None}, r"sample without an id: no 'conversations'"),
        ({"id": 7}, r"sample 7: no 'conversations'; it has \['id'\]"),
        ({"id": 7, "conversation": []}, r"no 'conversations' \(did you mean 'conversation'\?\)"),
        ({"id": 7, "conversations": []}, r"sample 7: 'conversations' must be a list of at least one turn, found \[\]"),
        ({"id": 7, "conversations": "Hi"}, r"must be a list of at least one turn, found 'Hi'"),
        ({"id": 7, "conversations": [GOOD, "Yo"]}, r"sample 7, conversations\[1\]: expected an object with 'from'"),
        ({"id": 7, "conversations": [{"value": "x"}]}, r"conversations\[0\]: no 'from'; it has \['value'\]"),
        ({"id": 7, "conversations": [GOOD, {"from": "gpt"}]}, r"conversations\[1\]: no 'value'; it has \['from'\]"),
        ({"id": 7, "conversations": [{"from": "human", "value": 3}]}, r"'value' must be a string, found 3 \(int\)"),
        ({"id": 7, "conversations": [{"from": None, "value": "x"}]}, r"'from' must be a string, found None"),
        (
            {"id": 7, "conversations": [{"from": "hunam", "value": "x"}]},
            r"'hunam' is no role \(did you mean 'human'\?\)",
        ),
        ({"id": 7, "conversations": [GOOD, GOOD]}, r"conversations\[1\]: two 'human' turns in a row"),
        (
            {"id": 7, "conversations": [GOOD, {"from": "system", "value": "x"}]},
            r"conversations\[1\]: a system turn can only be the first",
        ),
        ({"id": 7, "conversations": [{"from": "human", "value": "\ud83d"}]}, r"conversations\[0\]: .*lone surrogate"),
        (
            {"id": 7, "conversations": [GOOD, ANSWER], "image": "a.jpg"},
            r"sample 7: the record names 1 image.*0 <image> marker",
        ),
        (
            {"id": 7, "conversations": [{"from": "human", "value": "<image><image>"}, ANSWER], "image": ["a.jpg"]},
            r"names 1 image.*have 2 <image> marker",
        ),
        ({"id": 7, "conversations": [GOOD, ANSWER], "system": ["x"]}, r"sample 7: the system prompt must be a string"),
        ({"id": 7, "conversations": [GOOD, ANSWER], "system": "\ud83d"}, r"sample 7, system prompt: .*lone surrogate"),
        (
            {"id": 7, "conversations": [{"from": "system", "value": "x"}, GOOD, ANSWER], "system": "y"},
            r"sample 7: has a system turn and a field for it",
        ),
        ({"messages": [{"role": "user"}]}, r"sample without an id, messages\[0\]: no 'content'; it has \['role'\]"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, r"messages\[0\]: a part of type 'video'"),
        ({"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}, r"an image in a turn of the assistant"),
        ({"texts": [{"user": "Hi", "assistant": None}]}, r"texts\[0\]: 'assistant' must be a string, found None"),
        ({"texts": [{"question": "Hi"}]}, r"texts\[0\]: no 'user'; it has \['question'\]"),
        ({"instruction": "Hi", "output": "Yo"}, r"expected 'conversations': \[\{'from': 'human'"),
        ({"id": 7, "conversations": [GOOD]}, r"sample 7: no answer, so nothing to learn from"),
    ],
)
def test_broken_records(bad, message):
    _, encode = tiny_encoder("v1", "byte_level")
    with pytest.raises(ConversationError, match=message):
        encode(bad)


@pytest.mark.parametrize("image", [None, "", []])
def test_no_image(image):
    assert parse_conversation({"conversations": [GOOD, ANSWER], "image": image}).num_images == 0


@pytest.mark.parametrize("turns", [("<image>", "a", "b"), (("system", "x"), ("human", "<image>"), ("gpt", "a"))])
def test_plain_takes_one_question_and_one_caption(turns):
    _, encode = tiny_encoder("plain", "byte_level")
    with pytest.raises(ConversationError, match="one human turn and one answer"):
        encode(record(*turns, images=1))
    with pytest.raises(ConversationError, match="needs an image"):
        encode(record("Describe.", "a"))


def test_template_that_the_tokenizer_does_not_fit():
    tokenizer = byte_level_tokenizer()
    with pytest.raises(UserError, match=r"template 'vicuna': no such template"):
        build_encoder("vicuna", tokenizer)
    with pytest.raises(UserError, match=r"compat 'offical': no such mode \(did you mean 'official'\?\)"):
        build_encoder("v1", tokenizer, "offical")


def test_template_without_its_stop_token(tokenizer_folder):  # noqa: F811
    llama2 = load_tokenizer(tokenizer_folder("llama2"))
    with pytest.raises(UserError, match=r"template 'qwen_2' needs a special token '<\|im_end\|>'"):
        build_encoder("qwen_2", llama2)
    with pytest.raises(UserError, match="needs a tokenizer with a chat template"):
        build_encoder("chatml", llama2)
    llama3 = load_tokenizer(tokenizer_folder("llama3"))  # Llama 3's own template always opens an answer
    with pytest.raises(UserError, match="not prefix-stable"):
        build_encoder("chatml", llama3)


# Chat templates

THINKING = (  # like reasoning models: only the last answer gets an empty thought
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (THINKING, "prefix-stable"),
        (CHATML.replace("{% if add_generation_prompt %}", "{% if true %}"), "not prefix-stable"),
        (CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"), "generation prompt"),
        (CHATML.replace("message['content'] }}", "message['content'] | upper }}"), "changes the text of this turn"),
        ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}", "generation prompt"),
        (
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}",
            "without a special token",
        ),
        ("{{ raise_exception('never') }}", "refuses this conversation: never"),
        (None, "needs a tokenizer with a chat template"),
    ],
)
def test_chat_templates_that_are_refused(template, message):
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=message) as caught:
        build_encoder("chatml", tokenizer)
    assert "template 'chatml'" in str(caught.value)


def test_a_chat_template_may_strip_the_texts():
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = CHATML.replace("message['content'] }}", "message['content'] | trim }}")
    encoded = build_encoder("chatml", tokenizer)(record(" Hi ", "  Yo \n"))
    assert supervised_texts(tokenizer, encoded) == ["Yo<|im_end|>"]


def test_a_chat_template_that_refuses_one_conversation():
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    )
    encode = build_encoder("chatml", tokenizer)
    assert encode(record("Hi", "Yo")).num_supervised
    with pytest.raises(ConversationError, match=r"sample 's', turn 0: the chat template refuses .* no system"):
        encode(record(("system", "x"), ("human", "Hi"), ("gpt", "Yo")))


def test_a_chat_template_whose_frame_depends_on_the_text():
    tokenizer = byte_level_tokenizer()
    frame = "message['role'] }}{{ '?' if '?' in message['content'] else '.' }}"
    tokenizer.chat_template = CHATML.replace("message['role'] }}", frame).replace("assistant\n", "assistant.\n")
    encode = build_encoder("chatml", tokenizer)
    assert encode(record("Hi", "Yo")).num_supervised
    with pytest.raises(ConversationError, match=r"sample 's', turn 0: the chat template is not prefix-stable"):
        encode(record("Hi?", "Yo"))


def test_a_chat_template_brings_its_own_start_token():
    tokenizer, encode = tiny_encoder("chatml", "sentencepiece")  # a tokenizer that adds <s> to texts
    assert full_text(tokenizer, encode(record("Hi", "Yo")).input_ids).startswith("<|im_start|>system\nYou")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text("an A.|>x é", min_size=1, max_size=8), min_size=2, max_size=6))
def test_chatml_equals_apply_chat_template(texts):
    """Text without special tokens gets the ids of `apply_chat_template`, if no merge crosses an answer's border."""
    tokenizer, encode = tiny_encoder("chatml", "byte_level")
    texts = texts[: len(texts) // 2 * 2]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert encode(record(*texts)).input_ids.tolist() == expected
