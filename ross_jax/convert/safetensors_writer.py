"""Writing safetensors files tensor by tensor, byte for byte as the safetensors library writes them whole."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ross_jax.convert.tensors import CHUNK_BYTES, DTYPES, TAGS, TensorError, tensor_bytes

ORDER = {tag: i for i, tag in enumerate(DTYPES)}


@dataclass
class _Shard:
    """A file: its header, where each of its tensors begins, and its size, all in bytes."""

    file: Path
    header: bytes
    starts: dict[str, int]
    size: int
    handle: BinaryIO | None = None

    @property
    def partial(self) -> Path:
        return self.file.with_name(self.file.name + ".partial")


class SafetensorsWriter:
    """Writes safetensors files whose layout is declared first; the tensors then come in any order, each once.

    One file `{stem}.safetensors` if the tensors fit into `max_shard_bytes`, else `{stem}-00001-of-0000N.safetensors`
    and `{stem}.safetensors.index.json`, filled in the order of `infos`. The files get their names only when `close` has
    them complete and on the disk: until then they end in `.partial`. As a context manager it closes, or discards
    everything after an exception.
    """

    def __init__(
        self,
        folder: Path,
        stem: str,
        infos: Mapping[str, tuple[Any, Sequence[int]]],
        max_shard_bytes: int = 5 * 10**9,
        metadata: Mapping[str, str] | None = None,
    ):
        """Lays out and creates the files.

        Args:
          folder: created if need be. It must not hold weights of the same stem.
          stem: "model", or "diffusion_pytorch_model" for diffusers.
          infos: name -> (numpy dtype or safetensors tag, shape).
          max_shard_bytes: tensor bytes per file; a larger tensor has a file of its own.
          metadata: strings for the header; None means {"format": "pt"}, which transformers asks for; {} means none.

        Raises:
          TensorError: dtypes that safetensors lacks, a folder that holds such weights already, an error of the disk.
        """
        self.folder = Path(folder)
        self._stem = stem
        self._infos = self._declare(infos)
        self._missing = dict.fromkeys(self._infos)  # an ordered set
        self._state = "open"
        groups = self._group(max_shard_bytes)
        names = [f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
        if len(groups) == 1:
            names = [f"{stem}.safetensors"]
        metadata = {"format": "pt"} if metadata is None else dict(metadata)
        self._shards = [
            self._lay_out(self.folder / name, keys, metadata) for name, keys in zip(names, groups, strict=True)
        ]
        self._shard_of = {key: shard for shard in self._shards for key in shard.starts}
        with self._discarding():
            self._create()

    def _declare(self, infos: Mapping[str, tuple[Any, Sequence[int]]]) -> dict[str, tuple[str, tuple[int, ...]]]:
        declared, problems = {}, []
        for key, (dtype, shape) in infos.items():
            tag = dtype if isinstance(dtype, str) and dtype in DTYPES else TAGS.get(np.dtype(dtype))
            if key == "__metadata__" or any("\ud800" <= c <= "\udfff" for c in key):  # surrogates: not in UTF-8
                problems.append(f"{self.folder}: no tensor can be named {key!r}")
            elif tag is None:
                problems.append(f"{self.folder}: tensor {key!r}: safetensors has no dtype {np.dtype(dtype)}")
            else:
                declared[key] = (tag, tuple(int(n) for n in shape))
        if problems:
            raise TensorError(*problems)
        return declared

    def _group(self, max_shard_bytes: int) -> list[list[str]]:
        groups: list[list[str]] = [[]]
        filled = 0
        for key, info in self._infos.items():
            size = tensor_bytes(*info)
            if groups[-1] and filled + size > max_shard_bytes:
                groups.append([])
                filled = 0
            groups[-1].append(key)
            filled += size
        return groups

    def _lay_out(self, file: Path, keys: Sequence[str], metadata: Mapping[str, str]) -> _Shard:
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        begins, position = {}, 0
        # The library's order: the most aligned dtypes first, then by name.
        for key in sorted(keys, key=lambda key: (-ORDER[self._infos[key][0]], key)):
            tag, shape = self._infos[key]
            begins[key], end = position, position + tensor_bytes(tag, shape)
            header[key] = {"dtype": tag, "shape": shape, "data_offsets": [position, end]}
            position = end
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        data = 8 + len(text)
        starts = {key: data + begin for key, begin in begins.items()}
        return _Shard(file, len(text).to_bytes(8, "little") + text, starts, data + position)

    def _create(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        ours = re.compile(rf"{re.escape(self._stem)}(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
        present = sorted(entry.name for entry in self.folder.iterdir() if ours.fullmatch(entry.name))
        if present:
            raise TensorError(
                f"{self.folder}: already holds {', '.join(present)}; remove them or choose another folder"
            )
        for shard in self._shards:
            shard.handle = shard.partial.open("wb", buffering=0)
            os.truncate(shard.handle.fileno(), shard.size)
            self._put(shard, np.frombuffer(shard.header, np.uint8), 0)

    def write(self, key: str, array: np.ndarray) -> None:
        """Writes a tensor of the declared dtype and shape; TensorError if it differs, is undeclared or came before."""
        array = np.asarray(array)
        tag, shape = self._expect(key)
        if DTYPES[tag] is None or array.dtype != DTYPES[tag] or array.shape != shape:
            raise TensorError(
                f"{self.folder}: tensor {key!r} is declared as {tag} {list(shape)}, "
                f"but {array.dtype} {list(array.shape)} came"
            )
        self.write_raw(key, np.ascontiguousarray(array).reshape(-1).view(np.uint8))

    def write_raw(self, key: str, data: np.ndarray) -> None:
        """Writes a tensor's bytes, uint8 [bytes] in C order as of `TensorFiles.read_raw`. Errors as `write`."""
        size = tensor_bytes(*self._expect(key))
        if data.dtype != np.uint8 or data.shape != (size,):
            raise TensorError(
                f"{self.folder}: tensor {key!r} takes uint8 [{size}], but {data.dtype} {list(data.shape)} came"
            )
        shard = self._shard_of[key]
        with self._discarding():
            self._put(shard, data, shard.starts[key])
        del self._missing[key]

    def _expect(self, key: str) -> tuple[str, tuple[int, ...]]:
        if self._state != "open":
            raise TensorError(f"{self.folder}: tensor {key!r} comes after the files were {self._state}")
        if key not in self._missing:
            fault = "was written before" if key in self._infos else "was not declared"
            raise TensorError(f"{self.folder}: tensor {key!r} {fault}")
        return self._infos[key]

    @staticmethod
    def _put(shard: _Shard, data: np.ndarray, position: int) -> None:
        view = memoryview(np.ascontiguousarray(data))
        while view.nbytes:
            written = os.pwrite(shard.handle.fileno(), view[:CHUNK_BYTES], position)
            view, position = view[written:], position + written

    def close(self) -> None:
        """Completes the files and gives them their names.

        Raises:
          TensorError: declared tensors never came (all are named), or an error of the disk; no files are left then.
        """
        if self._state == "closed":
            return
        if self._state == "discarded":
            raise TensorError(f"{self.folder}: the files were discarded after an error")
        with self._discarding():
            if self._missing:
                problems = [f"{self.folder}: tensor {key!r} was declared but not written" for key in self._missing]
                raise TensorError(*problems)
            for shard in self._shards:
                os.fsync(shard.handle.fileno())
                shard.handle.close()
            for shard in self._shards:
                shard.partial.rename(shard.file)
            if len(self._shards) > 1:
                self._write_index()
            descriptor = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # makes the names durable
            finally:
                os.close(descriptor)
        self._state = "closed"

    def _write_index(self) -> None:
        total = sum(tensor_bytes(*info) for info in self._infos.values())
        weight_map = {key: self._shard_of[key].file.name for key in sorted(self._infos)}
        file = self.folder / f"{self._stem}.safetensors.index.json"
        partial = file.with_name(file.name + ".partial")
        with partial.open("w", encoding="utf-8") as handle:
            json.dump({"metadata": {"total_size": total}, "weight_map": weight_map}, handle, indent=2)
            handle.write("\n")
            handle.flush()
            os.fsync(handle.fileno())
        partial.rename(file)

    def discard(self) -> None:
        """Removes what was written; does nothing after `close`."""
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
