"""What a run's data is, how its samples become arrays, and who reads them ahead."""

from dataclasses import dataclass, field
from typing import Annotated

import grain
import numpy as np
from grain.sources import RandomAccessDataSource

from ross_jax.config import Count, Range, Share, Size, UserError, Whole
from ross_jax.data.archives import MAX_IMAGE_BYTES
from ross_jax.data.batches import Expanded, expand
from ross_jax.data.conversation import IMAGE_ID, Encoder
from ross_jax.data.images import Decoder, ImageConfig, decode
from ross_jax.data.local_cache import LocalCache
from ross_jax.data.packing import PackingConfig
from ross_jax.data.parquet import SHUFFLE_MEMORY
from ross_jax.data.precomputed import Precomputed
from ross_jax.data.ranges import Caches
from ross_jax.data.samples import Sample, SampleError
from ross_jax.data.sources import Limits, SourceConfig, check_mixture
from ross_jax.data.workers import Workers

Broken = tuple[int, str]
"""Index of a sample that cannot be used, and why."""


@dataclass(frozen=True)
class DataConfig:
    """The data of a run, and how it is read.

    Attributes:
      sources: one or several, read as one data set.
      packing: the layout of rows.
      batch: conversations per step, as in the paper. The number of rows per step follows from the packing plan.
      epochs: passes over the data.
      seed: settles the order of samples and rows.
      max_broken: share of broken samples above which the run stops; see `sources.BrokenSamples`.
      max_dropped: share of samples that exceed a row above which a new run does not begin.
      max_image_bytes: most bytes of an image file, packed or not; a sample with a larger one is broken.
      workers: processes that read, each one batch at a time. 0: threads of this process read, which is often fast
        enough, because decoding and resizing images release the interpreter lock.
      threads: threads that read, each one batch at a time, if there are no workers.
      prefetch: batches that each worker, or all threads together, hold ready.
      cache: folder for lengths and plans, shared by all processes. None: the folder `cache` of the run's directory.
      precomputed: folder that `launch/cache.py` wrote. Targets and features are read from it instead of computed, and
        pixels are only decoded if a component still looks at them.
      shuffle_memory: bytes of decoded row groups of Parquet files among which samples are shuffled. Each process that
        reads, workers included, keeps twice as many.
      local_cache: folder on a disk of this machine, which keeps what is read from buckets for later epochs and runs.
        All processes of a host share it. None: data in buckets is read anew in each epoch.
      local_cache_gb: most gigabytes that it takes; what was used longest ago disappears.
    """

    sources: tuple[SourceConfig, ...]
    packing: PackingConfig = field(default_factory=PackingConfig)
    batch: Size = 128
    epochs: Size = 1
    seed: Whole = 0
    max_broken: Share = 0.01
    max_dropped: Share = 0.2
    max_image_bytes: Count = MAX_IMAGE_BYTES
    workers: Annotated[int, Range(0, 1024)] = 0
    threads: Annotated[int, Range(0, 1024)] = 4
    prefetch: Annotated[int, Range(1, 1024)] = 2
    cache: str | None = None
    precomputed: str | None = None
    shuffle_memory: Count = SHUFFLE_MEMORY
    local_cache: str | None = None
    local_cache_gb: Annotated[float, Range(0.001, 1e6)] = 100.0

    def __post_init__(self):
        if not self.sources:
            raise ValueError("sources is empty; name at least one data set")
        check_mixture(self.sources)
        for name in ("batch", "epochs", "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("workers", "threads", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it cannot be negative")
        for name in ("max_broken", "max_dropped"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a share, from 0 to 1")

    @property
    def caches(self) -> Caches:
        """What is kept of data in buckets. Makes the folder of the local cache."""
        local = LocalCache(self.local_cache, int(self.local_cache_gb * 1e9)) if self.local_cache else None
        return Caches(local, self.cache)

    @property
    def limits(self) -> Limits:
        """Bounds of what sources read."""
        return Limits(self.max_image_bytes, self.shuffle_memory, self.caches)


@dataclass(frozen=True)
class Preprocessing:
    """How samples become arrays.

    Attributes:
      encode: record -> token ids and labels. Worker processes need one that can be pickled.
      images: how images are resized.
      image_tokens: N, tokens per image.
      encode_key: text that changes whenever `encode` does (tokenizer, template, compat). Measured lengths are cached
        under it. None: they are not cached.
      decode: `images.decode` or `images.decode_official`.
      precomputed: arrays to read for every image.
      pixels: whether batches hold `images`.
    """

    encode: Encoder
    images: ImageConfig
    image_tokens: int
    encode_key: str | None = None
    decode: Decoder = decode
    precomputed: Precomputed | None = None
    pixels: bool = True


def expand_sample(sample: Sample, preprocessing: Preprocessing, packing: PackingConfig) -> Expanded:
    """Tokens and targets of a sample, cut to the row if `packing.too_long` is `truncate`.

    Raises:
      SampleError: the record cannot be encoded, or its text has another number of image markers than it has images.
    """
    try:
        encoded = preprocessing.encode(sample.record)
    except UserError as error:
        raise SampleError(f"{sample.place}: {error}" if sample.place else str(error)) from error
    marks = np.count_nonzero(encoded.input_ids == IMAGE_ID)
    if marks != len(sample.images):
        raise SampleError(f"{sample}: {marks} image markers in the text, {len(sample.images)} images")
    limits = packing if packing.too_long == "truncate" else None
    expanded = expand(encoded, preprocessing.image_tokens, limits)
    if not len(expanded.tokens):
        raise SampleError(f"{sample}: holds nothing, or begins with an image that fits no row")
    return expanded


def read_in_order(items: RandomAccessDataSource, start: int, config: DataConfig) -> Workers | grain.DatasetIterator:
    """Iterates over `items[start:]` in order. Threads or worker processes read ahead."""
    if config.workers:
        return Workers(items, start, config.workers, config.prefetch)
    ahead = max(config.prefetch, config.threads) if config.threads else 0
    dataset = grain.MapDataset.source(items)[start:]
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=ahead)))
