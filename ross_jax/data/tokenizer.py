"""Tokenizers: loading one offline, and encoding text so that it stays text.

`load_tokenizer` reads a folder in the Hugging Face layout and gives the ids of the reference, which used the slow
tokenizers of transformers 4.43. Tests compare the ids of three families:

* Llama 2 and Vicuna: `legacy` in `tokenizer_config.json` must be false, as in Vicuna 1.5, or absent. True would put a
  space piece after every special token. A folder with only `tokenizer.model`, as Vicuna's, is read with the
  `sentencepiece` package. Transformers 5 then orders merges by id instead of score, which gives other ids where several
  spaces meet, so `load_tokenizer` orders them again.
* Qwen2 and Llama 3 need no setting.

Slow and fast tokenizers differ in one case: a text that begins with a space, at the start of a sequence or right after
an image. The slow Llama 2 tokenizer puts its dummy prefix before that space, and the fast one does not.
`conversation_official` adds it.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ross_jax.config import UserError, nearest

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def load_tokenizer(name: str | Path, max_length: int | None = None) -> Any:
    """Loads a transformers tokenizer from a local folder, or by a hub id if no folder has that name.

    A folder is read without network access. A tokenizer without a padding token gets the one that the reference
    chooses: the unknown token, else Llama 3's `<|end_of_text|>`, else the end-of-sequence token.

    Args:
      name: a folder with `tokenizer.json` (or another vocabulary file) and `tokenizer_config.json`; or a hub id.
      max_length: new `model_max_length`. Only `compat="official"` reads it, and cuts text-only conversations there.

    Raises:
      UserError: the folder does not exist, holds no vocabulary, or holds files that transformers cannot read.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        _check_vocabulary(folder)
    elif folder.exists():
        raise UserError(f"tokenizer {name}: this is a file; give the folder that holds it")
    elif isinstance(name, Path) or not _HUB_ID.fullmatch(name):
        raise UserError(f"tokenizer {name}: there is no such folder")
    from transformers import AutoTokenizer  # takes seconds to import

    try:
        if folder.is_dir():
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        else:
            tokenizer = AutoTokenizer.from_pretrained(str(name))
    except Exception as error:  # transformers and its Rust backend raise many types, some of them plain Exception
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if folder.is_dir():
            raise UserError(f"tokenizer {name}: transformers cannot read this folder: {reason}") from error
        raise UserError(
            f"tokenizer {name}: there is no such folder, and the hub does not give it either ({reason}); "
            "give the path of a downloaded tokenizer"
        ) from error
    if folder.is_dir() and not (folder / "tokenizer.json").exists() and (folder / "tokenizer.model").exists():
        _order_merges(tokenizer, folder / "tokenizer.model")
    if max_length is not None:
        tokenizer.model_max_length = max_length
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        candidates = (tokenizer.unk_token, "<|end_of_text|>", tokenizer.eos_token)
        tokenizer.pad_token = next((token for token in candidates if token in vocabulary), None)
    return tokenizer


def _check_vocabulary(folder: Path) -> None:
    # Without this check, transformers builds an empty tokenizer from a folder that has only a tokenizer_config.json.
    names = {path.name for path in folder.iterdir()}
    if names.intersection(VOCABULARY_FILES) or any(name.endswith(".tiktoken") for name in names):
        return
    packed = sorted(name for name in names if Path(name).stem in VOCABULARY_FILES)
    if packed:
        raise UserError(f"tokenizer {folder}: {', '.join(packed)} must be decompressed first")
    raise UserError(f"tokenizer {folder}: the folder holds no vocabulary (none of {', '.join(VOCABULARY_FILES)})")


def _order_merges(tokenizer: Any, model_file: Path) -> None:
    """Orders the merges of a converted SentencePiece model by score, as Hugging Face's `tokenizer.json` has them."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model["type"] != "BPE" or not model["byte_fallback"]:
        return
    import sentencepiece  # transformers needed it too, to read this folder
    from tokenizers import models

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    score = {pieces.id_to_piece(index): pieces.get_score(index) for index in range(len(pieces))}
    merges = [tuple(pair) for pair in model["merges"]]
    identity = model["vocab"]
    merges.sort(key=lambda pair: (-score["".join(pair)], identity["".join(pair)], *map(identity.get, pair)))
    options = {name: model[name] for name in ("unk_token", "fuse_unk", "byte_fallback")}
    tokenizer.backend_tokenizer.model = models.BPE(vocab=identity, merges=merges, **options)


class TextEncoder:
    """A tokenizer that never makes special tokens from text: `</s>` in a text becomes ordinary pieces.

    Special tokens are only added by id, from `special_id` or `split_special`. Added tokens that are not special, such
    as Qwen's `<tool_call>`, are ordinary vocabulary and still match.

    Attributes:
      start: ids that the tokenizer puts in front of a sequence: its begin-of-sequence token, or none.
      special: {text of a special token: its id}.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.special: dict[str, int] = {
            token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self._checked: set[str] = set()
        plain = self._plain("a")
        full = list(tokenizer("a").input_ids)
        self.start: tuple[int, ...] = tuple(full[: _find(full, plain)])
        # SentencePiece-like tokenizers put a space before a text's first word, which is wrong after other tokens.
        self._has_dummy_prefix = self._after("\n", "a") not in (None, plain)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._plain("a")  # sets the copied tokenizer's mode before several threads use it

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """The ids of `text`, without special tokens.

        Args:
          text: any text without lone surrogates.
          continues: whether the text directly follows other tokens, and so gets no dummy prefix.
        """
        if continues and self._has_dummy_prefix and text:
            for anchor in ("\n", "0"):
                ids = self._after(anchor, text)
                if ids is not None:
                    return ids
        return self._plain(text)

    def special_id(self, token: str | None, purpose: str) -> int:
        """The id of a special token.

        Args:
          purpose: what needs the token, for errors.

        Raises:
          UserError: the tokenizer has no such special token, or makes it from plain text, so that text could forge it.
        """
        if token is None or token not in self.special:
            found = f"a special token {token!r}{nearest(token, self.special)}" if token else "an end-of-sequence token"
            raise UserError(
                f"{purpose} needs {found}, which this tokenizer does not have; its special tokens are "
                f"{sorted(self.special)[:12]}. Choose the template that belongs to the tokenizer, or add the token"
            )
        index = self.special[token]
        if token not in self._checked and index in self.encode(token):
            raise UserError(
                f"{purpose} needs the special token {token!r}, but this tokenizer also makes it (id {index}) out of "
                "plain text; take a tokenizer whose vocabulary does not hold its special tokens as words"
            )
        self._checked.add(token)
        return index

    def split_special(self, text: str) -> list[str | int]:
        """Text of a template, cut at its special tokens, which become ids. Not for text of a record."""
        if not self.special:
            return [text] if text else []
        names = sorted(self.special, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, names))})", text)
        return [self.special_id(part, "the chat template") if part in self.special else part for part in parts if part]

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids)

    def _after(self, anchor: str, text: str) -> list[int] | None:
        """The ids of `text` where it follows `anchor`; None if a token spans both."""
        head, whole = self._plain(anchor), self._plain(anchor + text)
        return whole[len(head) :] if whole[: len(head)] == head else None


def _find(ids: Sequence[int], part: Sequence[int]) -> int:
    for i in range(len(ids) - len(part) + 1):
        if list(ids[i : i + len(part)]) == list(part):
            return i
    return 0
