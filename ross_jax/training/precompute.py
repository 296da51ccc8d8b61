"""Makes a cache: runs a recipe's frozen components over every image of its data, once."""

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

from ross_jax.config import Count, Size, UserError, Whole
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
from ross_jax.directories import lock
from ross_jax.sharding import MeshConfig, batch_sharding, make_mesh
from ross_jax.storage import is_remote
from ross_jax.training.cached import PartName, compute, describe, find_part, parameters_hash, refuse_differences
from ross_jax.training.recipe import RunConfig
from ross_jax.training.run import initial_parameters, open_data
from ross_jax.training.state import Tree

Report = Callable[[str], None]

_SECONDS = 5.0
"""Time between two lines of progress."""


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """How a cache is made.

    Attributes:
      what: parts of the cache.
      rows: images that are computed at once, rounded up to a multiple of the devices.
      dtype: of stored targets. Features have the dtype that the step computes in.
      processes, process: several processes make a cache together, each on its own devices and without knowing of the
        others. Process p writes the shards s with `s % processes == p`. The last one to end completes the cache.
      shard_bytes: approximate size of a file.
    """

    what: tuple[PartName, ...] = ("targets",)
    rows: Size = 64
    dtype: Literal["float32", "bfloat16"] = "float32"
    processes: Size = 1
    process: Whole = 0
    shard_bytes: Count = SHARD_BYTES

    def __post_init__(self):
        if not self.what or len(set(self.what)) < len(self.what):
            raise ValueError(f"what {list(self.what)}: name targets, features, or both")
        if self.rows < 1:
            raise ValueError(f"rows {self.rows}: at least 1")
        if not 0 <= self.process < self.processes:
            raise ValueError(f"process {self.process} of {self.processes}: they are counted from 0")


@dataclasses.dataclass(frozen=True)
class CacheResult:
    """What a call of `precompute` did.

    Attributes:
      images: number of images computed.
      broken: number of samples among them with images that cannot be read.
      seconds: time that computing took.
      missing: number of shards that other processes still have to write.
    """

    images: int
    broken: int
    seconds: float
    missing: int


def precompute(config: RunConfig, folder: Path, settings: CacheConfig, report: Report, progress: Report) -> CacheResult:
    """Writes a cache, or the shards that are missing in it.

    Args:
      config: of a run that would read the cache.
      report: told what will be computed, line by line.
      progress: told warnings, and every few seconds how far it is.

    Raises:
      UserError: the run has no use for a part; a model or data set cannot be read; the folder holds another cache; the
        disk is full; too many images are broken.
    """
    data = dataclasses.replace(config.data, precomputed=None, epochs=1)
    config = dataclasses.replace(config, data=data)
    components = {find_part(config, part).component for part in settings.what}
    pipeline = open_data(config, make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]))
    mesh = make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1))
    rows = -(-settings.rows // mesh.size) * mesh.size
    tree = config.abstract_tree(mesh)
    tree = {name: leaves for name, leaves in tree.items() if name in components}

    def compute_stored(params: Tree, images: Any) -> Tree:
        values = compute(config, settings.what, params, images)
        if "targets" in values:
            values["targets"] = {name: x.astype(settings.dtype) for name, x in values["targets"].items()}
        return values

    side = pipeline.shape.image_size
    shapes = jax.eval_shape(compute_stored, tree, jax.ShapeDtypeStruct((rows, side, side, 3), jnp.uint8))
    arrays = {
        part: {name: ArraySpec(x.shape[1:], str(x.dtype)) for name, x in shapes[part].items()} for part in settings.what
    }
    layout = plan_layout(1 + int(pipeline.lengths.images.sum()), arrays, settings.shard_bytes)
    _estimate(folder, layout, report, progress)
    params, _ = initial_parameters(config, tree)
    made_of = describe(config, settings.what, pipeline)
    for part in settings.what:
        made_of[part]["parameters_hash"] = parameters_hash(params[find_part(config, part).component])
    manifest = _manifest(layout, made_of)
    sharding = batch_sharding(mesh)
    replicated = NamedSharding(mesh, PartitionSpec())
    compiled = jax.jit(compute_stored, in_shardings=(replicated, sharding), out_shardings=sharding)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror})") from error
    with lock(folder / f"process-{settings.process}"), jax.set_mesh(mesh):
        _begin(folder, manifest)
        maker = _Maker(pipeline, layout, lambda images: compiled(params, images), rows, progress)
        share = [s for s in _unwritten(folder, layout) if s % settings.processes == settings.process]
        result = maker.make(folder, share)
        missing = len(_unwritten(folder, layout))
        if not missing:
            _complete(folder, manifest, layout)
    return dataclasses.replace(result, missing=missing)


