"""Makes a cache: runs a recipe's frozen components over every picture of its data, once."""

import dataclasses
import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ross_jax import checkpoints
from ross_jax.config import UserError
from ross_jax.data.pipeline import Pipeline
from ross_jax.data.precomputed import (
    FORMAT,
    MANIFEST,
    SHARD_BYTES,
    ArraySpec,
    Layout,
    encode_broken,
    encode_record,
    layout_of,
    plan_layout,
    read_json,
    write_json,
    write_shards,
)
from ross_jax.data.sources import BrokenSamples
from ross_jax.sharding import MeshConfig, batch_sharding, make_mesh
from ross_jax.training.cached import PartName, compute, describe, find_part, parameters_hash, refuse_differences
from ross_jax.training.recipe import RunConfig
from ross_jax.training.run import initial_parameters, open_data
from ross_jax.training.state import Tree, abstract_tree

Report = Callable[[str], None]

_SECONDS = 5.0  # between lines of progress


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """How a cache is made.

    Attributes:
      what: the parts.
      rows: pictures that are computed at once; rounded up to a multiple of the devices.
      dtype: in which targets are stored; features are in the dtype that the step computes in.
      processes, process: several make a cache together, each on devices of its own and without knowing of the others:
        process p writes the shards s with `s % processes == p`, and the last one to end completes the cache.
      shard_bytes: about the size of a file.
    """

    what: tuple[PartName, ...] = ("targets",)
    rows: int = 64
    dtype: Literal["float32", "bfloat16"] = "float32"
    processes: int = 1
    process: int = 0
    shard_bytes: int = SHARD_BYTES

    def __post_init__(self):
        if not self.what or len(set(self.what)) < len(self.what):
            raise ValueError(f"what {list(self.what)}: name targets, features, or both")
        if self.rows < 1:
            raise ValueError(f"rows {self.rows}: at least 1")
        if not 0 <= self.process < self.processes:
            raise ValueError(f"process {self.process} of {self.processes}: they are counted from 0")


@dataclasses.dataclass(frozen=True)
class Made:
    """What a call of `precompute` did.

    Attributes:
      images: that it computed.
      broken: samples among them whose pictures cannot be used.
      seconds: that it took.
      missing: shards that other processes still have to write.
    """

    images: int
    broken: int
    seconds: float
    missing: int


def precompute(config: RunConfig, folder: Path, settings: CacheConfig, report: Report, progress: Report) -> Made:
    """Writes the cache, or what is missing of it: shards that are there are kept.

    Args:
      report: gets what will be made, and what was.
      progress: gets warnings, and lines in between.

    Raises:
      UserError: a part that the run has no use for; a model or data set that cannot be read; a folder with another
        cache; a disk that is full; too many broken pictures.
    """
    parts = settings.what
    components = list(dict.fromkeys(find_part(config, name).component for name in parts))
    data = dataclasses.replace(config.data, precomputed=None, epochs=1)
    config = dataclasses.replace(config, data=data)
    pipeline = open_data(config, make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]))
    mesh = make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1))
    rows = -(-settings.rows // mesh.size) * mesh.size
    tree = abstract_tree(config.model, config.freeze, mesh)
    tree = {name: tree[name] for name in components}

    def run(params: Tree, images: Any) -> Tree:
        made = compute(config, parts, params, images)
        if "targets" in made:
            made["targets"] = {name: x.astype(settings.dtype) for name, x in made["targets"].items()}
        return made

    side = pipeline.shape.image_size
    shapes = jax.eval_shape(run, tree, jax.ShapeDtypeStruct((rows, side, side, 3), jnp.uint8))
    arrays = {
        part: {name: ArraySpec(x.shape[1:], str(x.dtype)) for name, x in values.items()}
        for part, values in shapes.items()
    }
    layout = plan_layout(1 + int(pipeline.lengths.images.sum()), arrays, settings.shard_bytes)
    _estimate(folder, layout, report, progress)
    params, _ = initial_parameters(config, tree)
    made_of = describe(config, parts, pipeline)
    for name in parts:
        made_of[name]["parameters_hash"] = parameters_hash(params[find_part(config, name).component])
    manifest = {
        "format": FORMAT,
        "records": layout.records,
        "shard_records": layout.shard_records,
        "parts": {part: {name: dataclasses.asdict(x) for name, x in arrays[part].items()} for part in parts},
        "made_of": made_of,
    }
    sharding = batch_sharding(mesh)
    compiled = jax.jit(run, in_shardings=(NamedSharding(mesh, PartitionSpec()), sharding), out_shardings=sharding)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror})") from error
    with checkpoints.lock(folder / f"process-{settings.process}"), jax.set_mesh(mesh):
        _begin(folder, manifest)
        maker = _Maker(pipeline, layout, lambda images: compiled(params, images), rows, progress)
        mine = [s for s in _unwritten(folder, layout) if s % settings.processes == settings.process]
        made = maker.make(folder, mine)
        missing = len(_unwritten(folder, layout))
        if not missing:
            _complete(folder, manifest, layout)
    return dataclasses.replace(made, missing=missing)


