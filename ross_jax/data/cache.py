"""Files of named arrays. Each is written completely or not at all, and checked when it is read."""

import hashlib
import logging
import os
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from ross_jax.config import UserError

logger = logging.getLogger(__name__)


def save_arrays(path: Path, described: str, arrays: dict[str, np.ndarray]) -> None:
    """Writes named arrays and a text that describes them. If it fails, no file is left.

    Raises:
      UserError: the folder cannot be written, or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".tmp", delete=False) as file:
            try:
                np.savez(file, described=np.array(described), hash=np.array(hash_arrays(*arrays.values())), **arrays)
                file.flush()
                os.fsync(file.fileno())
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; free the disk or set another cache") from error


def load_arrays(path: Path, described: str) -> dict[str, np.ndarray] | None:
    """The arrays that `save_arrays` wrote with this description; None if the file is absent or (logged) damaged."""
    if not path.exists():
        return None
    try:
        with np.load(path) as file:
            arrays = dict(file)
        stored, checksum = str(arrays.pop("described")), str(arrays.pop("hash"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("%s: damaged, will be made again: %s", path, error)
        return None
    if stored != described or checksum != hash_arrays(*arrays.values()):
        logger.warning("%s: does not match its checksum or description, will be made again", path)
        return None
    return arrays


def hash_arrays(*arrays: np.ndarray) -> str:
    """SHA-256 of types, shapes and values, in hexadecimal."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
