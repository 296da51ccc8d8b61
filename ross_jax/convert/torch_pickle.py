"""Where the tensors lie in a file of `torch.save`, found without torch and without executing the pickle.

Such a file (torch >= 1.6) is an uncompressed zip: `<name>/data.pkl` pickles the state dict, in which every tensor
refers to a storage, and `<name>/data/<key>` is the storage of that key, raw and little-endian. `read_layout` reads the
directory and the pickle, never the data.

Unpickling calls whatever the file names, so the pickle is not given to `pickle`: a small stack machine reads its
opcodes, knows only those that state dicts consist of, and builds nothing but containers, strings, numbers and
`_Tensor` descriptions. A name of anything else ends the reading.
"""

import math
import os
import pickletools
import struct
import zipfile
from dataclasses import dataclass
from typing import Any, BinaryIO

MAX_PICKLE_BYTES = 100_000_000
MAX_EXPANDED_BYTES = 2**24  # what a tensor may take beyond its storage (stride 0): a small file fills no memory
MAX_RANK = 64  # of numpy

RESAVE = "re-save it with torch.save(state_dict, path) of torch >= 1.6, or convert it to safetensors"

# torch's storage class or dtype -> (safetensors tag, bytes of an element)
STORAGES = {
    "BoolStorage": ("BOOL", 1),
    "ByteStorage": ("U8", 1),
    "CharStorage": ("I8", 1),
    "ShortStorage": ("I16", 2),
    "IntStorage": ("I32", 4),
    "LongStorage": ("I64", 8),
    "HalfStorage": ("F16", 2),
    "BFloat16Storage": ("BF16", 2),
    "FloatStorage": ("F32", 4),
    "DoubleStorage": ("F64", 8),
    "ComplexFloatStorage": ("C64", 8),
}
DTYPES = {
    "bool": ("BOOL", 1),
    "uint8": ("U8", 1),
    "int8": ("I8", 1),
    "uint16": ("U16", 2),
    "int16": ("I16", 2),
    "uint32": ("U32", 4),
    "int32": ("I32", 4),
    "uint64": ("U64", 8),
    "int64": ("I64", 8),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "float8_e8m0fnu": ("F8_E8M0", 1),
    "float8_e4m3fnuz": ("F8_E4M3FNUZ", 1),
    "float8_e5m2fnuz": ("F8_E5M2FNUZ", 1),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float32": ("F32", 4),
    "float64": ("F64", 8),
    "complex64": ("C64", 8),
}


class TorchFileError(Exception):
    """What is wrong with the file, without its path; `problems` lists everything that was found."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's place: `start` in bytes from the file's begin; `strides` in elements, None where contiguous."""

    tag: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    start: int


def read_layout(handle: BinaryIO, size: int) -> dict[str, StoredTensor]:
    """The tensors of an open file of `size` bytes by name, in the order of the state dict.

    Raises:
      TorchFileError: not such a file, compressed, TorchScript, big-endian, truncated; a pickle that names anything but
        tensors; entries that are no tensors; tensors that reach out of their storage.
    """
    head = os.pread(handle.fileno(), 2, 0)
    if head != b"PK":
        kind = "a legacy torch file (a bare pickle)" if head[:1] == b"\x80" else "no zip file as torch.save writes it"
        raise TorchFileError(f"{kind}; {RESAVE}")
    root, members = _members(handle, size)
    byteorder = members.get(f"{root}/byteorder")
    if byteorder is not None and os.pread(handle.fileno(), min(byteorder[1], 16), byteorder[0]) != b"little":
        raise TorchFileError(f"written on a big-endian machine; {RESAVE} on a little-endian one")
    start, length = members[f"{root}/data.pkl"]
    if length > MAX_PICKLE_BYTES:
        raise TorchFileError(f"its data.pkl has {length} bytes, more than {MAX_PICKLE_BYTES}")
    state = _read_pickle(os.pread(handle.fileno(), length, start))
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


def _members(handle: BinaryIO, size: int) -> tuple[str, dict[str, tuple[int, int]]]:
    """The archive's root folder, and (start, bytes) of each member's data."""
    try:
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
        # The local header repeats the name with an extra field of its own length (torch aligns the data with it).
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
    storage, shape, strides = tensor.storage, tensor.shape, tensor.strides
    if member is None:
        raise TorchFileError(f"its storage data/{storage.key} is not in the file")
    start, member_bytes = member
    storage_bytes = storage.count * storage.itemsize
    if storage_bytes > member_bytes:
        raise TorchFileError(f"its storage needs {storage_bytes} bytes, data/{storage.key} has {member_bytes}")
    if len(shape) > MAX_RANK:
        raise TorchFileError(f"it has {len(shape)} dimensions, more than {MAX_RANK}")
    if tensor.itemsize * math.prod(max(n, 1) for n in shape) >= 2**63:
        raise TorchFileError(f"its shape {shape} is too large")
    size = math.prod(shape)
    # A dimension of 1 is never stepped along: its stride may be anything.
    strides = tuple(0 if n == 1 else step for n, step in zip(shape, strides, strict=True))
    span = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) if size else 0
    if (tensor.offset + span) * tensor.itemsize > storage_bytes:
        raise TorchFileError(
            f"shape {shape}, strides {strides} and offset {tensor.offset} reach out of its storage of "
            f"{storage_bytes} bytes"
        )
    if size * tensor.itemsize > max(storage_bytes, MAX_EXPANDED_BYTES):
        raise TorchFileError(f"expands {storage_bytes} bytes to shape {shape}; save it contiguous")
    dense = tuple(0 if n == 1 else math.prod(shape[i + 1 :]) for i, n in enumerate(shape))
    return StoredTensor(
        tensor.tag,
        shape,
        None if strides == dense or not size else strides,
        start + tensor.offset * tensor.itemsize,
    )


