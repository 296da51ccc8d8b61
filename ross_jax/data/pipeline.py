"""The data of a run: a sequence of global batches, of which each process reads its share.

Batch number `step` is a function of the plan alone. So the position in the data is the step number, a restored run
reads on at any step, and P processes read, together, the same rows as one: process p has the rows p R / P to
(p + 1) R / P of the R rows of every step.
"""

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags
from grain.experimental import DatasetOptions, WithOptionsIterDataset
from grain.sources import RandomAccessDataSource

from ross_jax.config import UserError, to_dict
from ross_jax.data.batches import Batch, Encoded, Expanded, RowShape, empty_batch, expand, place
from ross_jax.data.cache import hash_arrays, load_arrays, save_arrays
from ross_jax.data.conversation import IMAGE_ID
from ross_jax.data.images import ImageConfig, ImageError, decode, preprocess
from ross_jax.data.packing import Lengths, PackingConfig, PackingPlan, cached_plan, make_plan
from ross_jax.data.precomputed import Precomputed
from ross_jax.data.sources import BrokenSamples, Concatenated, Sample, SampleError, Source, SourceConfig, open_source

logger = logging.getLogger(__name__)

Encode = Callable[[dict[str, Any]], Encoded]

_MEASURED_AT_ONCE = 256  # samples per message from a worker process


@dataclass(frozen=True)
class DataConfig:
    """What a run is fed.

    Attributes:
      sources: one or several, read as one data set.
      packing: the row.
      batch: conversations per step, as in the paper; how many rows that makes follows from the plan.
      epochs, seed: how often, and in which order.
      max_broken: share of broken samples above which the run stops; see `BrokenSamples`.
      workers: processes that read, each a batch of its own; 0: threads of this process, which
        is often enough, since decoding and resizing pictures release the interpreter lock.
      threads: that read, each a batch of its own, if there are no workers.
      prefetch: batches that each worker, or the threads together, hold ready.
      cache: folder for lengths and plans, shared by all processes; None: they are made anew at every start.
      precomputed: folder of `launch/cache.py` with what frozen components make of the pictures, read in their stead;
        pixels are decoded only if something still needs them.
    """

    sources: tuple[SourceConfig, ...]
    packing: PackingConfig = field(default_factory=PackingConfig)
    batch: int = 128
    epochs: int = 1
    seed: int = 0
    max_broken: float = 0.01
    workers: int = 0
    threads: int = 4
    prefetch: int = 2
    cache: str | None = None
    precomputed: str | None = None

    def __post_init__(self):
        if not self.sources:
            raise ValueError("sources is empty; name at least one data set")
        for name in ("batch", "epochs", "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("workers", "threads", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it cannot be negative")
        if not 0 <= self.max_broken <= 1:
            raise ValueError(f"max_broken is {self.max_broken}; it is a share, from 0 to 1")


def expand_sample(sample: Sample, encode: Encode, packing: PackingConfig, image_tokens: int) -> Expanded:
    """A sample's tokens and targets, cut to the row if `packing.too_long` says so.

    Raises:
      SampleError: the record cannot be encoded, or has another number of picture marks than of pictures.
    """
    try:
        encoded = encode(sample.record)
    except UserError as error:
        raise SampleError(str(error)) from error
    marks = np.count_nonzero(encoded.input_ids == IMAGE_ID)
    if marks != len(sample.images):
        raise SampleError(f"sample {sample.id!r}: {marks} picture marks in the text, {len(sample.images)} pictures")
    expanded = expand(encoded, image_tokens, packing if packing.too_long == "truncate" else None)
    if not len(expanded.tokens):
        raise SampleError(f"sample {sample.id!r}: holds nothing, or begins with a picture that fits no row")
    return expanded


def _read_in_order(items: RandomAccessDataSource, start: int, config: DataConfig) -> grain.DatasetIterator:
    """Iterates over `items[start:]` in order, read ahead by threads or worker processes."""
    threads = 0 if config.workers else config.threads
    ahead = max(config.prefetch, threads) if threads else 0
    dataset = grain.MapDataset.source(items)[start:]
    dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead))
    if config.workers:
        if not flags.FLAGS.is_parsed():  # grain's worker processes read absl flags, which not every program parses
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(config.workers, per_worker_buffer_size=config.prefetch)
        dataset = dataset.mp_prefetch(options)
        # Batches come through pipes, which costs milliseconds. Shared memory, grain's default, is 64 MB in a
        # container unless one asks for more, and a worker that exceeds it is killed by SIGBUS.
        dataset = WithOptionsIterDataset(dataset, DatasetOptions(min_shm_size=sys.maxsize))
    return iter(dataset)


