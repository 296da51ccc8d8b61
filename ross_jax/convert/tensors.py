"""The weights of a checkpoint as named arrays, read from safetensors or torch files, whole or sharded.

Files have up to 30 GB, so opening reads headers only, and a tensor is read when asked for, into memory of its own.
Nothing is memory-mapped: mapped pages would count as the process's memory. `safetensors_writer` writes them.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import ml_dtypes
import numpy as np

from ross_jax.config import UserError
from ross_jax.convert import torch_pickle

# safetensors' dtypes in the order of their alignment, by which its library sorts the tensors of a file (largest
# first, then by name). Packed types, several elements to a byte, have no numpy dtype here.
DTYPES: dict[str, np.dtype | None] = {
    "BOOL": np.dtype(np.bool_),
    "F4": None,
    "F6_E2M3": None,
    "F6_E3M2": None,
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "C64": np.dtype(np.complex64),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
}
TAGS = {dtype: tag for tag, dtype in DTYPES.items() if dtype is not None}
PACKED_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}

STEMS = ("model", "pytorch_model", "diffusion_pytorch_model")
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
MAX_RANK = 64  # of numpy
CHUNK_BYTES = 2**24  # of one read or write: bounds what is held beside the tensor, and stays below Linux's 2 GiB


class TensorError(UserError):
    """Weights that cannot be read or written. `problems` lists all that was found; so does the message."""

    def __init__(self, *problems: str):
        self.problems = list(problems)
        many = f"{len(problems)} problems with the weights:\n  - " + "\n  - ".join(problems)
        super().__init__(problems[0] if len(problems) == 1 else many)

    def __str__(self) -> str:
        return self.args[0]


class MissingTensorError(TensorError, KeyError):
    """A tensor that the files do not hold; a KeyError too, as `Mapping` asks for."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file.

    `tag` is safetensors' name of the dtype (for torch files as well), `start` the position of its bytes in the file,
    and `strides` those of torch in elements, None for C order.
    """

    tag: str
    shape: tuple[int, ...]
    file: Path
    start: int
    strides: tuple[int, ...] | None = None

    @property
    def dtype(self) -> np.dtype:
        """The numpy dtype, of ml_dtypes where numpy has none; TensorError for a packed one."""
        dtype = DTYPES[self.tag]
        if dtype is None:
            raise TensorError(f"{self.file}: {self.tag} packs elements into shared bytes; only read_raw reads it")
        return dtype

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.tag, self.shape)


class TensorFiles(Mapping[str, TensorInfo]):
    """All tensors of one or several weight files, by name, in the files' order. Headers are read, data is not.

    Reading is safe from several threads. Close it, or use it as a context manager.

    Attributes:
      format: "safetensors" or "torch".
      metadata: the header's `__metadata__` (of the first file; empty for torch files).
    """

    format: Literal["safetensors", "torch"]
    metadata: dict[str, str]

    def __init__(self, files: Sequence[Path], assigned: Mapping[str, Path] | None = None):
        """Opens `files`; `assigned`, from an index, says which file is to hold which tensor.

        Raises:
          TensorError: lists every missing or damaged file, and every tensor that is missing or in two files.
        """
        self._infos: dict[str, TensorInfo] = {}
        self._handles: dict[Path, BinaryIO] = {}
        self.metadata = {}
        formats = {_format(file) for file in files}
        problems = [] if len(formats) == 1 else [f"{files[0].parent}: mixes safetensors and torch files"]
        unreadable = set()
        for file in files:
            try:
                infos = self._open(file)
            except TensorError as error:
                problems += error.problems
                unreadable.add(file)
                continue
            for key, info in infos.items():
                if key in self._infos:
                    problems.append(f"tensor {key!r} is in {self._infos[key].file} and in {file}")
                self._infos[key] = info
        for key, file in (assigned or {}).items():
            if file not in unreadable and (key not in self._infos or self._infos[key].file != file):
                problems.append(f"{file}: lacks the tensor {key!r} that the index assigns to it")
        if problems:
            self.close()
            raise TensorError(*problems)
        self.format = formats.pop()

    def _open(self, file: Path) -> dict[str, TensorInfo]:
        try:
            handle = self._handles[file] = file.open("rb", buffering=0)
            size = os.fstat(handle.fileno()).st_size
            if os.pread(handle.fileno(), 64, 0).startswith(b"version https://git-lfs"):
                raise TensorError(f"{file}: a git-lfs pointer, not the weights; run `git lfs pull` in its repository")
            if _format(file) == "safetensors":
                infos, metadata = _read_header(handle, size, file)
                self.metadata = self.metadata or metadata
                return infos
            layout = torch_pickle.read_layout(handle, size)
            return {key: TensorInfo(t.tag, t.shape, file, t.start, t.strides) for key, t in layout.items()}
        except torch_pickle.TorchFileError as error:
            raise TensorError(*[f"{file}: {problem}" for problem in error.problems]) from error
        except FileNotFoundError as error:
            raise TensorError(f"{file}: missing") from error
        except OSError as error:
            raise TensorError(f"{file}: {error.strerror or error}") from error

    def __getitem__(self, key: str) -> TensorInfo:
        try:
            return self._infos[key]
        except KeyError:
            where = ", ".join(map(str, self._handles))
            raise MissingTensorError(f"no tensor {key!r} in {where}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def read(self, key: str) -> np.ndarray:
        """The tensor: a new C-contiguous array of the file's dtype and shape.

        Raises:
          TensorError: no such tensor, a packed dtype, or the file cannot be read or has changed since it was opened.
        """
        info = self[key]
        if info.strides is None:
            out = np.empty(info.shape, info.dtype)
            self._fill(out.reshape(-1).view(np.uint8), info)
            return out
        # Other strides (a transposed or sliced tensor of torch): read what they span, then gather.
        span = 1 + sum((n - 1) * step for n, step in zip(info.shape, info.strides, strict=True))
        stored = np.empty(span * info.dtype.itemsize, np.uint8)
        self._fill(stored, info)
        steps = [step * info.dtype.itemsize for step in info.strides]
        return np.ndarray(info.shape, info.dtype, buffer=stored, strides=steps).copy()

    def read_raw(self, key: str) -> np.ndarray:
        """The tensor's bytes in C order, as uint8 [bytes], for every dtype. Errors as `read`."""
        info = self[key]
        if info.strides is not None:
            return self.read(key).reshape(-1).view(np.uint8)
        out = np.empty(info.nbytes, np.uint8)
        self._fill(out, info)
        return out

    def _fill(self, out: np.ndarray, info: TensorInfo) -> None:
        descriptor = self._handles[info.file].fileno()
        position = 0
        while position < out.size:
            try:
                chunk = os.pread(descriptor, min(CHUNK_BYTES, out.size - position), info.start + position)
            except OSError as error:
                raise TensorError(f"{info.file}: {error.strerror or error}") from error
            if not chunk:
                raise TensorError(f"{info.file}: has become shorter since it was opened")
            out[position : position + len(chunk)] = np.frombuffer(chunk, np.uint8)
            position += len(chunk)

    def close(self) -> None:
        for handle in self._handles.values():
            handle.close()

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_tensors(path: Path | str, names: Sequence[str] = STEMS) -> TensorFiles:
    """Opens the weights of a folder (see `find_weights`), of an index or of a single file.

    Raises:
      TensorError: nothing found, or the weights cannot be used.
    """
    found = find_weights(path, names)
    if found.suffix != ".json":
        return TensorFiles([found])
    assigned = _read_index(found)
    return TensorFiles(sorted(set(assigned.values())), assigned)


