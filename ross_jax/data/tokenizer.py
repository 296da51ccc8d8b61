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

import contextlib
import hashlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ross_jax.config import UserError, nearest
from ross_jax.data.tokenizer_check import PROBE, checking, default_template, probe
from ross_jax.hub import hub_answers, is_hub_id, say_asked
from ross_jax.storage import copy_file, is_remote, local_folder, location, naming

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_FILES = ("tokenizer*", "vocab.*", "merges.txt", "spiece.model", "tekken.json", "*.tiktoken")
_FILES += ("special_tokens_map.json", "added_tokens.json", "chat_template*", "additional_chat_templates/*")
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_CLASSES = {"tokenizer.model": "LlamaTokenizer", "vocab.json": "Qwen2Tokenizer"}
"""Vocabulary without `tokenizer.json` -> the class that reads it where `tokenizer_config.json` names none."""


def load_tokenizer(name: str | Path, max_length: int | None = None) -> Any:
    """Loads a transformers tokenizer from a local folder, or by a hub id if no folder has that name.

    A folder is read without network access, and only the tokenizer's own files are: a `config.json` beside them has no
    say. A tokenizer without a padding token gets the one that the reference chooses: the unknown token, else Llama 3's
    `<|end_of_text|>`, else the end-of-sequence token.

    Args:
      name: a folder with `tokenizer.json` (or another vocabulary file) and `tokenizer_config.json`; or a hub id,
        `owner/name`.
      max_length: new `model_max_length`. Only `compat="official"` reads it, and cuts text-only conversations there.

    Raises:
      UserError: the folder does not exist, holds no vocabulary, or holds files that transformers cannot read.
    """
    if is_remote(name):
        with _copied(name) as copy:
            return load_tokenizer(copy, max_length)
    folder = Path(name).expanduser()
    if folder.is_dir():
        _check_vocabulary(folder)
    elif folder.exists():
        raise UserError(f"tokenizer {name}: this is a file; give the folder that holds it")
    elif isinstance(name, Path) or not is_hub_id(name):
        raise UserError(f"tokenizer {name}: there is no such folder")
    try:
        tokenizer = _read_folder(folder) if folder.is_dir() else _from_hub(str(name))
        TextEncoder(tokenizer).encode(PROBE)  # a wrong class may load, and fail at the first text
    except UserError:
        raise
    except BaseException as error:  # transformers raises many types, and its Rust backend PanicException
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if folder.is_dir():
            if own := _own_code(folder):
                reason = f"it has code of its own for it ({own}), which is never run; name a class of transformers"
            raise UserError(f"tokenizer {name}: transformers cannot read this folder: {reason}") from error
        raise UserError(
            f"tokenizer {name}: there is no such folder, and the hub does not give it either ({reason}); "
            "give the path of a downloaded tokenizer"
        ) from error
    vocabulary = tokenizer.get_vocab()
    token, index = max(vocabulary.items(), key=lambda item: item[1], default=("", 0))
    if index >= 2**31:
        raise UserError(f"tokenizer {name}: the token {token[:40]!r} has the id {index}; ids have 31 bits")
    if max_length is not None:
        tokenizer.model_max_length = max_length
    if tokenizer.pad_token is None:
        candidates = (tokenizer.unk_token, "<|end_of_text|>", tokenizer.eos_token)
        tokenizer.pad_token = next((token for token in candidates if token in vocabulary), None)
    return tokenizer


