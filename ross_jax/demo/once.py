"""Folders that are made once: written whole or not at all, kept while their settings stay, else made anew."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ross_jax.checkpoints import complete_directory

STAMP = "stamp.json"


def make_once(folder: Path, settings: Mapping[str, Any], make: Callable[[Path], None]) -> bool:
    """Fills `folder` by `make(empty folder)` unless it already holds what these settings give.

    Args:
      folder: appears complete, or not at all. What an earlier `make_once` put there with other settings is removed.
      settings: all that the content depends on, as JSON can hold it; see `file_hash` for code and files.
      make: fills a folder that is then renamed to `folder`.

    Returns:
      Whether anything was made.

    Raises:
      UserError: `folder` holds something else, cannot be written, or is being written by another process.
    """
    folder = Path(folder).absolute()
    stamp = {"settings": json.loads(json.dumps(settings))}
    found = read_stamp(folder)
    if found == stamp:
        return False
    if found is not None:
        stale = folder.with_name(f".{folder.name}.stale")
        shutil.rmtree(stale, ignore_errors=True)
        folder.rename(stale)
        shutil.rmtree(stale, ignore_errors=True)
    with complete_directory(folder) as partial:
        make(partial)
        (partial / STAMP).write_text(json.dumps(stamp, indent=1) + "\n")
    return True


def read_stamp(folder: Path) -> dict[str, Any] | None:
    """What `make_once` recorded in `folder`; None if it did not make it."""
    try:
        return json.loads((Path(folder) / STAMP).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None


def file_hash(*files: str | Path) -> str:
    """SHA-256 over the contents of files, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        data = Path(file).read_bytes()
        digest.update(f"{len(data)} ".encode() + data)
    return digest.hexdigest()