def _estimate(folder: Path, layout: Layout, report: Report, progress: Report) -> None:
    """Says what the cache will hold, and warns if there is no room for it."""
    report(f"{layout.records - 1} pictures")
    total = 0
    for part in layout.parts:
        size = layout.records * layout.record_bytes(part)
        held = ", ".join(f"{name} {x.dtype} {list(x.shape)}" for name, x in layout.parts[part].items())
        report(f"{part}: {size / 1e9:.3g} GB in {layout.shards} shards of {held}")
        total += size
    existing = next(path for path in (folder, *folder.resolve().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if free < total:
        progress(f"warning: {free / 1e9:.3g} GB are free in {existing}, and {total / 1e9:.3g} GB are to be written")


def _begin(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes down what the folder is for; refuses one that is for something else."""
    for name in (MANIFEST, f"{MANIFEST}.partial"):
        if (folder / name).is_file():
            theirs = {key: value for key, value in read_json(folder / name).items() if key != "bytes"}
            refuse_differences(folder, theirs, manifest)
            return
    if any(path.name[0] != "." for path in folder.iterdir()):
        raise UserError(f"{folder}: is not empty, and holds no cache; choose another folder")
    write_json(folder / f"{MANIFEST}.partial", manifest)


def _unwritten(folder: Path, layout: Layout) -> list[int]:
    """Shards of which a part is not there."""
    shards = range(layout.shards)
    return [s for s in shards if not all((folder / layout.name(part, s)).is_file() for part in layout.parts)]


def _complete(folder: Path, manifest: dict[str, Any], layout: Layout) -> None:
    names = [layout.name(part, shard) for part in layout.parts for shard in range(layout.shards)]
    write_json(folder / MANIFEST, {**manifest, "bytes": {name: (folder / name).stat().st_size for name in names}})
    (folder / f"{MANIFEST}.partial").unlink(missing_ok=True)


class _Maker:
    """Reads pictures, computes, and writes shard by shard; the device works on one chunk while another is written."""

    def __init__(self, pipeline: Pipeline, layout: Layout, run: Callable, rows: int, progress: Report):
        self._pipeline, self._layout, self._run, self._rows = pipeline, layout, run, rows
        self._progress = progress
        self._broken = BrokenSamples(int(np.count_nonzero(pipeline.lengths.images)), pipeline.config.max_broken)

    def make(self, folder: Path, shards: list[int]) -> Made:
        """Writes these shards."""
        chunks = [chunk for shard in shards for chunk in self._chunks(shard)]
        total = sum(map(len, chunks))
        started = told = time.perf_counter()
        done = 0

        def counted(records: Iterator[dict[str, bytes]]) -> Iterator[dict[str, bytes]]:
            nonlocal done, told
            for record in records:
                done += 1
                now = time.perf_counter()
                if now - told > _SECONDS or done == total:
                    rate, told = done / (now - started), now
                    self._progress(f"{done}/{total} pictures  {rate:.1f}/s  {(total - done) / rate / 60:.1f} min left")
                yield record

        records = counted(self._records(chunks))
        for shard in shards:
            files = {part: folder / self._layout.name(part, shard) for part in self._layout.parts}
            write_shards(files, itertools.islice(records, len(self._layout.span(shard))))
        return Made(total, self._broken.count, time.perf_counter() - started, 0)

    def _chunks(self, shard: int) -> list[range]:
        span = self._layout.span(shard)
        return [span[first : first + self._rows] for first in range(0, len(span), self._rows)]

    def _records(self, chunks: list[range]) -> Iterator[dict[str, bytes]]:
        """Every picture's record of every part, in order."""
        ahead = None
        reads = self._pipeline.images(chunks)
        try:
            for chunk, (images, broken) in zip(chunks, reads, strict=True):
                self._broken.update(len({self._pipeline.sample_of(i) for i in chunk if i}), list(broken.values()))
                images = np.pad(images, [(0, self._rows - len(images)), *[(0, 0)] * 3])
                running = chunk, self._run(images), broken
                if ahead is not None:
                    yield from self._encoded(*ahead)
                ahead = running
            if ahead is not None:
                yield from self._encoded(*ahead)
        finally:
            reads.close()

    def _encoded(self, chunk: range, made: Tree, broken: dict[int, tuple[int, str]]) -> Iterator[dict[str, bytes]]:
        values = jax.tree.map(np.asarray, made)
        for row, image_id in enumerate(chunk):
            if image_id in broken:
                yield {part: encode_broken(broken[image_id][1]) for part in values}
            else:
                yield {
                    part: encode_record(
                        self._layout.parts[part], {name: array[row] for name, array in values[part].items()}
                    )
                    for part in values
                }


def sizes(folder: Path) -> dict[str, int]:
    """Bytes on disk of every part of a complete cache."""
    manifest = read_json(folder / MANIFEST)
    layout = layout_of(manifest)
    return {
        part: sum(manifest["bytes"][layout.name(part, shard)] for shard in range(layout.shards))
        for part in layout.parts
    }
