"""Tokenizers of other programs: what comes in goes out byte by byte, and answers use it."""

import json
import shutil
from pathlib import Path

import pytest

from launcher import make_records, train
from tokenizer_fixtures import byte_level_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "siglip_qwen2"


def save_as_transformers_4(folder: Path) -> Path:
    """A tokenizer's folder as transformers 4 writes it: merges and special tokens are strings."""
    byte_level_tokenizer().save_pretrained(folder)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    merges = vocabulary["model"]["merges"]
    vocabulary["model"]["merges"] = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    added = {token["id"]: {k: v for k, v in token.items() if k != "id"} for token in vocabulary["added_tokens"]}
    chat_template = folder / "chat_template.jinja"
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    special["additional_special_tokens"] = ["<|im_start|>", "<|im_end|>"]
    settings = {
        "added_tokens_decoder": added,
        "chat_template": chat_template.read_text(),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    chat_template.unlink()
    files = {"tokenizer": vocabulary, "tokenizer_config": settings | special, "special_tokens_map": special}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """The tokenizer's files in a folder."""
    names = ("tokenizer", "special_tokens", "chat_template", "added_tokens", "vocab", "merges")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name.startswith(names)}


@pytest.mark.slow
def test_a_run_exports_the_tokenizer_that_it_was_given(recipe, call, tmp_path):
    """The exported checkpoint is loaded with transformers 4, which reads no tokenizer of transformers 5."""
    tokenizer = save_as_transformers_4(tmp_path / "tokenizer")
    (tmp_path / "data.json").write_text(json.dumps(make_records(4)))
    source = {"path": str(tmp_path / "data.json"), "images": (str(recipe.parent),)}
    flags = (f"--config.data.sources=({source},)", f"--config.text.tokenizer={tokenizer}")
    done = train(recipe, tmp_path / "run", *flags)
    if done.returncode:
        pytest.fail(done.stderr[-1000:])
    status, _, said = call(
        "convert", "export", "--from", tmp_path / "run", "--format", "ross", "--output", tmp_path / "out"
    )
    if status:
        pytest.fail(said)
    assert contents(tmp_path / "out") == contents(tokenizer)


def test_an_imported_model_exports_its_tokenizer(call, tmp_path):
    """A language model is imported together with its tokenizer, and exported without training."""
    shutil.copytree(GOLDEN / "llm", tmp_path / "llm")
    save_as_transformers_4(tmp_path / "llm")
    assert call("convert", "import", "--from", tmp_path / "llm", "--output", tmp_path / "model")[0] == 0
    export = ("export", "--from", tmp_path / "model", "--format", "components", "--output", tmp_path / "out")
    assert call("convert", *export)[0] == 0
    assert contents(tmp_path / "out" / "llm") == contents(tmp_path / "llm")


def test_an_imported_checkpoint_answers(call, tmp_path):
    """A published checkpoint has its tokenizer beside the weights; it is imported and asked a question."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / "checkpoint", checkpoint)
    byte_level_tokenizer().save_pretrained(checkpoint)
    parts = ("--vision-tower", GOLDEN / "vision_tower", "--autoencoder", GOLDEN / "vae")
    status, _, said = call("convert", "import", "--from", checkpoint, *parts, "--output", tmp_path / "model")
    if status:
        pytest.fail(said)
    question = ("--template", "qwen_2", "--prompt", "hello", "--max-new-tokens", 1)
    status, _, said = call("generate", "--checkpoint", tmp_path / "model", *question)
    assert status == 0, said
