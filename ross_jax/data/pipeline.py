"""The data of a run: a sequence of global batches, of which each process reads its share.

    sources ─► lengths of all samples ─► packing plan of each epoch ─► rows of step s ─► batch s
               encoded once, cached      cached                        process p of P reads rows p R/P to (p + 1) R/P

Batch s is a function of the plan alone. So the position in the data is the step number, a restored run reads on at any
step, and any number of processes reads the same rows together.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ross_jax.config import UserError, to_dict
from ross_jax.console import working
from ross_jax.data.batches import Batch, Expanded, RowShape, empty_batch, place
from ross_jax.data.cache import hash_arrays
from ross_jax.data.images import ImageError, preprocess
from ross_jax.data.lengths import cached_lengths, measure_lengths
from ross_jax.data.mixture import Mixture
from ross_jax.data.packing import (
    Lengths,
    PackingPlan,
    PlanSettings,
    cached_plan,
    make_plan,
    report_plan,
    report_sources,
)
from ross_jax.data.reading import Broken, DataConfig, Preprocessing, expand_sample, read_in_order
from ross_jax.data.records import Version
from ross_jax.data.samples import Sample, SampleError, Source
from ross_jax.data.sources import (
    BrokenSamples,
    make_mixture,
    open_sources,
    report_fields,
)
from ross_jax.storage import StorageError


class _Steps:
    """One process's share of every step: [step] -> (batch, number of samples read, broken samples)."""

    def __init__(self, pipeline: "Pipeline", process: int, processes: int):
        self._pipeline = pipeline
        self._rows = pipeline.rows_per_step // processes
        self._offset = process * self._rows

    def __len__(self) -> int:
        return self._pipeline.steps

    def __getitem__(self, step: int) -> tuple[Batch, int, list[Broken]]:
        pipeline = self._pipeline
        plan, first_row = pipeline.locate(step)
        batch, seen, broken = pipeline.empty_batch(self._rows), 0, []
        for row in range(self._rows):
            for index, location in plan.locations(first_row + self._offset + row, pipeline.lengths):
                location = dataclasses.replace(location, source=pipeline.source_of(index))
                seen += 1
                try:
                    place(batch, row, location, *pipeline.read(index))
                except (SampleError, ImageError) as error:
                    broken.append((index, str(error)))
        return batch, seen, broken


class _Images:
    """Chunks of images by identity: [chunk] -> (pixels, {identity: broken sample}); see `Pipeline.images`."""

    def __init__(self, pipeline: "Pipeline", chunks: Sequence[range]):
        self._pipeline, self._chunks = pipeline, chunks

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, chunk: int) -> tuple[np.ndarray, dict[int, Broken]]:
        identities, size = self._chunks[chunk], self._pipeline.shape.image_size
        images, broken = np.zeros((len(identities), size, size, 3), np.uint8), {}
        for place_in_chunk, image_id in enumerate(identities):
            if not image_id:
                continue
            try:
                images[place_in_chunk] = self._pipeline.image(image_id)
            except (SampleError, ImageError) as error:
                broken[image_id] = self._pipeline.sample_of(image_id), str(error)
        return images, broken