class _Measure:
    """Chunks of samples -> their lengths int32 [3, chunk] and what is broken; see `measure_lengths`."""

    def __init__(self, source: Source, encode: Encode, packing: PackingConfig, image_tokens: int):
        self._source, self._encode, self._packing, self._image_tokens = source, encode, packing, image_tokens

    def __len__(self) -> int:
        return -(-len(self._source) // _MEASURED_AT_ONCE)

    def __getitem__(self, chunk: int) -> tuple[np.ndarray, list[tuple[int, str]]]:
        first = chunk * _MEASURED_AT_ONCE
        indices = range(first, min(first + _MEASURED_AT_ONCE, len(self._source)))
        lengths, broken = np.zeros((3, len(indices)), np.int32), []
        for column, index in enumerate(indices):
            try:
                expanded = expand_sample(self._source[index], self._encode, self._packing, self._image_tokens)
            except SampleError as error:
                broken.append((index, str(error)))
            else:
                lengths[:, column] = len(expanded.tokens), len(expanded.image_start), expanded.supervised
        return lengths, broken


def measure_lengths(source: Source, encode: Encode, image_tokens: int, config: DataConfig) -> Lengths:
    """Encodes every sample once, to know what it needs of a row. Pictures are not read.

    Raises:
      UserError: too many samples are broken.
    """
    broken_samples = BrokenSamples(len(source), config.max_broken)
    iterator = _read_in_order(_Measure(source, encode, config.packing, image_tokens), 0, config)
    chunks = []
    try:
        for lengths, broken in iterator:
            broken_samples.update(lengths.shape[1], broken)
            chunks.append(lengths)
    finally:
        iterator.close()
    return Lengths(*np.concatenate(chunks, axis=1))


def cached_lengths(
    source: Source, encode: Encode, image_tokens: int, config: DataConfig, encode_key: str, writer: bool = True
) -> Lengths:
    """`measure_lengths`, kept in `config.cache`. The texts, the encoder and N are part of the file's name.

    Args:
      encode_key: changes when the encoder does: tokenizer, template, compat.
      writer: as in `cached_plan`.
    """
    cut = config.packing if config.packing.too_long == "truncate" else None
    described = json.dumps(["lengths", 1, source.fingerprint, encode_key, image_tokens, str(cut)])
    path = Path(config.cache) / f"lengths-{hashlib.sha256(described.encode()).hexdigest()[:20]}.npz"
    arrays = load_arrays(path, described)
    if arrays is None:
        if not writer:
            raise UserError(f"{path}: the measured lengths are not there; is {config.cache} shared by all processes?")
        lengths = measure_lengths(source, encode, image_tokens, config)
        arrays = {"lengths": np.stack([lengths.tokens, lengths.images, lengths.supervised])}
        save_arrays(path, described, arrays)
    return Lengths(*arrays["lengths"])


class _Steps:
    """One process's share of every step: `[step] -> (batch, samples read, broken (index, reason))`; it is pickled."""

    def __init__(self, pipeline: "Pipeline", process: int, processes: int):
        self._pipeline = pipeline
        self._rows = pipeline.rows_per_step // processes
        self._offset = process * self._rows

    def __len__(self) -> int:
        return self._pipeline.steps

    def __getitem__(self, step: int) -> tuple[Batch, int, list[tuple[int, str]]]:
        pipeline = self._pipeline
        lengths = pipeline.lengths
        plan, first_row = pipeline.locate(step)
        batch, seen, broken = pipeline.empty_batch(self._rows), 0, []
        for row in range(self._rows):
            start = slot = 0
            for segment, index in enumerate(plan.row(first_row + self._offset + row).tolist(), start=1):
                try:
                    conversation, images, precomputed = pipeline.read(index)
                except (SampleError, ImageError) as error:
                    broken.append((index, str(error)))
                else:
                    image_id = int(pipeline.first_image_ids[index])
                    where = dict(start=start, slot=slot, segment=segment, first_image_id=image_id)
                    place(batch, row, conversation, images, **where, precomputed=precomputed)
                seen += 1
                start += int(lengths.tokens[index])
                slot += int(lengths.images[index])
        return batch, seen, broken


class _Images:
    """Pictures by their identities, chunk by chunk; see `Pipeline.images`."""

    def __init__(self, pipeline: "Pipeline", chunks: Sequence[range]):
        self._pipeline, self._chunks = pipeline, chunks

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, chunk: int) -> tuple[np.ndarray, dict[int, tuple[int, str]]]:
        identities, size = self._chunks[chunk], self._pipeline.shape.image_size
        images, broken = np.zeros((len(identities), size, size, 3), np.uint8), {}
        for place_in_chunk, image_id in enumerate(identities):
            if not image_id:
                continue
            index = self._pipeline.sample_of(image_id)
            try:
                images[place_in_chunk] = self._pipeline.image(index, image_id)
            except (SampleError, ImageError) as error:
                broken[image_id] = index, str(error)
        return images, broken


