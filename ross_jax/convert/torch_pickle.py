"""State dicts of `torch.save`, read without torch and without running what the pickle in the file asks for.

torch >= 1.6 writes a zip archive without compression:

    NAME/data.pkl     pickle of the state dict; each tensor names a storage, an offset, a shape and strides
    NAME/data/KEY     bytes of the storage KEY
    NAME/byteorder    "little" or "big"

`read_layout` reads the archive's directory and the pickle. `StoredTensor.read` reads one tensor.
"""

import io
import math
import os
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from ross_jax.convert.dtypes import DTYPES

MAX_PICKLE_BYTES = 2**22
"""Enough for some 17,000 tensors. Objects in memory can take a hundred times as much as their pickle."""
MAX_DIRECTORY_BYTES = 2**23
"""Most bytes of the archive's directory, which has an entry for each tensor."""
MAX_EXPANDED_BYTES = 2**24
"""Most bytes of a tensor that is larger than its storage (stride 0), so that a small file cannot fill the memory."""
MAX_RANK = 64
"""NumPy's limit."""

RESAVE = "re-save it with torch.save(state_dict, path) of torch >= 1.6, or convert it to safetensors"

STORAGES = {
    "BoolStorage": "BOOL",
    "ByteStorage": "U8",
    "CharStorage": "I8",
    "ShortStorage": "I16",
    "IntStorage": "I32",
    "LongStorage": "I64",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "ComplexFloatStorage": "C64",
}
"""Class of typed storages in `torch` -> tag of the dtype."""
TORCH_DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
}
"""Dtype in `torch` -> tag, for tensors of untyped storages."""