def _manifest(layout: Layout, made_of: dict[str, Any]) -> dict[str, Any]:
    """The cache's manifest before its files have been written."""
    return {
        "format": FORMAT,
        "records": layout.records,
        "shard_records": layout.shard_records,
        "parts": {
            part: {name: dataclasses.asdict(spec) for name, spec in arrays.items()}
            for part, arrays in layout.parts.items()
        },
        "made_of": made_of,
    }


def _estimate(folder: Path, layout: Layout, report: Report, progress: Report) -> None:
    """Reports what the cache will hold, and warns if the disk has no room for it."""
    report(f"{layout.records - 1} images")
    total = 0
    for part in layout.parts:
        size = layout.records * layout.record_bytes(part)
        content = ", ".join(f"{name} {x.dtype} {list(x.shape)}" for name, x in layout.parts[part].items())
        report(f"{part}: {size / 1e9:.3g} GB in {layout.shards} shards of {content}")
        total += size
    if is_remote(folder):
        return
    existing = next(path for path in (folder, *folder.resolve().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if free < total:
        progress(f"warning: {free / 1e9:.3g} GB are free in {existing}, and {total / 1e9:.3g} GB are to be written")


def _begin(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest of an incomplete cache. Raises UserError if the folder holds something else."""
    for name in (MANIFEST, f"{MANIFEST}.partial"):
        if (folder / name).is_file():
            stored = {key: value for key, value in read_json(folder / name).items() if key != "bytes"}
            refuse_differences(folder, stored, manifest)
            return
    if any(path.name[0] != "." for path in folder.iterdir()):
        raise UserError(f"{folder}: is not empty, and holds no cache; choose another folder")
    write_json(folder / f"{MANIFEST}.partial", manifest)


def _unwritten(folder: Path, layout: Layout) -> list[int]:
    """Numbers of the shards of which a file is missing."""
    there = {path.name for path in folder.iterdir()}
    return [s for s in range(layout.shards) if not all(layout.name(part, s) in there for part in layout.parts)]


def _complete(folder: Path, manifest: dict[str, Any], layout: Layout) -> None:
    """Writes the manifest of the complete cache."""
    names = [layout.name(part, shard) for part in layout.parts for shard in range(layout.shards)]
    write_json(folder / MANIFEST, {**manifest, "bytes": {name: (folder / name).stat().st_size for name in names}})
    (folder / f"{MANIFEST}.partial").unlink(missing_ok=True)


class _Maker:
    """Reads images, computes, and writes shard by shard. The device computes one chunk while another is written."""

    def __init__(self, pipeline: Pipeline, layout: Layout, run: Callable, rows: int, progress: Report):
        self._pipeline, self._layout, self._run, self._rows = pipeline, layout, run, rows
        self._progress = progress
        self._broken = BrokenSamples(int(np.count_nonzero(pipeline.lengths.images)), pipeline.config.max_broken)

    def make(self, folder: Path, shards: list[int]) -> CacheResult:
        """Writes these shards."""
        chunks = [chunk for shard in shards for chunk in self._chunks(shard)]
        total = sum(map(len, chunks))
        started = reported = time.perf_counter()
        done = 0

        def counted(records: Iterator[dict[str, bytes]]) -> Iterator[dict[str, bytes]]:
            nonlocal done, reported
            for record in records:
                done += 1
                now = time.perf_counter()
                if now - reported > _SECONDS or done == total:
                    rate, reported = done / (now - started), now
                    self._progress(f"{done}/{total} images  {rate:.1f}/s  {(total - done) / rate / 60:.1f} min left")
                yield record

        records = counted(self._records(chunks))
        for shard in shards:
            files = {part: folder / self._layout.name(part, shard) for part in self._layout.parts}
            write_shards(files, itertools.islice(records, len(self._layout.span(shard))))
        return CacheResult(total, self._broken.count, time.perf_counter() - started, 0)

    def _chunks(self, shard: int) -> list[range]:
        span = self._layout.span(shard)
        return [span[first : first + self._rows] for first in range(0, len(span), self._rows)]

    def _records(self, chunks: list[range]) -> Iterator[dict[str, bytes]]:
        """Part -> record, image by image in order."""
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

    def _encoded(self, chunk: range, computed: Tree, broken: dict[int, tuple[int, str]]) -> Iterator[dict[str, bytes]]:
        """Part -> record of each image of a chunk."""
        values = jax.tree.map(np.asarray, computed)
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
    """Part -> its bytes on disk, of a complete cache."""
    manifest = read_json(folder / MANIFEST)
    layout = layout_of(manifest)
    return {
        part: sum(manifest["bytes"][layout.name(part, shard)] for shard in range(layout.shards))
        for part in layout.parts
    }
