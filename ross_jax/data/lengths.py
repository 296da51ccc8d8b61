"""Lengths of all samples: each is encoded once before training, on all cores, and the result is cached."""

import dataclasses
import hashlib
import json

import numpy as np
from tqdm import tqdm

from ross_jax.config import UserError
from ross_jax.data.cache import load_arrays, save_arrays
from ross_jax.data.packing import Lengths, PackingConfig
from ross_jax.data.reading import Broken, DataConfig, Preprocessing, expand_sample, read_in_order
from ross_jax.data.samples import SampleError, Source
from ross_jax.data.sources import BrokenSamples
from ross_jax.process import cores
from ross_jax.storage import location

_MEASURED_AT_ONCE = 256  # samples per message from a worker process
_MANY = 20_000  # samples; fewer are measured before worker processes for all cores have started
_MOST_MEASURING = 64  # worker processes that measure


class _Measure:
    """Chunks of samples: [chunk] -> (int32[3, samples] with a row for each field of `Lengths`, broken samples)."""

    def __init__(self, source: Source, preprocessing: Preprocessing, packing: PackingConfig):
        self._source, self._preprocessing, self._packing = source, preprocessing, packing

    def __len__(self) -> int:
        return -(-len(self._source) // _MEASURED_AT_ONCE)

    def __getitem__(self, chunk: int) -> tuple[np.ndarray, list[Broken]]:
        first = chunk * _MEASURED_AT_ONCE
        indices = range(first, min(first + _MEASURED_AT_ONCE, len(self._source)))
        lengths, broken = np.zeros((3, len(indices)), np.int32), []
        for column, index in enumerate(indices):
            try:
                expanded = expand_sample(self._source[index], self._preprocessing, self._packing)
            except SampleError as error:
                broken.append((index, str(error)))
            else:
                lengths[:, column] = len(expanded.tokens), len(expanded.image_start), expanded.supervised
        return lengths, broken


def measure_lengths(source: Source, preprocessing: Preprocessing, config: DataConfig) -> Lengths:
    """Encodes every sample once, to know what it needs of a row. Images are not read.

    Many samples are measured by worker processes on all cores, with a progress bar on a terminal.

    Raises:
      UserError: too many samples are broken.
    """
    broken_samples = BrokenSamples(len(source), config.max_broken)
    if len(source) >= _MANY:
        workers = max(config.workers, min(cores(), _MOST_MEASURING))
        config = dataclasses.replace(config, workers=workers, prefetch=4)
    iterator = read_in_order(_Measure(source, preprocessing, config.packing), 0, config)
    chunks = []
    # Shown on terminals alone.
    bar = tqdm(total=len(source), desc="measuring lengths", unit="sample", unit_scale=True, disable=None)
    try:
        for lengths, broken in iterator:
            broken_samples.update(lengths.shape[1], broken)
            chunks.append(lengths)
            bar.update(lengths.shape[1])
    finally:
        bar.close()
        iterator.close()
    broken_samples.summarise()
    return Lengths(*np.concatenate(chunks, axis=1))


def cached_lengths(source: Source, preprocessing: Preprocessing, config: DataConfig, writer: bool = True) -> Lengths:
    """`measure_lengths`, cached in `config.cache` under a name that hashes the texts, the encoder and N.

    Args:
      writer: as in `cached_plan`.
    """
    cut = config.packing if config.packing.too_long == "truncate" else None
    key = ["lengths", 2, source.fingerprint, preprocessing.encode_key, preprocessing.image_tokens, str(cut)]
    described = json.dumps(key)
    path = location(config.cache) / f"lengths-{hashlib.sha256(described.encode()).hexdigest()[:20]}.npz"
    arrays = load_arrays(path, described)
    if arrays is None:
        if not writer:
            raise UserError(f"{path}: the measured lengths are not there; is {config.cache} shared by all processes?")
        lengths = measure_lengths(source, preprocessing, config)
        arrays = {"lengths": np.stack([lengths.tokens, lengths.images, lengths.supervised])}
        save_arrays(path, described, arrays)
    return Lengths(*arrays["lengths"])