class TorchFileError(Exception):
    """What is wrong with the file, without its path; `problems` lists everything that was found."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


@dataclass(frozen=True)
class StoredTensor:
    """Place of a tensor in a file.

    Attributes:
      tag: name of the dtype.
      shape: number of elements along each axis.
      strides: steps between elements along each axis, in elements. None where contiguous.
      start: position of the first element in the file, in bytes.
    """

    tag: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    start: int

    def read(self, handle: BinaryIO) -> np.ndarray:
        """Reads the tensor into a new C-contiguous array."""
        dtype = DTYPES[self.tag]
        if self.strides is None:
            array = np.empty(self.shape, dtype)
            self._fill(array.reshape(-1).view(np.uint8), handle)
            return array
        # The bytes between the first and the last element, then a strided view of them.
        span = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        stored = np.empty(span * dtype.itemsize, np.uint8)
        self._fill(stored, handle)
        steps = [step * dtype.itemsize for step in self.strides]
        return np.ndarray(self.shape, dtype, buffer=stored, strides=steps).copy()

    def _fill(self, out: np.ndarray, handle: BinaryIO) -> None:
        done = 0
        while done < out.size:
            count = os.preadv(handle.fileno(), [out[done:]], self.start + done)
            if not count:
                raise TorchFileError("has become shorter since it was opened")
            done += count


def read_layout(handle: BinaryIO) -> dict[str, StoredTensor]:
    """Finds the tensors of an open file: name -> place, in the order of the state dict.

    Raises:
      TorchFileError: not such a file, compressed, TorchScript, big-endian, truncated; a pickle that names anything but
        tensors; entries that are no tensors; tensors that reach out of their storage.
    """
    head = os.pread(handle.fileno(), 2, 0)
    if head != b"PK":
        kind = "a legacy torch file (a bare pickle)" if head[:1] == b"\x80" else "no zip file as torch.save writes it"
        raise TorchFileError(f"{kind}; {RESAVE}")
    root, members = _members(handle)
    byteorder = members.get(f"{root}/byteorder")
    if byteorder is not None and os.pread(handle.fileno(), min(byteorder[1], 16), byteorder[0]) != b"little":
        raise TorchFileError(f"written on a big-endian machine; {RESAVE} on a little-endian one")
    start, length = members[f"{root}/data.pkl"]
    if length > MAX_PICKLE_BYTES:
        raise TorchFileError(f"its data.pkl has {length} bytes, more than {MAX_PICKLE_BYTES}")
    state = _unpickle(os.pread(handle.fileno(), length, start))
    if not isinstance(state, dict):
        raise TorchFileError(f"holds {_kind(state)}, not a state dict of names to tensors; {RESAVE}")
    layout, problems = {}, []
    for key, value in state.items():
        try:
            if not isinstance(key, str):
                raise TorchFileError("the name is no string")
            if not isinstance(value, _Tensor):
                raise TorchFileError(f"expected a tensor, found {_kind(value)}; save only the flat state dict")
            layout[key] = _place(value, members.get(f"{root}/data/{value.storage.key}"))
        except TorchFileError as error:
            problems += [f"{key!r}: {problem}" for problem in error.problems]
    if problems:
        raise TorchFileError(*problems)
    return layout


def _members(handle: BinaryIO) -> tuple[str, dict[str, tuple[int, int]]]:
    """Root folder of the archive, and name of each member -> (start, length) of its data in bytes."""
    size = os.fstat(handle.fileno()).st_size
    try:
        # Python reads the whole directory at once, so its size is looked up first, as Python does.
        end = zipfile._EndRecData(handle)
        if end and end[zipfile._ECD_SIZE] > MAX_DIRECTORY_BYTES:
            raise ValueError(f"a directory of {end[zipfile._ECD_SIZE]} bytes")
        entries = zipfile.ZipFile(handle).infolist()
    except (zipfile.BadZipFile, ValueError, OSError, RuntimeError, EOFError, struct.error) as error:
        raise TorchFileError(f"truncated or corrupt zip ({error}); download or copy it again") from error
    names = [entry.filename for entry in entries]
    roots = [name.removesuffix("/data.pkl") for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(set(names)) != len(names) or len(roots) != 1:
        raise TorchFileError(f"a zip file, but not as torch.save writes it; {RESAVE}")
    root = roots[0]
    if f"{root}/constants.pkl" in names or any(name.startswith(f"{root}/code/") for name in names):
        raise TorchFileError("a TorchScript archive (torch.jit.save), not a state dict; load it and " + RESAVE)
    members, problems = {}, []
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
            problems.append(f"member {entry.filename!r} is compressed or encrypted; {RESAVE}")
            continue
        # The data begins after the local header, whose extra field may be longer than the directory's: torch aligns
        # the data with it.
        local = os.pread(handle.fileno(), 30, entry.header_offset) if 0 <= entry.header_offset < size else b""
        if len(local) < 30 or not local.startswith(b"PK\x03\x04"):
            problems.append(f"member {entry.filename!r} has no local header: truncated or corrupt zip")
            continue
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", local[26:30]))
        if start + entry.file_size > size:
            problems.append(f"member {entry.filename!r} ends beyond the file: truncated or corrupt zip")
        members[entry.filename] = (start, entry.file_size)
    if problems:
        raise TorchFileError(*problems)
    return root, members


def _place(tensor: "_Tensor", member: tuple[int, int] | None) -> StoredTensor:
    """Place in the file of a tensor whose storage is the `member` at (start, length)."""
    storage, shape, strides = tensor.storage, tensor.shape, tensor.strides
    if member is None:
        raise TorchFileError(f"its storage data/{storage.key} is not in the file")
    start, member_bytes = member
    storage_bytes = storage.count * (DTYPES[storage.tag].itemsize if storage.tag else 1)
    itemsize = DTYPES[tensor.tag].itemsize
    if storage_bytes > member_bytes:
        raise TorchFileError(f"its storage needs {storage_bytes} bytes, data/{storage.key} has {member_bytes}")
    if len(shape) > MAX_RANK:
        raise TorchFileError(f"it has {len(shape)} dimensions, more than {MAX_RANK}")
    if itemsize * math.prod(max(n, 1) for n in shape) >= 2**63:
        raise TorchFileError(f"its shape {shape} is too large")
    size = math.prod(shape)
    # A dimension of 1 is never stepped along, so its stride may be anything.
    strides = tuple(0 if n == 1 else step for n, step in zip(shape, strides, strict=True))
    span = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) if size else 0
    if (tensor.offset + span) * itemsize > storage_bytes:
        raise TorchFileError(
            f"shape {shape}, strides {strides} and offset {tensor.offset} reach out of its storage of "
            f"{storage_bytes} bytes"
        )
    if size * itemsize > max(storage_bytes, MAX_EXPANDED_BYTES):
        raise TorchFileError(f"expands {storage_bytes} bytes to shape {shape}; save it contiguous")
    dense = tuple(0 if n == 1 else math.prod(shape[i + 1 :]) for i, n in enumerate(shape))
    contiguous = strides == dense or not size
    return StoredTensor(tensor.tag, shape, None if contiguous else strides, start + tensor.offset * itemsize)


# Stand-ins for the objects of torch that a state dict's pickle names. None of them does anything.


@dataclass(frozen=True)
class _Dtype:
    tag: str


@dataclass(frozen=True)
class _StorageType:
    tag: str | None
    """None for an untyped storage, whose size is in bytes."""


@dataclass(frozen=True)
class _Storage:
    tag: str | None
    key: str
    count: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    tag: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Dict(dict):
    """A dict or OrderedDict of the pickle.

    Keys are strings or integers: hashing a tuple of tuples can overflow the stack, or take time exponential in the
    size of the file.
    """

    __slots__ = ()

    def __setitem__(self, key: Any, value: Any) -> None:
        if type(key) not in (str, int):
            raise TypeError(f"a dict key of type {type(key).__name__}")
        super().__setitem__(key, value)


def _ordered_dict() -> _Dict:
    return _Dict()


def _rebuild_parameter(data: Any, requires_grad: Any, backward_hooks: Any) -> _Tensor:
    if type(data) is not _Tensor:
        raise TypeError("a parameter without a tensor")
    return data


def _rebuild_tensor_v2(
    storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> _Tensor:
    if type(storage) is not _Storage or storage.tag is None:
        raise TypeError("a tensor without a typed storage")
    return _rebuild_tensor_v3(storage, offset, shape, strides, requires_grad, hooks, _Dtype(storage.tag), metadata)


def _rebuild_tensor_v3(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> _Tensor:
    if type(storage) is not _Storage or type(dtype) is not _Dtype:
        raise TypeError("a tensor without a storage or a dtype")
    if metadata:  # {"conj": True} or {"neg": True}: the stored numbers are not the tensor's
        raise TorchFileError(f"holds a lazily conjugated or negated tensor; resolve it and {RESAVE}")
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError("a tensor's offset, shape or strides are no natural numbers")
    return _Tensor(storage, dtype.tag, offset, tuple(shape), tuple(strides))


_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch.storage", "UntypedStorage"): _StorageType(None),
}
_NAMES |= {("torch", name): _StorageType(tag) for name, tag in STORAGES.items()}
_NAMES |= {("torch", name): _Dtype(tag) for name, tag in TORCH_DTYPES.items()}
"""Every (module, name) that a pickle may name -> our stand-in."""


class _Opcodes(dict[int, Callable[[Any], None]]):
    """Opcode -> the method of the unpickler that executes it; others are refused."""

    def __missing__(self, code: int) -> Callable[[Any], None]:
        known = pickletools.code2op.get(chr(code))
        if known is None:
            raise ValueError(f"unknown opcode {code}")
        raise TorchFileError(
            f"refused: its pickle uses {known.name}, which a state dict of tensors never does; {RESAVE}"
        )


_OPCODES = (
    *(pickle.PROTO, pickle.FRAME, pickle.MARK, pickle.STOP),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT),
    *(pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8, pickle.BINBYTES, pickle.SHORT_BINBYTES),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS),
    *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.BINPERSID, pickle.REDUCE),
)
"""Opcodes that the base class executes."""


class _StateDictUnpickler(pickle._Unpickler):
    """Unpickler that imports nothing. Names stand for the objects in `_NAMES`; any other name is an error.

    The base class is the Python version of `pickle.Unpickler`. The C version hashes dict keys of any kind, and makes
    its memo as large as the largest index in the file, before a subclass can object.
    """

    dispatch = _Opcodes({code[0]: pickle._Unpickler.dispatch[code[0]] for code in _OPCODES})

    def find_class(self, module: str, name: str) -> Any:
        """Stand-in for an object of torch."""
        if (module, name) not in _NAMES:
            full = f"{module}.{name}"
            raise TorchFileError(
                f"refused: its pickle names {full!r}, which is no part of a plain state dict "
                f"(nothing was executed). If you trust its origin, {RESAVE}"
            )
        return _NAMES[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        """Storage that a tensor refers to: `pid` is ("storage", type, key, device, number of elements)."""
        kind, storage_type, key, _, count = pid
        if kind != "storage" or type(storage_type) is not _StorageType or type(key) is not str:
            raise ValueError("a reference that is no storage")
        if type(count) is not int or count < 0:
            raise ValueError("a storage whose size is no natural number")
        return _Storage(storage_type.tag, key, count)

    def load_empty_dictionary(self) -> None:
        """Pushes a dict that checks its keys."""
        self.append(_Dict())

    def load_build(self) -> None:
        """Skips attributes of an OrderedDict: the `_metadata` of `Module.state_dict()`."""
        self.stack.pop()
        if not isinstance(self.stack[-1], _Dict):
            raise TorchFileError(f"refused: its pickle sets the state of {_kind(self.stack[-1])}; {RESAVE}")

    dispatch[pickle.EMPTY_DICT[0]] = load_empty_dictionary
    dispatch[pickle.BUILD[0]] = load_build


def _unpickle(data: bytes) -> Any:
    try:
        return _StateDictUnpickler(io.BytesIO(data)).load()
    except TorchFileError:
        raise
    except Exception as error:  # damaged pickles raise errors of many kinds
        raise TorchFileError(f"its data.pkl is corrupt ({type(error).__name__}: {error})") from error


def _kind(value: Any) -> str:
    names = {_Dict: "a dict", _Tensor: "a bare tensor", _Storage: "a bare storage"}
    if callable(value) or isinstance(value, _Dtype | _StorageType):
        return "a function or class"
    return names.get(type(value), f"a value of type {type(value).__name__}")
