"""Writing safetensors files tensor by tensor, byte for byte as the safetensors library writes them whole.

The library has no streaming writer: its `save_file` takes all tensors of a file at once, more than memory may hold.
"""

import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ross_jax.convert.dtypes import DTYPES
from ross_jax.convert.tensors import TensorError
from ross_jax.storage import copy_file, is_remote, location

_ORDER = {tag: i for i, tag in enumerate(DTYPES)}
_CHUNK_BYTES = 2**24
"""Largest piece of one write: Linux writes less than 2 GiB at once."""


def _tensor_bytes(tag: str, shape: Sequence[int]) -> int:
    return math.prod(shape) * DTYPES[tag].itemsize


@dataclass
class _Shard:
    """A file that is being written.

    Attributes:
      file: name that it gets when it is complete.
      header: its first bytes.
      starts: position of each tensor, in bytes.
      size: size of the file, in bytes.
      handle: the open file, under the name `partial`.
      missing: names of the tensors that have not come.
      temporary: folder of this machine for a file that goes to a bucket.
    """

    file: Path
    header: bytes
    starts: dict[str, int]
    size: int
    handle: BinaryIO | None = None
    missing: set[str] = field(default_factory=set)
    temporary: Path | None = None

    @property
    def partial(self) -> Path:
        if self.temporary is not None:
            return self.temporary / self.file.name
        return self.file.with_name(self.file.name + ".partial")


