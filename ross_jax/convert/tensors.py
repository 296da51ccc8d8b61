"""Weights of a checkpoint as named arrays, from safetensors or torch files, single or sharded.

Opening reads headers only. Each tensor is read when asked for, into memory of its own: checkpoints have tens of
gigabytes. `safetensors_writer` writes them.
"""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ross_jax.config import UserError
from ross_jax.convert import torch_pickle
from ross_jax.convert.dtypes import DTYPES
from ross_jax.convert.recognise import FETCH, LFS_POINTER
from ross_jax.json_text import load_json, parse_json
from ross_jax.storage import is_remote, local_copy, location, read_range

STEMS = ("model", "pytorch_model", "diffusion_pytorch_model")
"""Names of weight files without their suffix, in order of preference."""
_TORCH_SUFFIXES = (".bin", ".pt", ".pth")
MAX_HEADER_BYTES = 2**24
"""Most bytes of a safetensors header, enough for 100,000 tensors. Its reader can take thirty times as much memory."""


class TensorError(UserError):
    """Weights that cannot be read or written. The message lists all `problems`."""

    def __init__(self, *problems: str):
        self.problems = list(problems)
        many = f"{len(problems)} problems with the weights:\n  - " + "\n  - ".join(problems)
        super().__init__(problems[0] if len(problems) == 1 else many)


@dataclass(frozen=True)
class TensorInfo:
    """Header entry of a tensor.

    Attributes:
      tag: safetensors' name of the dtype, for torch files too. Not in `DTYPES` if NumPy cannot hold it (F8_E4M3).
      shape: number of elements along each axis.
      file: file that holds the tensor.
    """

    tag: str
    shape: tuple[int, ...]
    file: Path

    @property
    def dtype(self) -> np.dtype:
        """NumPy dtype of the tensor."""
        return DTYPES[self.tag]


