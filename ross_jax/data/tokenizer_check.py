"""Checks of a tokenizer's files, before the libraries that read them do.

files ─► size, UTF-8, JSON ─► `tokenizer_probe` in a process with limits ─► transformers
"""

import concurrent.futures
import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ross_jax.config import UserError
from ross_jax.json_text import parse_json

logger = logging.getLogger(__name__)

PROBE = "The cat's  3,141 kittens:\n\n\t• naïve café 中文。😀 <image> </s><|im_end|> USER: A</s>"
"""A text that every tokenizer must be able to encode."""
_MAX_BYTES = 48 * 2**20
_SECONDS = 10
"""Processor time for reading the vocabulary and rendering the chat template."""
_TIMEOUT = 120  # seconds for the same on a busy machine
_TEMPLATE = "chat_template.jinja"
_OBJECTS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
_TEXTS = ("merges.txt", "vocab.txt", _TEMPLATE)
_PROBED = ("tokenizer.json", "tokenizer.model", "spiece.model")
_SCRIPT = Path(__file__).with_name("tokenizer_probe.py")

_sound: set[bytes] = set()
"""Hashes of what this process has probed."""


@contextlib.contextmanager
def checking(folder: Path, files: Mapping[str, Path]) -> Iterator[None]:
    """Checks a tokenizer's files, with the help of a process that works while the block runs.

    Args:
      files: name in the folder -> path.

    Raises:
      UserError: a file is too large, no text or no JSON; or its vocabulary or chat template would crash, take too long
        or too much memory. Names folder and file.
    """
    for path in files.values():
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise UserError(f"tokenizer {folder}: {path.name} has {size} bytes, more than {_MAX_BYTES}")
    contents = {name: path.read_bytes() for name, path in files.items()}
    settings: dict[str, Any] = {}
    for name in (*_OBJECTS, *_TEXTS):
        try:
            if name in contents and name in _TEXTS:
                contents[name].decode()
            elif name in contents:
                values = parse_json(contents[name], _MAX_BYTES)
                if not isinstance(values, dict):
                    raise ValueError(f"it holds a JSON {type(values).__name__}, not an object")
                settings = values if name == "tokenizer_config.json" else settings
        except ValueError as error:
            raise UserError(f"tokenizer {folder}: {name} cannot be read: {error}; download it again") from error
    named = default_template(settings.get("chat_template"))
    template = contents[_TEMPLATE].decode() if _TEMPLATE in contents else named
    vocabulary = [files[name] for name in _PROBED if name in files]
    digest = hashlib.sha256()
    for path in vocabulary:
        digest.update(contents[path.name])
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        probing = pool.submit(probe, str(folder), vocabulary, template, digest.digest())
        yield
        probing.result()


def default_template(value: Any) -> str | None:
    """The chat template that is used by default, from the `chat_template` of a config or a tokenizer; None if none."""
    if isinstance(value, list):
        value = {each.get("name"): each.get("template") for each in value if isinstance(each, dict)}
    if isinstance(value, dict):
        value = value.get("default")
    return value if isinstance(value, str) else None


def probe(name: str, vocabulary: Sequence[Path], template: str | None, digest: bytes = b"") -> None:
    """Runs `tokenizer_probe`, unless this process has found the same files and the same template sound.

    Args:
      name: the tokenizer, for messages.
      digest: hash of the vocabulary's bytes.

    Raises:
      UserError: the vocabulary or the chat template is not sound.
    """
    identity = hashlib.sha256(digest + repr(template).encode()).digest()
    if identity in _sound or not (vocabulary or template):
        return
    specs = [importlib.util.find_spec(package) for package in ("jinja2", "tokenizers", "sentencepiece")]
    packages = {str(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin}
    task = {"packages": sorted(packages), "vocabulary": list(map(str, vocabulary)), "text": PROBE}
    task |= {"template": template, "seconds": _SECONDS}
    quiet = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-IS", str(_SCRIPT)],
            input=json.dumps(task),
            capture_output=True,
            text=True,
            errors="replace",
            env=os.environ | quiet,
            timeout=_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"tokenizer {name}: its files could not be checked within {_TIMEOUT} s; try again") from None
    status = done.returncode
    step, _, reason = done.stdout.rpartition("> ")[2].partition("\n")
    if status > 0:
        logger.warning("tokenizer %s: its files could not be checked: %s", name, done.stderr.strip()[-300:])
    elif status in (-signal.SIGXCPU, -signal.SIGKILL):
        reason = f"takes more than {_SECONDS} s"
    elif status:
        reason = f"ends the process that reads it ({signal.Signals(-status).name}): damaged, or needs much memory"
    if reason.strip():
        what = "its chat template" if step == "template" else step
        remedy = "mend the template, or remove it" if step == "template" else "download the tokenizer again"
        raise UserError(f"tokenizer {name}: {what} {' '.join(reason.split())[:300]}; {remedy}")
    _sound.add(identity)