class SafetensorsWriter:
    """Writer of safetensors files. Their layout is declared first; the tensors then come in any order, each once.

    Tensors that fit into `max_shard_bytes` make one file `{stem}.safetensors`. Others are spread over
    `{stem}-00001-of-0000N.safetensors`, in the order of `infos`, with a `{stem}.safetensors.index.json`. The files end
    in `.partial` until `close` has them complete and on the disk. As a context manager the writer closes itself, or
    discards everything after an exception.
    """

    def __init__(
        self,
        folder: Path,
        stem: str,
        infos: Mapping[str, tuple[str, Sequence[int]]],
        max_shard_bytes: int = 5 * 10**9,
    ):
        """Lays out and creates the files.

        Args:
          folder: created if need be. It must not hold weights of the same stem.
          stem: "model", or "diffusion_pytorch_model" for diffusers.
          infos: name -> (tag of the dtype, shape).
          max_shard_bytes: tensor bytes per file. A larger tensor has a file of its own.

        Raises:
          TensorError: names that a file cannot hold, a folder that holds such weights already, an error of the disk.
        """
        self.folder = location(folder)
        self._temporary = tempfile.TemporaryDirectory(prefix="ross_jax_") if is_remote(folder) else None
        self._stem = stem
        self._infos = {key: (tag, tuple(shape)) for key, (tag, shape) in infos.items()}
        # Surrogates have no place in UTF-8.
        bad = [key for key in infos if key == "__metadata__" or any("\ud800" <= c <= "\udfff" for c in key)]
        if bad:
            raise TensorError(*[f"{self.folder}: no tensor can be named {key!r}" for key in bad])
        self._missing = dict.fromkeys(self._infos)  # an ordered set
        self._state = "open"
        groups = self._group(max_shard_bytes)
        names = [f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
        if len(groups) == 1:
            names = [f"{stem}.safetensors"]
        self._shards = [self._lay_out(self.folder / name, keys) for name, keys in zip(names, groups, strict=True)]
        self._shard_of = {key: shard for shard in self._shards for key in shard.starts}
        with self._discarding():
            self._create()

    def _group(self, max_shard_bytes: int) -> list[list[str]]:
        groups: list[list[str]] = [[]]
        filled = 0
        for key, info in self._infos.items():
            size = _tensor_bytes(*info)
            if groups[-1] and filled + size > max_shard_bytes:
                groups.append([])
                filled = 0
            groups[-1].append(key)
            filled += size
        return groups

    def _lay_out(self, file: Path, keys: Sequence[str]) -> _Shard:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
        begins, position = {}, 0
        for key in sorted(keys, key=lambda key: (-_ORDER[self._infos[key][0]], key)):  # as the library does
            tag, shape = self._infos[key]
            begins[key], end = position, position + _tensor_bytes(tag, shape)
            header[key] = {"dtype": tag, "shape": shape, "data_offsets": [position, end]}
            position = end
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        data = 8 + len(text)
        starts = {key: data + begin for key, begin in begins.items()}
        return _Shard(file, len(text).to_bytes(8, "little") + text, starts, data + position)

    def _create(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        names = re.compile(rf"{re.escape(self._stem)}(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
        present = sorted(entry.name for entry in self.folder.glob("*") if names.fullmatch(entry.name))
        if present:
            raise TensorError(
                f"{self.folder}: already holds {', '.join(present)}; remove them or choose another folder"
            )
        for shard in self._shards:
            shard.missing = set(shard.starts)
            if self._temporary is not None:
                shard.temporary = Path(self._temporary.name)
            shard.handle = shard.partial.open("wb", buffering=0)
            os.truncate(shard.handle.fileno(), shard.size)
            self._put(shard, np.frombuffer(shard.header, np.uint8), 0)

    def write(self, key: str, array: np.ndarray) -> None:
        """Writes a tensor.

        Raises:
          TensorError: the dtype or shape differs from the declared, the tensor was not declared or came before, or an
            error of the disk, after which no files are left.
        """
        array = np.asarray(array)
        tag, shape = self._expect(key)
        if array.dtype != DTYPES[tag] or array.shape != shape:
            raise TensorError(
                f"{self.folder}: tensor {key!r} is declared as {tag} {list(shape)}, "
                f"but {array.dtype} {list(array.shape)} came"
            )
        shard = self._shard_of[key]
        with self._discarding():
            self._put(shard, np.ascontiguousarray(array).reshape(-1).view(np.uint8), shard.starts[key])
            shard.missing.discard(key)
            if self._temporary is not None and not shard.missing:
                self._upload(shard)
        del self._missing[key]

    def _upload(self, shard: _Shard) -> None:
        """Moves a complete file to its bucket, so that the disk holds few at once."""
        shard.handle.close()
        copy_file(shard.partial, shard.file)
        shard.partial.unlink()

    def _expect(self, key: str) -> tuple[str, tuple[int, ...]]:
        if self._state != "open":
            raise TensorError(f"{self.folder}: tensor {key!r} comes after the files were {self._state}")
        if key not in self._missing:
            fault = "was written before" if key in self._infos else "was not declared"
            raise TensorError(f"{self.folder}: tensor {key!r} {fault}")
        return self._infos[key]

    @staticmethod
    def _put(shard: _Shard, data: np.ndarray, position: int) -> None:
        view = memoryview(data)
        while view.nbytes:
            written = os.pwrite(shard.handle.fileno(), view[:_CHUNK_BYTES], position)
            view, position = view[written:], position + written

    def close(self) -> None:
        """Completes the files and gives them their names.

        Raises:
          TensorError: declared tensors never came, all of which are named, or an error of the disk. No files are left.
        """
        if self._state == "closed":
            return
        if self._state == "discarded":
            raise TensorError(f"{self.folder}: the files were discarded after an error")
        with self._discarding():
            if self._missing:
                problems = [f"{self.folder}: tensor {key!r} was declared but not written" for key in self._missing]
                raise TensorError(*problems)
            if self._temporary is None:
                self._rename()
            for shard in self._shards if self._temporary is not None else ():
                if not shard.starts:
                    self._upload(shard)
            if len(self._shards) > 1:
                self._write_index()
            if self._temporary is None:
                self._sync_folder()
        if self._temporary is not None:
            self._temporary.cleanup()
        self._state = "closed"

    def _rename(self) -> None:
        for shard in self._shards:
            os.fsync(shard.handle.fileno())
            shard.handle.close()
        for shard in self._shards:
            shard.partial.rename(shard.file)

    def _sync_folder(self) -> None:
        """Makes the names durable."""
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _write_index(self) -> None:
        total = sum(_tensor_bytes(*info) for info in self._infos.values())
        weight_map = {key: self._shard_of[key].file.name for key in sorted(self._infos)}
        file = self.folder / f"{self._stem}.safetensors.index.json"
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"
        if is_remote(file):
            file.write_text(text)
            return
        partial = file.with_name(file.name + ".partial")
        with partial.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        partial.rename(file)

    def discard(self) -> None:
        """Removes the files, unless `close` has completed them."""
        if self._state != "open":
            return
        self._state = "discarded"
        for shard in self._shards:
            if shard.handle is not None:
                shard.handle.close()
                for file in (shard.partial, shard.file):  # `file` if `close` failed after renaming
                    with suppress(OSError):
                        file.unlink()

    @contextmanager
    def _discarding(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.discard()
            if isinstance(error, OSError):
                raise TensorError(f"{error.filename or self.folder}: {error.strerror or error}") from error
            raise

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()
