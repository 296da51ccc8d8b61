"""The demo's tokenizer encodes its whole data set and works with the conversation templates."""

import json

import numpy as np
import pytest

from ross_jax.data.conversation import IMAGE_ID, QWEN_2_SYSTEM
from ross_jax.data.encoders import build_encoder, build_prompt_encoder
from ross_jax.data.tokenizer import TextEncoder, load_tokenizer
from ross_jax.demo.dataset import DatasetConfig, write_dataset
from ross_jax.demo.questions import ANSWERS
from ross_jax.demo.tokenizer import MAX_SIZE, build_tokenizer, save_tokenizer, write_tokenizer

pytest.importorskip("skimage", reason="the `demo` extra is not installed")
pytest.importorskip("sklearn", reason="the `demo` extra is not installed")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    write_dataset(root / "data", DatasetConfig(pretrain=60, finetune=120, heldout_per_type=24))
    assert write_tokenizer(root / "tokenizer", root / "data")
    return root / "data", root / "tokenizer"


@pytest.fixture(scope="module")
def tokenizer(folders):
    return load_tokenizer(folders[1])


def records(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_every_text_comes_back(folders, tokenizer):
    encoder = TextEncoder(tokenizer)
    texts = [
        t["value"]
        for n in ("pretrain", "finetune", "heldout")
        for r in records(folders[0], n)
        for t in r["conversations"]
    ]
    for text in (*texts, "Hé! <|im_end|> 漢字\t\x00 hundred", QWEN_2_SYSTEM, ""):
        assert tokenizer.decode(encoder.encode(text)) == text


def test_small_and_with_the_special_tokens(tokenizer):
    assert len(tokenizer) <= MAX_SIZE
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == (
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
    )
    assert len(TextEncoder(tokenizer).encode(QWEN_2_SYSTEM)) == 1


@pytest.mark.parametrize("template", ["qwen_2", "chatml"])
def test_answers_are_supervised_word_by_word(folders, tokenizer, template):
    encode = build_encoder(template, tokenizer)
    for record in records(folders[0], "finetune"):
        encoded = encode(record)
        assert encoded.num_images == 1 and encoded.input_ids[encoded.input_ids != IMAGE_ID].min() >= 0
        supervised = tokenizer.decode(encoded.labels[encoded.labels >= 0]).split("<|im_end|>")
        answers = [turn["value"] for turn in record["conversations"][1::2]]
        assert [text.strip() for text in supervised if text.strip()] == answers


def test_words_of_answers_are_one_piece_each(folders, tokenizer):
    encoder = TextEncoder(tokenizer)
    for answers in ANSWERS.values():
        for answer in answers:
            assert len(encoder.encode(f" {answer}")) == len(answer.split())
    for record in records(folders[0], "pretrain"):
        caption = record["conversations"][1]["value"]
        assert len(encoder.encode(caption)) == len(caption.replace(".", " .").split())


def test_prompt_is_the_beginning_of_the_conversation(folders, tokenizer):
    encode, prompt = build_encoder("qwen_2", tokenizer), build_prompt_encoder("qwen_2", tokenizer)
    for record in records(folders[0], "heldout"):
        whole, start = encode(record).input_ids, prompt({**record, "conversations": record["conversations"][:1]})
        np.testing.assert_array_equal(whole[: len(start)], start)
        answer = whole[len(start) :]
        assert tokenizer.decode(answer) == f" {record['answer']}<|im_end|>"
        assert len(answer) == 1 + len(record["answer"].split())


def test_stage_1_template(folders, tokenizer):
    record = records(folders[0], "pretrain")[0]
    encoded = build_encoder("plain", tokenizer)(record)
    assert encoded.input_ids[0] == IMAGE_ID
    assert tokenizer.decode(encoded.labels[encoded.labels >= 0]) == record["conversations"][1]["value"] + "\n"


def test_written_once(folders, tmp_path):
    data, tokenizer = folders
    assert not write_tokenizer(tokenizer, data)
    write_tokenizer(tmp_path / "again", data)
    names = sorted(path.name for path in tokenizer.iterdir())
    assert {"tokenizer.json", "tokenizer_config.json"} < set(names)
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (tokenizer / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_rarest_words_give_way(tmp_path):
    words = [f"w{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(400)]
    text = " ".join(words + words[:100])
    save_tokenizer(build_tokenizer([text]), tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer) == MAX_SIZE
    encoder = TextEncoder(tokenizer)
    assert tokenizer.decode(encoder.encode(text)) == text
    assert len(encoder.encode(f" {words[50]}")) == 1 < len(encoder.encode(f" {words[399]}"))