def find_weights(path: Path | str, names: Sequence[str] = STEMS) -> Path:
    """The file that stands for the weights in `path`: a weight file, or the index of sharded ones.

    A file stands for itself. In a folder, safetensors come before torch files, then earlier `names` before later ones;
    a variant (`model.fp16.safetensors`) is taken where it is the only one and nothing is there without a variant.

    Raises:
      TensorError: no such path, no weights in the folder, or several that only the user can choose from.
    """
    path = Path(path)
    if path.is_file():
        return path
    try:
        present = sorted(entry.name for entry in path.iterdir())
    except FileNotFoundError as error:
        raise TensorError(f"{path}: does not exist") from error
    except OSError as error:
        raise TensorError(f"{path}: {error.strerror or error}") from error
    for suffix in ("safetensors", "bin"):
        for name in names:
            single, index = path / f"{name}.{suffix}", path / f"{name}.{suffix}.index.json"
            if index.name in present:
                if single.name in present and single not in _read_index(index).values():
                    raise TensorError(f"{path}: holds both {single.name} and {index.name}; name the one to use")
                return index
            if single.name in present:
                return single
    stems = "|".join(map(re.escape, names))
    for suffix in ("safetensors", "bin"):
        # A dash would be a shard: model.fp16-00001-of-00002.safetensors.
        variant = re.compile(rf"({stems})\.([^.-]+\.{suffix}(\.index\.json)?|{suffix}\.index\.[^.]+\.json)")
        variants = [name for name in present if variant.fullmatch(name)]
        if len(variants) == 1:
            return path / variants[0]
        if variants:
            raise TensorError(f"{path}: holds several variants, name the one to use: {', '.join(variants)}")
    looked_for = ", ".join(f"{name}.{suffix}" for suffix in ("safetensors", "bin") for name in names)
    others = [name for name in present if name.endswith((".safetensors", ".bin", ".pt", ".pth", ".index.json"))]
    found = f"it holds {', '.join(others[:8])}{', ...' if others[8:] else ''}" if others else "it holds no weight file"
    raise TensorError(f"{path}: no weights; looked for {looked_for} (or a .index.json of shards), {found}")


