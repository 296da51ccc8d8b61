"""A run's record, `run.json` in its directory: what run it is, and which changes of its config it allows."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ross_jax import checkpoints
from ross_jax.config import ConfigError, from_dict, to_dict
from ross_jax.data.precomputed import differences
from ross_jax.directories import DamagedError
from ross_jax.json_text import load_json
from ross_jax.storage import StorageError, write_whole
from ross_jax.training.recipe import RunConfig
from ross_jax.upgrade import upgrade

RECORD = "run.json"
"""File of a run's directory with its config and what identifies its data."""
_FREE = ("loop.", "evaluation.", "mesh.", "data.workers", "data.threads", "data.prefetch", "data.cache")
_FREE += ("data.precomputed", "data.max_dropped", "data.local_cache", "init_random")
"""Beginnings of the fields that a run may change when it continues."""
_FORMAT = 2
"""Version of the record. Version 1 had no checksum."""


def read_record(folder: Path, config: RunConfig, adopt: bool = False) -> dict[str, Any]:
    """The record of the run that a directory holds; empty for a new run, and for one that is adopted.

    Raises:
      ConfigError: it is a run of another config; lists what differs.
      DamagedError: the record is missing or not as it was written.
    """
    path = folder / RECORD
    try:
        record = parse_record(path)
    except DamagedError as error:
        if adopt:
            return {}
        raise DamagedError(f"{error}; restore it from a copy, or let launch/train.py --adopt rebuild it") from error
    if record is None:
        if checkpoints.latest_step(folder) is not None and not adopt:
            raise DamagedError(
                f"{folder}: has steps, but no {RECORD}, which says what run they are of; restore it from a "
                "copy, or let launch/train.py --adopt rebuild it from this config"
            )
        return {}
    recorded = recorded_config(record, path)
    more = config.data.epochs > recorded.data.epochs
    listed = [
        line
        for line in differences(to_dict(recorded), to_dict(config))
        if not line.startswith(_FREE) and not (more and line.startswith("data.epochs:"))
    ]
    if listed:
        raise ConfigError(
            f"{folder}: holds a run with another config:\n  " + "\n  ".join(listed) + "\nUse another directory; "
            f"--from={folder} begins there with what this run has learnt"
        )
    return record


def parse_record(path: Path) -> dict[str, Any] | None:
    """The record in a file, in today's names; None if there is no file.

    Raises:
      DamagedError: it cannot be read, or is not as it was written.
    """
    try:
        record = load_json(path)
        if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
            raise ValueError("it has no config")
    except FileNotFoundError:
        return None
    except StorageError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DamagedError(f"{path}: cannot be read ({reason})") from error
    if record.get("format", 1) != 1 and record.get("checksum") != _checksum(record):
        raise DamagedError(f"{path}: damaged: its content does not fit its checksum")
    return upgrade(RECORD, record)


def recorded_config(record: Mapping[str, Any], path: Path) -> RunConfig:
    """The config in a record. A field that is younger than the run has its default."""
    return from_dict(RunConfig, record["config"], f"{path}: config")


def write_record(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Writes `before` with the fields of `now`, unless the directory has them already."""
    current = {**before, **now, "format": _FORMAT}
    current["checksum"] = _checksum(current)
    if current == before:
        return
    with checkpoints.writing(folder, folder):
        write_whole(folder / RECORD, json.dumps(current, indent=1) + "\n")


def _checksum(record: Mapping[str, Any]) -> str:
    """SHA-256 of all other fields."""
    content = json.dumps({name: value for name, value in record.items() if name != "checksum"}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
