"""Folders that are made once. A folder appears complete or not at all, and is remade when its settings change."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ross_jax.directories import INCOMPLETE, complete_directory
from ross_jax.storage import local_folder, location

STAMP = "stamp.json"


def make_once(folder: Path, settings: Mapping[str, Any], make: Callable[[Path], None]) -> bool:
    """Makes `folder` with `make(empty folder)`, unless an earlier call made it with the same settings.

    Args:
      folder: the folder to make. One that an earlier call made with other settings is removed first.
      settings: everything that the content depends on, as JSON values; `file_hash` covers code and files.
      make: fills an empty folder of this machine, which becomes `folder` afterwards.

    Returns:
      Whether `make` was called.

    Raises:
      UserError: `folder` holds something else, cannot be written, or is being written by another process.
    """
    folder = location(folder).absolute()
    stamp = {"settings": json.loads(json.dumps(settings))}
    found = _read_stamp(folder)
    if found == stamp:
        return False
    if found is not None:
        (folder / INCOMPLETE).touch()  # for `complete_directory` it is what a killed process left
    with complete_directory(folder) as partial:
        with local_folder(partial) as place:
            make(place)
        (partial / STAMP).write_text(json.dumps(stamp, indent=1) + "\n")
    return True


def _read_stamp(folder: Path) -> dict[str, Any] | None:
    """Settings that `make_once` recorded in `folder`; None if `make_once` did not make it."""
    if (folder / INCOMPLETE).exists():
        return None
    try:
        return json.loads((folder / STAMP).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None


def file_hash(*files: str | Path) -> str:
    """SHA-256 of the files' contents, in the order given."""
    digest = hashlib.sha256()
    for file in files:
        data = location(file).read_bytes()
        digest.update(f"{len(data)} ".encode() + data)
    return digest.hexdigest()