class TensorFiles(Mapping[str, TensorInfo]):
    """All tensors of one or several weight files: name -> `TensorInfo`. `read` returns the arrays.

    Reading is safe from several threads. Close it, or use it as a context manager.
    """

    def __init__(self, files: Sequence[Path], assigned: Mapping[str, Path] | None = None):
        """Opens `files` and reads their headers.

        Args:
          files: safetensors or torch files.
          assigned: tensor -> the file that must hold it, from an index.

        Raises:
          TensorError: lists every missing or damaged file, and every tensor that is missing or in two files.
        """
        self._infos: dict[str, TensorInfo] = {}
        self._readers: dict[str, Callable[[], np.ndarray]] = {}
        self._opened = contextlib.ExitStack()
        problems, unreadable = [], set()
        for file in files:
            try:
                entries = self._open(file)
            except TensorError as error:
                problems += error.problems
                unreadable.add(file)
                continue
            for key, (info, reader) in entries.items():
                if key in self._infos:
                    problems.append(f"tensor {key!r} is in {self._infos[key].file} and in {file}")
                self._infos[key], self._readers[key] = info, reader
        for key, file in (assigned or {}).items():
            if file not in unreadable and (key not in self._infos or self._infos[key].file != file):
                problems.append(f"{file}: lacks the tensor {key!r} that the index assigns to it")
        if problems:
            self.close()
            raise TensorError(*problems)

    def _open(self, file: Path) -> dict[str, tuple[TensorInfo, Callable[[], np.ndarray]]]:
        """Name -> (header entry, function that reads the tensor)."""
        try:
            with file.open("rb") as start:
                if start.read(len(LFS_POINTER)) == LFS_POINTER:
                    raise TensorError(f"{file}: a git-lfs pointer, not the weights; {FETCH}")
                start.seek(0)
                header_bytes = int.from_bytes(start.read(8), "little")
            if file.suffix == ".safetensors" and is_remote(file):
                return _remote_tensors(file)
            if file.suffix == ".safetensors":
                if header_bytes > MAX_HEADER_BYTES:
                    raise SafetensorError(f"a header of {header_bytes} bytes")
                # Memory-mapped pages would count as the process's memory, so the file is read instead.
                opened = self._opened.enter_context(safe_open(file, "numpy", backend="pread"))
                headers = {key: opened.get_slice(key) for key in opened.offset_keys()}
                return {
                    key: (
                        TensorInfo(header.get_dtype(), tuple(header.get_shape()), file),
                        functools.partial(opened.get_tensor, key),
                    )
                    for key, header in headers.items()
                }
            if file.suffix in _TORCH_SUFFIXES:
                handle = self._opened.enter_context(self._opened.enter_context(local_copy(file)).open("rb"))
                layout = torch_pickle.read_layout(handle)
                return {
                    key: (TensorInfo(tensor.tag, tensor.shape, file), functools.partial(tensor.read, handle))
                    for key, tensor in layout.items()
                }
            raise TensorError(f"{file}: not a name of weights, which end in .safetensors, .bin, .pt or .pth")
        except torch_pickle.TorchFileError as error:
            raise TensorError(*[f"{file}: {problem}" for problem in error.problems]) from error
        except SafetensorError as error:
            raise TensorError(
                f"{file}: truncated, or not a safetensors file ({error}); download or copy it again"
            ) from error
        except FileNotFoundError as error:
            raise TensorError(f"{file}: missing") from error
        except OSError as error:
            raise TensorError(f"{file}: {error.strerror or error}") from error

    def __getitem__(self, key: str) -> TensorInfo:
        return self._infos[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def read(self, key: str) -> np.ndarray:
        """Reads a tensor into a new C-contiguous array of the file's dtype and shape.

        Raises:
          TensorError: the file cannot be read, has changed since it was opened, or NumPy cannot hold the tensor.
        """
        tag, file = self[key].tag, self[key].file
        if tag not in DTYPES:
            raise TensorError(f"{file}: the tensor {key!r} has dtype {tag}; {', '.join(DTYPES)} are read")
        try:
            return self._readers[key]()
        except (SafetensorError, torch_pickle.TorchFileError, OSError, ValueError) as error:
            raise TensorError(f"{file}: cannot read the tensor {key!r} ({error})") from error

    def renamed(self, names: Mapping[str, str]) -> "TensorFiles":
        """Some of the tensors under other names: new name -> name here. Closing either closes the files of both."""
        view = TensorFiles(())
        view._infos = {new: self._infos[old] for new, old in names.items()}
        view._readers = {new: self._readers[old] for new, old in names.items()}
        view._opened = self._opened
        return view

    def close(self) -> None:
        """Closes the files."""
        self._opened.close()

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _remote_tensors(file: Path) -> dict[str, tuple[TensorInfo, Callable[[], np.ndarray]]]:
    """Name -> (header entry, function that reads the tensor) of a safetensors file in a bucket, by ranges of bytes."""
    length = int.from_bytes(read_range(file, 0, 8), "little")
    try:
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes")
        header = parse_json(read_range(file, 8, length), MAX_HEADER_BYTES)
        header.pop("__metadata__", None)
        size, end, entries = file.stat().st_size - 8 - length, 0, {}
        for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            tag, shape, (begin, end_of_entry) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if begin != end or (tag in DTYPES and math.prod(shape) * DTYPES[tag].itemsize != end_of_entry - begin):
                raise ValueError(f"{key!r} has other bytes than its shape")
            end, place = end_of_entry, (8 + length + begin, end_of_entry - begin)
            entries[key] = TensorInfo(tag, shape, file), functools.partial(_read_remote, file, place, tag, shape)
        if end != size:
            raise ValueError(f"{size} bytes of tensors instead of {end}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TensorError(
            f"{file}: truncated, or not a safetensors file ({error}); download or copy it again"
        ) from error
    return entries


def _read_remote(file: Path, place: tuple[int, int], tag: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(bytearray(read_range(file, *place)), DTYPES[tag]).reshape(shape)


def open_tensors(path: Path | str) -> TensorFiles:
    """Opens the weights of a folder (see `find_weights`), of an index or of a single file.

    Raises:
      TensorError: nothing found, or the weights cannot be used.
    """
    found = find_weights(path)
    if found.suffix != ".json":
        return TensorFiles([found])
    assigned = _read_index(found)
    return TensorFiles(sorted(set(assigned.values())), assigned)


def find_weights(path: Path | str) -> Path:
    """Finds the file that stands for the weights at `path`: a weight file, or the index of sharded ones.

    A file stands for itself. In a folder, safetensors come before torch files, then earlier `STEMS` before later ones;
    a variant (`model.fp16.safetensors`) is taken where it is the only one and nothing is there without a variant.

    Raises:
      TensorError: no such path, no weights in the folder, or several that only the user can choose from.
    """
    path = location(path)
    if path.is_file():
        return path
    try:
        present = sorted(entry.name for entry in path.iterdir())
    except FileNotFoundError as error:
        raise TensorError(f"{path}: does not exist") from error
    except OSError as error:
        raise TensorError(f"{path}: {error.strerror or error}") from error
    for suffix in ("safetensors", "bin"):
        for stem in STEMS:
            single, index = path / f"{stem}.{suffix}", path / f"{stem}.{suffix}.index.json"
            if index.name in present:
                if single.name in present and single not in _read_index(index).values():
                    raise TensorError(f"{path}: holds both {single.name} and {index.name}; name the one to use")
                return index
            if single.name in present:
                return single
    stems = "|".join(STEMS)
    for suffix in ("safetensors", "bin"):
        # A dash would be a shard: model.fp16-00001-of-00002.safetensors.
        variant = re.compile(rf"({stems})\.([^.-]+\.{suffix}(\.index\.json)?|{suffix}\.index\.[^.]+\.json)")
        variants = [name for name in present if variant.fullmatch(name)]
        if len(variants) == 1:
            return path / variants[0]
        if variants:
            raise TensorError(f"{path}: holds several variants, name the one to use: {', '.join(variants)}")
    looked_for = ", ".join(f"{stem}.{suffix}" for suffix in ("safetensors", "bin") for stem in STEMS)
    others = [name for name in present if name.endswith((".safetensors", *_TORCH_SUFFIXES, ".index.json"))]
    found = f"it holds {', '.join(others[:8])}{', ...' if others[8:] else ''}" if others else "it holds no weight file"
    raise TensorError(f"{path}: no weights; looked for {looked_for} (or a .index.json of shards), {found}")


def _read_index(index: Path) -> dict[str, Path]:
    """Tensor -> the shard that holds it."""
    try:
        with index.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise TensorError(f"{index}: a git-lfs pointer, not the index; {FETCH}")
        content = load_json(index)
    except OSError as error:
        raise TensorError(f"{index}: {error.strerror or error}") from error
    except ValueError as error:
        raise TensorError(f"{index}: corrupt index: no valid JSON ({error})") from error
    weight_map: Any = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise TensorError(f"{index}: corrupt index: no weight_map of tensors to files")
    # A name with a folder in it might lead out of the checkpoint.
    bad = [file for file in weight_map.values() if not isinstance(file, str) or Path(file).name != file]
    if bad:
        raise TensorError(f"{index}: corrupt index: {bad[0]!r} is no file name in its folder")
    return {key: index.parent / file for key, file in weight_map.items()}
