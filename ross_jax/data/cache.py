"""Files of named arrays. Each is written completely or not at all, and checked when it is read."""

import hashlib
import io
import logging
import os
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from ross_jax.config import UserError
from ross_jax.storage import is_remote

logger = logging.getLogger(__name__)


def pack_arrays(described: str, arrays: dict[str, np.ndarray]) -> bytes:
    """The content of a file of named arrays and a text that describes them."""
    file = io.BytesIO()
    np.savez(file, described=np.array(described), hash=np.array(hash_arrays(*arrays.values())), **arrays)  # pyright: ignore
    return file.getvalue()


def unpack_arrays(data: bytes, described: str, path: Path | str = "a cached file") -> dict[str, np.ndarray] | None:
    """The arrays that `pack_arrays` packed with this description; None if the content is (logged) damaged."""
    try:
        with np.load(io.BytesIO(data)) as file:
            arrays = dict(file)
        stored, checksum = str(arrays.pop("described")), str(arrays.pop("hash"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("%s: damaged, will be made again: %s", path, error)
        return None
    if stored != described or checksum != hash_arrays(*arrays.values()):
        logger.warning("%s: does not match its checksum or description, will be made again", path)
        return None
    return arrays


def save_arrays(path: Path, described: str, arrays: dict[str, np.ndarray]) -> None:
    """Writes named arrays and a text that describes them. If it fails, no file is left.

    Raises:
      UserError: the folder cannot be written, or the disk is full.
    """
    data = pack_arrays(described, arrays)
    if is_remote(path):
        path.write_bytes(data)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".tmp", delete=False) as file:
            try:
                file.write(data)
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
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        if isinstance(error, UserError):
            raise
        logger.warning("%s: cannot be read, will be made again: %s", path, error)
        return None
    return unpack_arrays(data, described, path)


def hash_arrays(*arrays: np.ndarray) -> str:
    """SHA-256 of types, shapes and values, in hexadecimal."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
