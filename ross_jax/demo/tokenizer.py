"""The demo's tokenizer: one token per word of its data set, and one token per byte for everything else.

The system prompt and the role names of the `qwen_2` template are one token each. They are the same in every
conversation, and would otherwise take half of the tiny model's time.
"""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ross_jax.data.conversation import QWEN_2_SYSTEM
from ross_jax.demo.once import file_hash, make_once
from ross_jax.demo.questions import ANSWERS
from ross_jax.storage import location

MAX_SIZE = 512
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Padding, start of a turn and end of a turn, with Qwen's names."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATE_PIECES = (QWEN_2_SYSTEM, "USER: ", " ASSISTANT:")
"""Texts that occur in every conversation."""
_ROLES = "USER: ASSISTANT: USER:\nuser\nassistant\nsystem"
"""Role names of the `qwen_2` and `chatml` templates, with and without a space in front."""
_BYTE_SCORE, _WORD_SCORE = -10.0, -1.0


def write_tokenizer(folder: str | Path, dataset: str | Path) -> bool:
    """Writes a tokenizer for the data set in folder `dataset`, in Hugging Face's layout, unless it exists already.

    Returns:
      Whether a tokenizer was written.

    Raises:
      UserError: `folder` holds something else or cannot be written.
    """
    files = [location(dataset) / f"{name}.json" for name in ("pretrain", "finetune", "heldout")]
    settings = {"content": file_hash(*files, __file__)}

    def write(target: Path) -> None:
        texts = (turn["value"] for file in files for r in json.loads(file.read_text()) for turn in r["conversations"])
        save_tokenizer(build_tokenizer(texts), target)

    return make_once(location(folder), settings, write)


def build_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A tokenizer of at most `MAX_SIZE` entries that encodes any text, with one token per word of `texts`.

    If there are more words than entries, the rarest words are spelled in bytes.
    """
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    answers = [f" {answer}" for choices in ANSWERS.values() for answer in choices]
    counts = Counter(piece for text in (*texts, *answers, _ROLES) for piece, _ in split.pre_tokenize_str(text))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    room = MAX_SIZE - len(alphabet) - len(SPECIAL) - len(TEMPLATE_PIECES)
    words = sorted((piece for piece in counts if len(piece) > 1), key=lambda piece: (-counts[piece], piece))[:room]
    vocabulary = [(byte, _BYTE_SCORE) for byte in alphabet] + [(word, _WORD_SCORE) for word in words]
    tokenizer = Tokenizer(models.Unigram(vocabulary))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in TEMPLATE_PIECES])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json` to an existing folder. transformers 4 and 5 read them."""
    pad, start, end = SPECIAL
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": start,
        "eos_token": end,
        "pad_token": pad,
        "additional_special_tokens": list(SPECIAL),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": CHAT_TEMPLATE,
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