class Pipeline:
    """All batches of a run.

    Args:
      source: the samples.
      encode: a record -> ids and labels; picklable, if there are worker processes.
      lengths: of the source's samples, from `measure_lengths`.
      plans: one per epoch, with the same rows per step.
      config: see `DataConfig`.
      image_config: how pictures are resized.
      image_tokens: N.
      decode_image: bytes and name -> RGB picture: `images.decode` or `images.decode_official`.
      precomputed: read with every picture.
      pixels: whether the pictures themselves are read.

    Attributes:
      steps: of the whole run.
      rows_per_step: rows of a global batch.
      shape: of a row.
      hash: identifies the sequence of batches; a checkpoint holds it.
      broken: samples that this process has skipped while reading.
    """

    def __init__(
        self,
        source: Source,
        encode: Encode,
        lengths: Lengths,
        plans: Sequence[PackingPlan],
        config: DataConfig,
        image_config: ImageConfig,
        image_tokens: int,
        decode_image: Callable = decode,
        precomputed: Precomputed | None = None,
        pixels: bool = True,
    ):
        self.lengths, self.plans, self.config = lengths, list(plans), config
        self.precomputed, self._pixels = precomputed, pixels
        self.first_image_ids = lengths.first_image_ids()
        self.rows_per_step = plans[0].rows_per_step
        self.shape = RowShape(config.packing.length, config.packing.images, image_tokens, image_config.size)
        self._source, self._encode, self._decode, self._image_config = source, encode, decode_image, image_config
        self._first_steps = np.cumsum([0, *(plan.steps for plan in plans)])
        self.steps = int(self._first_steps[-1])
        parts = [lengths.hash, *(plan.hash for plan in plans), str(self.shape)]
        self.hash = hashlib.sha256("\0".join(parts).encode()).hexdigest()
        self.broken = 0

    def locate(self, step: int) -> tuple[PackingPlan, int]:
        """The plan of the epoch that `step` is in, and the first row of that step."""
        epoch = int(np.searchsorted(self._first_steps, step, side="right")) - 1
        return self.plans[epoch], (step - int(self._first_steps[epoch])) * self.rows_per_step

    @property
    def described(self) -> dict[str, Any]:
        """All that identities and pixels of the pictures depend on, their files' content apart."""
        return {
            "count": int(self.lengths.images.sum()),
            "source_hash": self._source.fingerprint,
            "counts_hash": hash_arrays(self.lengths.images),
            "image": to_dict(self._image_config),
            "decoded_by": self._decode.__name__,
        }

    def sample_of(self, image_id: int) -> int:
        """The sample that a picture belongs to."""
        return int(np.searchsorted(self.first_image_ids, image_id, side="right")) - 1

    def image(self, index: int, image_id: int) -> np.ndarray:
        """One picture of sample `index`, uint8 [H, W, 3].

        Raises:
          SampleError, ImageError: it is broken.
        """
        return self._image(self._source[index], image_id - int(self.first_image_ids[index]))

    def images(self, chunks: Sequence[range]) -> Iterator[tuple[np.ndarray, dict[int, tuple[int, str]]]]:
        """Pictures by their identities, of which 0 is a black one: in order, read ahead.

        Returns:
          For each chunk: uint8 [chunk, H, W, 3], black where one is broken; identity -> its sample, and why, of those.
        """
        return _read_in_order(_Images(self, chunks), 0, self.config)

    def empty_batch(self, rows: int) -> Batch:
        """A batch of padding."""
        batch = empty_batch(rows, self.shape)
        if not self._pixels:
            del batch["images"]
        if self.precomputed is not None:
            batch |= self.precomputed.empty(rows, self.shape.images)
        return batch

    def read(self, index: int) -> tuple[Expanded, list[np.ndarray], list[dict[str, np.ndarray]]]:
        """One sample: its tokens, its pictures, uint8 [H, W, 3], and what was precomputed of each.

        Raises:
          SampleError, ImageError: it is broken.
          UserError: it no longer has the length that the plan was made for.
        """
        sample = self._source[index]
        expanded = expand_sample(sample, self._encode, self.config.packing, self.shape.image_tokens)
        planned = int(self.lengths.tokens[index]), int(self.lengths.images[index])
        if (len(expanded.tokens), len(expanded.image_start)) != planned:
            raise UserError(
                f"sample {sample.id!r} now has {len(expanded.tokens)} tokens and {len(expanded.image_start)} pictures, "
                f"planned were {planned}: data or tokenizer changed; remove the cache {self.config.cache}"
            )
        numbers = range(len(expanded.image_start))
        images = [self._image(sample, k) for k in numbers] if self._pixels else []
        if self.precomputed is None:
            return expanded, images, []
        first = int(self.first_image_ids[index])
        return expanded, images, [self.precomputed.read(first + k) for k in numbers]

    def _image(self, sample: Sample, number: int) -> np.ndarray:
        image = sample.images[number]
        try:
            return preprocess(self._decode(image.read(), image.name), self._image_config, image.name)
        except ImageError as error:
            raise ImageError(f"sample {sample.id!r}: {error}") from error

    def batches(self, start: int = 0, process: int = 0, processes: int = 1) -> Iterator[Batch]:
        """This process's rows of the steps from `start` to the end: `rows_per_step / processes` rows each.

        Raises:
          UserError: the rows do not divide by the number of processes; or, while iterating, too many samples are
            broken or the data changed since it was planned.
        """
        if self.rows_per_step % processes:
            divisors = [n for n in range(1, self.rows_per_step + 1) if self.rows_per_step % n == 0]
            raise UserError(f"{self.rows_per_step} rows per step do not divide by {processes} processes; {divisors} do")
        if not 0 <= start <= self.steps:
            raise UserError(f"step {start} is outside this run of {self.steps} steps")
        return self._iterate(start, process, processes)

    def _iterate(self, start: int, process: int, processes: int) -> Iterator[Batch]:
        if start == self.steps:
            return
        samples = len(self.plans[0].samples)
        broken_samples = BrokenSamples(-(-samples // processes), self.config.max_broken)
        iterator = _read_in_order(_Steps(self, process, processes), start, self.config)
        try:
            for batch, seen, broken in iterator:
                broken_samples.update(seen, broken)
                self.broken = broken_samples.count
                yield batch
        finally:
            iterator.close()


def open_pipeline(
    config: DataConfig,
    encode: Encode,
    image_config: ImageConfig,
    image_tokens: int,
    *,
    encode_key: str | None = None,
    multiple: int = 1,
    rows_per_step: int | None = None,
    decode_image: Callable = decode,
    precomputed: Precomputed | None = None,
    pixels: bool = True,
    writer: bool = True,
    opened: Callable[[str], None] = lambda _: None,
) -> Pipeline:
    """Opens the sources, measures them, and plans every epoch.

    Of several processes one is the writer, and the others wait in `opened` until it is done; they share `config.cache`.

    Args:
      encode_key: as in `cached_lengths`; None: lengths are not cached.
      multiple: what the rows of a step must be a multiple of.
      rows_per_step: of the run that is continued; None in a new run.
      precomputed, pixels: as in `Pipeline`.
      opened: told the fingerprint of the sources before anything is measured.

    Raises:
      UserError: a source is missing, empty or corrupt; too many samples are broken; nothing fits a row.
    """
    sources = [open_source(source) for source in config.sources]
    source = sources[0] if len(sources) == 1 else Concatenated(sources)
    opened(source.fingerprint)
    if config.cache and encode_key:
        lengths = cached_lengths(source, encode, image_tokens, config, encode_key, writer)
    else:
        lengths = measure_lengths(source, encode, image_tokens, config)
    plans: list[PackingPlan] = []
    for epoch in range(config.epochs):
        settings = dict(
            batch=config.batch, multiple=multiple, rows_per_step=rows_per_step, seed=config.seed, epoch=epoch
        )
        if config.cache:
            plans.append(cached_plan(config.cache, lengths, config.packing, **settings, writer=writer))
        else:
            plans.append(make_plan(lengths, config.packing, **settings))
        rows_per_step = plans[0].rows_per_step
    for name, value in plans[0].statistics(lengths, config.packing).items():
        logger.info("packing plan: %s %s", name, f"{value:.3f}" if isinstance(value, float) else value)
    return Pipeline(
        source, encode, lengths, plans, config, image_config, image_tokens, decode_image, precomputed, pixels
    )