def _read_index(index: Path) -> dict[str, Path]:
    """The tensors of an index and the shards that hold them."""
    try:
        text = index.read_bytes()
    except OSError as error:
        raise TensorError(f"{index}: {error.strerror or error}") from error
    if text.startswith(b"version https://git-lfs"):
        raise TensorError(f"{index}: a git-lfs pointer, not the index; run `git lfs pull` in its repository")
    content = _parse_json(text, f"{index}: corrupt index")
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise TensorError(f"{index}: corrupt index: no weight_map of tensors to files")
    # A name with a folder in it might lead out of the checkpoint.
    bad = [file for file in weight_map.values() if not isinstance(file, str) or Path(file).name != file]
    if bad:
        raise TensorError(f"{index}: corrupt index: {bad[0]!r} is no file name in its folder")
    return {key: index.parent / file for key, file in weight_map.items()}


def _parse_json(text: bytes, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = {}
        for name, value in pairs:
            if name in values:
                raise ValueError(f"{name!r} appears twice")
            values[name] = value
        return values

    try:
        content = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise TensorError(f"{where}: no valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise TensorError(f"{where}: not a JSON object")
    return content


def _format(file: Path) -> Literal["safetensors", "torch"]:
    if file.suffix == ".safetensors":
        return "safetensors"
    if file.suffix in (".bin", ".pt", ".pth"):
        return "torch"
    raise TensorError(f"{file}: not a name of weights, which end in .safetensors, .bin, .pt or .pth")


def tensor_bytes(tag: str, shape: Sequence[int]) -> int:
    """The bytes of a tensor whose dtype has the safetensors name `tag`."""
    dtype = DTYPES[tag]
    bits = PACKED_BITS[tag] if dtype is None else 8 * dtype.itemsize
    return -(-math.prod(shape) * bits // 8)


# safetensors: 8 bytes with the header's length n (little-endian), n bytes of JSON, and the tensors without gaps.


def _read_header(handle: BinaryIO, size: int, file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors by name in the header's order, and the metadata."""
    head = os.pread(handle.fileno(), 8, 0)
    length = int.from_bytes(head, "little")
    if len(head) < 8:
        raise TensorError(f"{file}: truncated: {size} bytes; download or copy it again")
    if length > MAX_HEADER_BYTES:
        raise TensorError(f"{file}: not a safetensors file: its header would have {length} bytes")
    if 8 + length > size:
        raise TensorError(f"{file}: truncated: the header ends at byte {8 + length}, the file at {size}; copy it again")
    where = f"{file}: not a safetensors file: corrupt header"
    header = _parse_json(os.pread(handle.fileno(), length, 8), where)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or any(not isinstance(value, str) for value in metadata.values()):
        raise TensorError(f"{where}: __metadata__ maps no strings to strings")
    infos, problems, ends = {}, [], []
    for key, entry in header.items():
        try:
            tag, shape, begin, end = _parse_entry(entry)
        except ValueError as error:
            problems.append(f"{file}: tensor {key!r}: {error}")
            continue
        infos[key] = TensorInfo(tag, shape, file, 8 + length + begin)
        ends.append((begin, end, key))
    position = 0
    for begin, end, key in sorted(ends) if not problems else ():
        if begin != position:
            what = "overlaps the tensor before it" if begin < position else "leaves a gap before it"
            problems.append(f"{file}: tensor {key!r} {what}: begins at byte {begin} of the data instead of {position}")
            break
        position = end
    if not problems and 8 + length + position != size:
        fault = "truncated" if size < 8 + length + position else "more than its header lists"
        problems.append(f"{file}: {fault}: {size} bytes instead of {8 + length + position}; download or copy it again")
    if problems:
        raise TensorError(*problems)
    return infos, metadata


def _parse_entry(entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Tag, shape, begin and end in bytes of the data; ValueError says what is wrong."""
    if not isinstance(entry, dict):
        raise ValueError("its entry is not an object")
    tag, shape, offsets = (entry.get(name) for name in ("dtype", "shape", "data_offsets"))
    if not isinstance(tag, str) or tag not in DTYPES:
        raise ValueError(f"unknown dtype {tag!r}")
    for name, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
            raise ValueError(f"its {name} is no list of natural numbers")
    if len(offsets) != 2:
        raise ValueError("its data_offsets is no pair")
    if len(shape) > MAX_RANK or tensor_bytes(tag, [max(n, 1) for n in shape]) >= 2**63:
        raise ValueError("its shape is too large")
    begin, end = offsets
    if end - begin != tensor_bytes(tag, shape):
        raise ValueError(f"{tag} {shape} takes {tensor_bytes(tag, shape)} bytes, its data_offsets span {end - begin}")
    return tag, tuple(shape), begin, end
