"""Writes files like torch.save's, without torch."""

import struct
import warnings
import zipfile
from pathlib import Path

import numpy as np

# Opcodes are written by hand, because the pickle module can name torch's classes only if torch is installed.


def string(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def number(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def tuple_of(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def numbers(values) -> bytes:
    return tuple_of(*map(number, values))


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def call(function: bytes, *args: bytes) -> bytes:
    return function + tuple_of(*args) + b"R"


def dict_of(items: dict[str, bytes]) -> bytes:
    return b"}(" + b"".join(string(key) + value for key, value in items.items()) + b"u"


ORDERED_DICT = call(named("collections", "OrderedDict"))


def storage(cls: str, key: str, count: int, module: str = "torch") -> bytes:
    return tuple_of(string("storage"), named(module, cls), string(key), string("cpu"), number(count)) + b"Q"


def tensor(stored: bytes, shape, strides, offset: int = 0, *extra: bytes, version: str = "v2") -> bytes:
    rebuild = named("torch._utils", f"_rebuild_tensor_{version}")
    return call(rebuild, stored, number(offset), numbers(shape), numbers(strides), b"\x89", ORDERED_DICT, *extra)


def floats(count: int, shape, strides, offset: int = 0) -> bytes:
    return tensor(storage("FloatStorage", "0", count), shape, strides, offset)


def torch_zip(file: Path, state: bytes, data: dict[str, bytes] | None = None, extra=None, **options) -> Path:
    """Writes an archive in torch's layout: local headers have an alignment field that the directory lacks."""
    members = {"data.pkl": b"\x80\x02" + state + b".", "version": b"3\n", "byteorder": b"little"}
    members |= {f"data/{key}": content for key, content in (data or {}).items()}
    members |= extra or {}
    file.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", **options) as archive:
        warnings.simplefilter("ignore", UserWarning)  # of duplicate names
        for name, content in members.items():
            info = zipfile.ZipInfo(f"archive/{name}")
            info.compress_type = archive.compression
            info.extra = b"FB" + struct.pack("<H", 5) + b"ZZZZZ"
            archive.writestr(info, content)
            info.extra = b""
    return file


CLASSES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage", "int64": "LongStorage"}


def save(file: Path, state: dict[str, np.ndarray]) -> Path:
    """Saves a state dict of contiguous tensors."""
    items, data = {}, {}
    for i, (key, array) in enumerate(state.items()):
        strides = [int(np.prod(array.shape[axis + 1 :])) for axis in range(array.ndim)]
        stored = storage(CLASSES[array.dtype.name], str(i), array.size)
        items[key] = tensor(stored, array.shape, strides)
        data[str(i)] = np.ascontiguousarray(array).tobytes()
    return torch_zip(file, dict_of(items), data)
