"""Writing `.bin` files that `torch.load` reads, tensor by tensor and without torch. Their layout: `torch_pickle`."""

import contextlib
import math
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ross_jax.convert.dtypes import DTYPES
from ross_jax.convert.torch_pickle import STORAGES
from ross_jax.storage import local_folder

_CLASSES = {tag: name for name, tag in STORAGES.items()}


class TorchWriter:
    """Writer of one `{stem}.bin`: a context manager with the methods of `SafetensorsWriter`."""

    def __init__(self, folder: Path, stem: str, infos: Mapping[str, tuple[str, Sequence[int]]]):
        """Creates the file.

        Args:
          folder: an existing folder.
          stem: name of the file without `.bin`, which is also the name inside the archive.
          infos: name -> (tag of the dtype, shape).
        """
        self._infos, self._stem = dict(infos), stem
        self._numbers = {key: str(i) for i, key in enumerate(self._infos)}
        self._local = contextlib.ExitStack()
        place = self._local.enter_context(local_folder(folder))
        self._archive = zipfile.ZipFile(place / f"{stem}.bin", "x")
        self._archive.writestr(f"{stem}/data.pkl", _state(self._infos, self._numbers))
        self._archive.writestr(f"{stem}/byteorder", b"little")

    def write(self, key: str, values: np.ndarray) -> None:
        """Writes one of the declared tensors."""
        tag, shape = self._infos[key]
        assert values.shape == tuple(shape) and values.dtype == DTYPES[tag]
        with self._archive.open(f"{self._stem}/data/{self._numbers[key]}", "w", force_zip64=True) as file:
            file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)

    def __enter__(self) -> "TorchWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        self._archive.writestr(f"{self._stem}/version", b"3\n")
        self._archive.close()
        self._local.__exit__(*error)


# Opcodes are written by hand, because the pickle module can name torch's classes only if torch is installed.


def _state(infos: Mapping[str, tuple[str, Sequence[int]]], numbers: Mapping[str, str]) -> bytes:
    """Pickle of the state dict: key -> tensor in a storage of its own."""
    items = (_text(key) + _tensor(tag, tuple(shape), numbers[key]) + b"s" for key, (tag, shape) in infos.items())
    return b"\x80\x02}" + b"".join(items) + b"."


def _tensor(tag: str, shape: tuple[int, ...], number: str) -> bytes:
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    place = (_text("storage"), _named("torch", _CLASSES[tag]), _text(number), _text("cpu"), _int(math.prod(shape)))
    hooks = _named("collections", "OrderedDict") + _tuple() + b"R"
    sizes = _int(0), _tuple(*map(_int, shape)), _tuple(*map(_int, strides))
    return _named("torch._utils", "_rebuild_tensor_v2") + _tuple(_tuple(*place) + b"Q", *sizes, b"\x89", hooks) + b"R"


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _int(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little")
    return b"\x8a" + bytes([len(data)]) + data


def _tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()