class Pipeline:
    """All batches of a run.

    Args:
      source: the samples.
      preprocessing: how they become arrays.
      lengths: what `measure_lengths` found for `source`.
      plans: one per epoch, all with the same number of rows per step.
      config: see `DataConfig`.
      mixture: the parts of the data set.
      versions: of the sources, as they were opened.

    Attributes:
      source, preprocessing, lengths, plans, config: the arguments.
      steps: number of steps of the whole run.
      rows_per_step: rows of a global batch.
      shape: sizes of a row.
      hash: identifies the sequence of batches. A checkpoint holds it.
      broken: number of samples that this process has skipped while reading.
    """

    def __init__(
        self,
        source: Source,
        preprocessing: Preprocessing,
        lengths: Lengths,
        plans: Sequence[PackingPlan],
        config: DataConfig,
        mixture: Mixture,
        versions: Sequence[Version] = (),
    ):
        self.source, self.preprocessing = source, preprocessing
        self.lengths, self.plans, self.config, self.versions = lengths, list(plans), config, list(versions)
        self._ends = mixture.ends
        self.precomputed = preprocessing.precomputed
        self.rows_per_step = plans[0].rows_per_step
        packing, image_size = config.packing, preprocessing.images.size
        self.shape = RowShape(packing.length, packing.images, preprocessing.image_tokens, image_size)
        self._first_steps = np.cumsum([0, *(plan.steps for plan in plans)])
        self.steps = int(self._first_steps[-1])
        self.hash = self.hash_of(len(plans))
        self.broken = 0

    def hash_of(self, epochs: int) -> str:
        """Identifies the sequence of batches of the first `epochs` epochs."""
        parts = [self.lengths.hash, *(plan.hash for plan in self.plans[:epochs]), str(self.shape)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def steps_of(self, epochs: int) -> int:
        """Number of steps of the first `epochs` epochs."""
        return int(self._first_steps[epochs])

    def locate(self, step: int) -> tuple[PackingPlan, int]:
        """The plan of the epoch that `step` is in, and the first row of that step."""
        epoch = int(np.searchsorted(self._first_steps, step, side="right")) - 1
        return self.plans[epoch], (step - int(self._first_steps[epoch])) * self.rows_per_step

    @property
    def described(self) -> dict[str, Any]:
        """Everything that the images' identities and pixels depend on, except the content of the image files."""
        return {
            "count": int(self.lengths.images.sum()),
            "source_hash": self.source.fingerprint,
            "counts_hash": hash_arrays(self.lengths.images),
            "image": to_dict(self.preprocessing.images),
            "decoded_by": self.preprocessing.decode.__name__,
        }

    def sample_of(self, image_id: int) -> int:
        """Index of the sample that an image belongs to."""
        return int(np.searchsorted(self.lengths.first_image_ids, image_id, side="right")) - 1

    def source_of(self, index: int) -> int:
        """Number of the source that a sample comes from."""
        return int(np.searchsorted(self._ends, index, side="right"))

    def image(self, image_id: int) -> np.ndarray:
        """One image, uint8[H, W, 3].

        Raises:
          SampleError, ImageError: it is broken.
        """
        index = self.sample_of(image_id)
        return self._image(self.source[index], image_id - int(self.lengths.first_image_ids[index]))

    def images(self, chunks: Sequence[range]) -> Iterator[tuple[np.ndarray, dict[int, Broken]]]:
        """Images by identity, chunk by chunk, in order and read ahead. Identity 0 is a black image.

        Returns:
          For each chunk: uint8[chunk, H, W, 3], black where an image is broken; and {identity: (sample, reason)} of the
          broken images.
        """
        return read_in_order(_Images(self, chunks), 0, self.config)

    def empty_batch(self, rows: int) -> Batch:
        """A batch of padding."""
        batch = empty_batch(rows, self.shape, sources=len(self._ends) > 1)
        if not self.preprocessing.pixels:
            del batch["images"]
        if self.precomputed is not None:
            batch |= self.precomputed.empty(rows, self.shape.images)
        return batch

    def read(self, index: int) -> tuple[Expanded, list[np.ndarray], list[dict[str, np.ndarray]]]:
        """One sample: its tokens, and for each of its images the pixels uint8[H, W, 3] and the precomputed arrays.

        Raises:
          SampleError, ImageError: it is broken.
          UserError: its length is not the one that the plan was made for.
        """
        sample = self.source[index]
        expanded = expand_sample(sample, self.preprocessing, self.config.packing)
        planned = int(self.lengths.tokens[index]), int(self.lengths.images[index])
        if (len(expanded.tokens), len(expanded.image_start)) != planned:
            raise UserError(
                f"{sample} now has {len(expanded.tokens)} tokens and {len(expanded.image_start)} images, "
                f"planned were {planned}: data or tokenizer changed; remove the cache {self.config.cache}"
            )
        numbers = range(len(expanded.image_start))
        images = [self._image(sample, k) for k in numbers] if self.preprocessing.pixels else []
        if self.precomputed is None:
            return expanded, images, []
        first = int(self.lengths.first_image_ids[index])
        return expanded, images, [self.precomputed.read(first + k) for k in numbers]

    def _image(self, sample: Sample, number: int) -> np.ndarray:
        image, preprocessing = sample.images[number], self.preprocessing
        try:
            return preprocess(preprocessing.decode(image.read(), image.name), preprocessing.images, image.name)
        except ImageError as error:
            raise ImageError(f"{sample}: {error}") from error
        except StorageError as error:
            raise StorageError(f"{sample}: {error}") from error

    def batches(self, start: int = 0, process: int = 0, processes: int = 1) -> Iterator[Batch]:
        """This process's `rows_per_step / processes` rows of every step from `start` to the end.

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
        iterator = read_in_order(_Steps(self, process, processes), start, self.config)
        try:
            for batch, seen, broken in iterator:
                broken_samples.update(seen, broken)
                self.broken = broken_samples.count
                yield batch
        finally:
            iterator.close()


def open_pipeline(
    config: DataConfig,
    preprocessing: Preprocessing,
    *,
    multiple: int = 1,
    rows_per_step: int | None = None,
    writer: bool = True,
    known: Sequence[Version] = (),
    opened: Callable[[str, Sequence[Version]], None] = lambda fingerprint, versions: None,
) -> Pipeline:
    """Opens the sources, measures their samples, and plans every epoch.

    Several processes that read one run share `config.cache`. One is the writer, and the others wait in `opened` until
    it is done.

    Args:
      multiple: the rows of a step are a multiple of this.
      rows_per_step: rows per step of the run that is continued; None in a new run.
      writer: whether this process measures and plans.
      known: earlier versions of the sources, which save hashing files that are as they were.
      opened: called with the fingerprint of all sources, and with their versions, before anything is measured.

    Raises:
      UserError: a source is missing, empty or corrupt; too many samples are broken or exceed a row.
    """
    if rows_per_step and rows_per_step % multiple:
        raise UserError(
            f"the run has {rows_per_step} rows per step, which {multiple} (devices along data and fsdp, times "
            "step.accumulate) does not divide; continue it on another number of devices"
        )
    with working(f"reading {len(config.sources)} data source{'s' if len(config.sources) > 1 else ''}"):
        source, versions = open_sources(config.sources, known, config.limits)
    opened(source.fingerprint, versions)
    report_fields(source, config.max_broken)
    if config.cache and preprocessing.encode_key:
        lengths = cached_lengths(source, preprocessing, config, writer)
    else:
        lengths = measure_lengths(source, preprocessing, config)
    mixture = make_mixture(config.sources, source, config.shuffle_memory)
    plans: list[PackingPlan] = []
    is_new = rows_per_step is None
    for epoch in range(config.epochs):
        settings = PlanSettings(config.packing, config.batch, multiple, rows_per_step, config.seed, epoch)
        with working(f"packing {len(lengths):,} conversations of epoch {epoch + 1}"):
            if config.cache:
                plans.append(cached_plan(config.cache, lengths, settings, writer, mixture))
            else:
                plans.append(make_plan(lengths, settings, mixture))
        rows_per_step = plans[0].rows_per_step
    report_plan(plans[0], lengths, config.packing, config.max_dropped if is_new else 1.0)
    report_sources(plans[0], mixture)
    return Pipeline(source, preprocessing, lengths, plans, config, mixture, versions)