def _import_transformers() -> Any:
    """The package, imported without its advice to install PyTorch: tokenizers do not need it."""
    log = logging.getLogger("transformers")

    def keep(record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()

    log.addFilter(keep)
    try:
        import transformers  # takes seconds
    finally:
        log.removeFilter(keep)
    return transformers


def _own_code(folder: Path) -> str | None:
    """The Python class that a folder brings for its tokenizer, such as `tokenization.MyTokenizer`; None if none."""
    named = _config(folder).get("auto_map")
    named = named.get("AutoTokenizer") if isinstance(named, dict) else named
    return str(next(filter(None, named), None)) if isinstance(named, list) else named and str(named)


def _read_folder(folder: Path) -> Any:
    with checking(folder, tokenizer_files(folder)):
        transformers = _import_transformers()
    # With the config.json of a model, transformers would choose a class that reads the same files differently.
    config = transformers.PreTrainedConfig()
    if not (folder / "tokenizer.json").exists():
        config.tokenizer_class = next((cls for file, cls in _CLASSES.items() if (folder / file).exists()), None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, config=config, trust_remote_code=False
    )
    if not (folder / "tokenizer.json").exists() and (folder / "tokenizer.model").exists():
        _order_merges(tokenizer, folder / "tokenizer.model")
    add_start = _config(folder).get("add_bos_token")
    if isinstance(tokenizer, transformers.LlamaTokenizer) and isinstance(add_start, bool):
        tokenizer.add_bos_token = add_start  # transformers 5 follows tokenizer.json, the reference this field
    return tokenizer


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _from_hub(name: str) -> Any:
    say_asked(name)
    offline = not hub_answers(name)
    auto = _import_transformers().AutoTokenizer
    tokenizer = auto.from_pretrained(name, local_files_only=offline, trust_remote_code=False)
    probe(name, [], default_template(tokenizer.chat_template))
    return tokenizer


def tokenizer_files(folder: Path, patterns: Sequence[str] = _FILES) -> dict[str, Path]:
    """The files of the tokenizer in a folder: name below the folder -> path. Empty if there is no folder."""
    found = (path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in sorted(found)}


def find_tokenizer(files: Path) -> Path | None:
    """The folder that holds the tokenizer of a model directory, if it has one.

    A run lays its tokenizer under `language`. Import lays it where it was: with the language model, in a full
    checkpoint (`ross`), or with the adapters of stage 1.

    Args:
      files: folder `files` of the model directory.
    """
    folders = [files / name for name in ("language", "ross", "adapters")]
    return next((folder for folder in folders if folder.is_dir() and _has_vocabulary(folder)), None)


def save_tokenizer(name: str | Path, folder: Path) -> None:
    """Lays the files of a tokenizer, and of a processor beside it, into a folder. Another tokenizer's files there go.

    They are copied byte for byte, so that every reader of the originals reads the copies. Only a tokenizer of the hub
    is saved anew, by today's transformers.

    Args:
      name: as of `load_tokenizer`.
      folder: where the files go; made if it is absent.
    """
    if is_remote(name):
        with _copied(name) as copy:
            return save_tokenizer(copy, folder)
    if is_remote(folder):
        for path in tokenizer_files(folder).values():
            path.unlink()
        with local_folder(folder) as place:
            return save_tokenizer(name, place)
    source = Path(name).expanduser()
    if source.is_dir() and folder.is_dir() and source.samefile(folder):
        return
    for path in tokenizer_files(folder).values():
        path.unlink()
    if not source.is_dir():
        tokenizer = load_tokenizer(name)
        tokenizer.save_pretrained(folder)
        check_fingerprint(load_tokenizer(folder), fingerprint(tokenizer), f"tokenizer {name}, saved as {folder}")
    for file, path in tokenizer_files(source, _FILES + _PROCESSOR_FILES).items():
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


@contextlib.contextmanager
def _copied(name: str | Path) -> Iterator[Path]:
    """A temporary copy of a tokenizer's files that lie in a bucket."""
    source = location(name)
    if not source.is_dir():
        raise UserError(f"tokenizer {name}: there is no such folder")
    with tempfile.TemporaryDirectory(prefix="ross_jax_") as place:
        folder = Path(place) / source.name
        for file, path in tokenizer_files(source, _FILES + _PROCESSOR_FILES).items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            copy_file(path, folder / file)
        folder.mkdir(exist_ok=True)
        with naming(source, folder):
            yield folder


def fingerprint(tokenizer: Any) -> dict[str, str]:
    """Hashes of what a tokenizer does: of its vocabulary, and of the ids of a text. Equal ones give equal ids."""
    encoder = TextEncoder(tokenizer)
    ids = [encoder.start, encoder.encode(PROBE), encoder.encode(PROBE, continues=True)]
    contents = {"vocabulary": [*sorted(tokenizer.get_vocab().items()), *sorted(encoder.special)], "probe": ids}
    return {name: hashlib.sha256(repr(content).encode()).hexdigest() for name, content in contents.items()}


def check_fingerprint(tokenizer: Any, recorded: Mapping[str, str] | None, where: str) -> None:
    """Compares a tokenizer with the one that a model was trained with.

    Args:
      recorded: from `fingerprint`. None, or a hash that is missing, fits every tokenizer: older runs recorded none.
      where: the tokenizer, for messages.

    Raises:
      UserError: the tokenizer gives other ids.
    """
    found = fingerprint(tokenizer) if recorded else {}
    differing = [name for name in found if recorded.get(name, found[name]) != found[name]]
    if differing:
        what = {"vocabulary": "its vocabulary", "probe": "the ids of a text"}
        raise UserError(
            f"{where}: this is not the tokenizer that the model was trained with (what differs: "
            f"{', '.join(what[name] for name in differing)}); put its files back"
        )


def _has_vocabulary(folder: Path) -> bool:
    return any((folder / name).is_file() for name in VOCABULARY_FILES) or any(folder.glob("*.tiktoken"))


def _check_vocabulary(folder: Path) -> None:
    # Without this check, transformers builds an empty tokenizer from a folder that has only a tokenizer_config.json.
    if _has_vocabulary(folder):
        return
    packed = sorted(path.name for path in folder.iterdir() if path.stem in VOCABULARY_FILES)
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
