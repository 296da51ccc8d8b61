"""Tokenizers for tests: real ones of the goldens, and two tiny ones that need no files.

Tests import the fixture `tokenizer_folder`.
"""

import lzma
import os
import shutil
import string
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
TOKENIZERS = Path(os.environ.get("ROSS_TOKENIZERS") or ROOT.parent / "shared" / "tokenizers")

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = (
    "<unk>",
    "<s>",
    "</s>",
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)


def require_tokenizer(name: str) -> Path:
    """The folder of a real tokenizer with compressed files. Skips the test if it is absent; fails in CI."""
    folder = TOKENIZERS / name
    if not folder.is_dir():
        reason = f"no tokenizer {folder}; set ROSS_TOKENIZERS to the folder of llama2, llama3 and qwen2"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """Function: name -> folder of a real tokenizer, decompressed once."""
    unpacked: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in unpacked:
            source = require_tokenizer(name)
            target = tmp_path_factory.mktemp("tokenizers") / name
            target.mkdir()
            for file in source.iterdir():
                if file.suffix == ".xz":
                    (target / file.stem).write_bytes(lzma.decompress(file.read_bytes()))
                else:
                    shutil.copyfile(file, target / file.name)
            unpacked[name] = target
        return unpacked[name]

    return get


def byte_level_tokenizer(**kwargs) -> PreTrainedTokenizerFast:
    """A tokenizer like Qwen's and Llama 3's: bytes with a few merges, and the special tokens of all templates."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "A"), ("a", "n"), ("Ċ", "Ċ"), (".", "Ċ"), ("|", ">")]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return _finish(backend, "</s>", **kwargs)


def sentencepiece_tokenizer(characters: str = string.printable[:94], **kwargs) -> PreTrainedTokenizerFast:
    """A tokenizer like Llama 2's: spaces as `▁`, a dummy prefix, unknown characters as bytes, a start token.

    Args:
      characters: those that have ids of their own; `A`, `a` and `n` among them.
    """
    merges = [("▁", "A"), ("▁", "a"), ("a", "n"), ("▁", "▁"), ("▁a", "n")]
    tokens = [*SPECIAL[:3], *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *characters]
    vocabulary = {token: i for i, token in enumerate([*tokens, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = _finish(backend, "</s>", **kwargs)
    start = tokenizer.convert_tokens_to_ids("<s>")
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", start)])
    return tokenizer


def _finish(backend: Tokenizer, stop: str, **kwargs) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token=stop,
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        **kwargs,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.chat_template = CHATML
    return tokenizer


TINY = {"byte_level": byte_level_tokenizer, "sentencepiece": sentencepiece_tokenizer}