# The stack machine.


@dataclass(frozen=True)
class _Global:
    name: str  # "module name"


@dataclass(frozen=True)
class _Storage:
    tag: str | None  # None: untyped
    itemsize: int
    key: str
    count: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    tag: str
    itemsize: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_ORDERED_DICT = "collections OrderedDict"
_TENSOR_V2 = "torch._utils _rebuild_tensor_v2"
_TENSOR_V3 = "torch._utils _rebuild_tensor_v3"
_PARAMETER = "torch._utils _rebuild_parameter"
_UNTYPED = "torch.storage UntypedStorage"
_GLOBALS = {_ORDERED_DICT, _TENSOR_V2, _TENSOR_V3, _PARAMETER, _UNTYPED}
_GLOBALS |= {f"torch {name}" for name in (*STORAGES, *DTYPES)}

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES"),
}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


def _read_pickle(data: bytes) -> Any:
    try:
        return _run(data)
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise TorchFileError(f"its data.pkl is corrupt ({type(error).__name__}: {error})") from error


def _run(data: bytes) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def pop_to_mark() -> list[Any]:
        items = []
        while (item := stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    for opcode, arg, _ in pickletools.genops(data):
        name = opcode.name
        if name in ("PROTO", "FRAME"):
            continue
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _LITERALS:
            stack.append(arg)
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[arg] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "TUPLE":
            stack.append(tuple(pop_to_mark()))
        elif name in _TUPLES:
            first = len(stack) - _TUPLES[name]
            stack[first:] = [tuple(stack[first:])]
        elif name == "APPEND":
            _append(stack[-2], [stack.pop()])
        elif name == "APPENDS":
            items = pop_to_mark()
            _append(stack[-1], items)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _set(stack[-1], [key, value])
        elif name == "SETITEMS":
            items = pop_to_mark()
            _set(stack[-1], items)
        elif name == "GLOBAL":
            stack.append(_find(arg))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_find(f"{module} {attribute}"))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name == "REDUCE":
            args, function = stack.pop(), stack.pop()
            stack.append(_reduce(function, args))
        elif name == "BUILD":  # attributes of an OrderedDict: `_metadata` of Module.state_dict(), of no use here
            stack.pop()
            if not isinstance(stack[-1], dict):
                raise TorchFileError(f"refused: its pickle sets the state of {_kind(stack[-1])}; {RESAVE}")
        elif name == "STOP":
            if len(stack) != 1 or stack[0] is _MARK:
                raise ValueError("ends in the middle")
            return stack.pop()
        else:
            raise TorchFileError(f"refused: its pickle uses {name}, which a state dict of tensors never does; {RESAVE}")
    raise ValueError("no end")


def _find(name: str) -> _Global:
    if name not in _GLOBALS:
        raise TorchFileError(
            f"refused: its pickle names {name.replace(' ', '.')!r}, which is no part of a plain state dict "
            f"(nothing was executed). If you trust its origin, {RESAVE}"
        )
    return _Global(name)


def _append(items: Any, more: list[Any]) -> None:
    if not isinstance(items, list):
        raise TypeError("appends to what is no list")
    items += more


def _set(items: Any, more: list[Any]) -> None:
    if not isinstance(items, dict) or len(more) % 2:
        raise TypeError("sets items of what is no dict")
    for key, value in zip(more[::2], more[1::2], strict=True):
        # Hashing nested tuples that share their parts takes time exponential in the pickle's length.
        if type(key) not in (str, int):
            raise TypeError(f"a dict key of type {type(key).__name__}")
        items[key] = value


def _storage(persistent_id: Any) -> _Storage:
    kind, cls, key, _, count = persistent_id
    if kind != "storage" or type(cls) is not _Global or type(key) is not str or type(count) is not int or count < 0:
        raise ValueError("a reference that is no storage")
    if cls.name == _UNTYPED:
        return _Storage(None, 1, key, count)
    return _Storage(*STORAGES[cls.name.removeprefix("torch ")], key, count)


def _reduce(function: Any, args: Any) -> Any:
    if type(function) is not _Global or type(args) is not tuple:
        raise TypeError("calls what is no function")
    if function.name == _ORDERED_DICT and args == ():
        return {}
    if function.name == _PARAMETER and len(args) == 3 and isinstance(args[0], _Tensor):
        return args[0]
    if function.name not in (_TENSOR_V2, _TENSOR_V3):
        raise TypeError(f"calls {function.name.replace(' ', '.')} with {len(args)} arguments")
    storage, offset, shape, strides, _, _, *rest = args
    if type(storage) is not _Storage:
        raise TypeError("a tensor without a storage")
    tag, itemsize = storage.tag, storage.itemsize
    if function.name == _TENSOR_V3:
        dtype, *rest = rest
        tag, itemsize = DTYPES[dtype.name.removeprefix("torch ")] if type(dtype) is _Global else (None, 1)
    if tag is None:
        raise TypeError("a tensor without a dtype")
    if any(rest):  # {"conj": True} or {"neg": True}: the stored numbers are not the tensor's
        raise TorchFileError(f"holds a lazily conjugated or negated tensor; resolve it and {RESAVE}")
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError("a tensor's offset, shape or strides are no natural numbers")
    return _Tensor(storage, tag, itemsize, offset, tuple(shape), tuple(strides))


def _kind(value: Any) -> str:
    names = {_Global: "a function or class", _Tensor: "a bare tensor", _Storage: "a bare storage"}
    return names.get(type(value), f"a value of type {type(value).__name__}")
