"""Measures how fast training reads its batches, and how full their rows are."""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import multiprocessing
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ross_jax.config import UserError
from ross_jax.data.batches import Batch
from ross_jax.data.conversation import IGNORE, IMAGE_ID, EncodedConversation
from ross_jax.data.images import ImageConfig, preprocess
from ross_jax.data.packing import PackingConfig
from ross_jax.data.pipeline import DataConfig, Pipeline, Preprocessing, open_pipeline
from ross_jax.data.reading import expand_sample
from ross_jax.data.sources import SourceConfig
from ross_jax.process import cores, peak_memory

_TURNS = 5
_REST = 0.5
"""Seconds without work after which workers have read ahead as far as they may."""

Figures = dict[str, float | int | str]


@dataclass(frozen=True)
class Reading:
    """What is read, and how.

    Attributes:
      data: path of a source. None: a synthetic data set.
      kind: of the source, as in `SourceConfig`.
      images: folders, .zip or .tar files with the data's images.
      tokenizer: folder of a tokenizer. None: one token per word.
      template: conversation template, with a tokenizer.
      samples: conversations of the synthetic data set.
      image_tokens: N, tokens per image.
      batch: conversations per step.
      steps: number of steps to read.
      workers: processes that read. 0: threads read.
      threads: threads that read, without workers.
      local_cache: folder that keeps what is read from buckets.
      second: whether a second epoch is read, after all of the first.
    """

    data: str | None
    kind: Any
    images: tuple[str, ...]
    tokenizer: str | None
    template: str
    samples: int
    packing: PackingConfig
    image_config: ImageConfig
    image_tokens: int
    batch: int
    steps: int
    workers: int
    threads: int
    local_cache: str | None = None
    second: bool = False


@contextlib.contextmanager
def opened(reading: Reading, epochs: int = 1) -> Iterator[Pipeline]:
    """The pipeline of the data set, which is written first if it is synthetic.

    Raises:
      UserError: data that cannot be used.
    """
    with tempfile.TemporaryDirectory() as folder:
        path, images = reading.data, reading.images
        if path is None:
            path, images = write_synthetic(Path(folder), reading.samples), (folder,)
        config = DataConfig(
            sources=(SourceConfig(path, kind=reading.kind, images=images),),
            packing=reading.packing,
            batch=reading.batch,
            epochs=epochs,
            workers=reading.workers,
            threads=reading.threads,
            local_cache=reading.local_cache,
        )
        encode = make_encoder(reading.tokenizer, reading.template)
        yield open_pipeline(config, Preprocessing(encode, reading.image_config, reading.image_tokens))


def measure(reading: Reading) -> Figures:
    """Reads batches, and returns rates, sizes and how full the rows are.

    Raises:
      UserError: data that cannot be used, or that is too little for two steps.
    """
    start = time.perf_counter()
    with opened(reading, epochs=1 + reading.second) as pipeline:
        ready = time.perf_counter()
        plan = pipeline.plans[0]
        batches = pipeline.batches()
        first = next(batches)  # starts threads or workers: not measured
        begin = time.perf_counter()
        figures = _read(itertools.islice(batches, min(reading.steps, plan.steps - 1)))
        if reading.second and figures:
            for _ in itertools.islice(batches, plan.steps - 1 - int(figures["steps_read"])):
                pass
            rest = _read(itertools.islice(batches, reading.steps))
            figures |= {f"second_{name}": value for name, value in rest.items()}
        batches.close()
        found = shares(pipeline)
    if not figures:
        raise UserError(f"the data set has only one step of {reading.batch} conversations; lower --batch")
    return {
        "measure_and_plan_s": ready - start,
        "first_batch_s": begin - ready,
        **figures,
        "batch_mb": sum(array.nbytes for array in first.values()) / 1e6,
        **plan.statistics(pipeline.lengths, reading.packing),
        **found,
        "memory_mb": peak_memory() / 1e6,
    }


def _read(batches: Iterator[Batch]) -> Figures:
    """Rates at which batches come; empty if there are none."""
    steps = samples = images = tokens = 0
    begin = time.perf_counter()
    for batch in batches:
        steps += 1
        samples += int(batch["segments"].max(axis=1).sum())
        images += int(np.count_nonzero(batch["image_ids"]))
        tokens += int(np.count_nonzero(batch["segments"]))
    seconds = time.perf_counter() - begin
    counts = {"samples_per_s": samples, "images_per_s": images, "tokens_per_s": tokens}
    return {name: count / seconds for name, count in counts.items()} | {"steps_read": steps} if steps else {}


def shares(pipeline: Pipeline, images: int = 64) -> Figures:
    """Shares of the time of reading samples, in one thread, that decoding and resizing their images take."""
    preprocessing, seconds = pipeline.preprocessing, dict.fromkeys(("read", "decode", "resize"), 0.0)
    seen, start = 0, time.perf_counter()
    for index in pipeline.plans[0].samples.tolist():
        sample = pipeline.source[index]
        expand_sample(sample, preprocessing, pipeline.config.packing)
        for image in sample.images:
            times = [time.perf_counter()]
            data = image.read()
            times.append(time.perf_counter())
            decoded = preprocessing.decode(data, image.name)
            times.append(time.perf_counter())
            preprocess(decoded, preprocessing.images, image.name)
            times.append(time.perf_counter())
            for name, begin, end in zip(seconds, times, times[1:], strict=False):
                seconds[name] += end - begin
            seen += 1
        if seen >= images:
            break
    total = time.perf_counter() - start
    return {f"{name}_share": value / total for name, value in seconds.items()} if seen else {}


def against_torch(reading: Reading) -> Figures:
    """Images/s beside a PyTorch DataLoader with as many workers and the same transforms, in turns.

    Raises:
      UserError: PyTorch is not installed, or the data has no image.
    """
    if importlib.util.find_spec("torch") is None:
        raise UserError("--compare torch: PyTorch is not installed; bash launch/setup.sh parity")
    from ross_jax.bench.data_peer import Loader

    reading = dataclasses.replace(reading, workers=reading.workers or cores())
    # More batches than are ready when a turn begins: those of a worker's queue and pipe, and those already received.
    ahead = reading.workers * (DataConfig.prefetch + 2) + 2
    per_turn = ahead + reading.steps
    epochs = -(-2 * _TURNS * per_turn * reading.batch // (reading.samples if reading.data is None else 1000))
    with opened(reading, epochs) as pipeline:
        files = [image for index in range(len(pipeline.source)) for image in pipeline.source[index].images]
        if not files:
            raise UserError(f"{reading.data}: no image in it")
        per_batch = max(1, round(pipeline.lengths.images.mean() * reading.batch))
        ours = (int(np.count_nonzero(batch["image_ids"])) for batch in pipeline.batches())
        next(ours)
        our_workers = multiprocessing.active_children()
        theirs = iter(Loader(files, reading.image_config, per_batch, reading.workers))
        their_workers = [worker for worker in multiprocessing.active_children() if worker not in our_workers]
        turns = []
        for _ in range(_TURNS):
            each = [_rates(ours, our_workers, ahead, reading.steps)]
            each.append(_rates(theirs, their_workers, ahead, reading.steps))
            turns.append((*each[0], *each[1]))
        median = np.median(turns, axis=0).tolist()
        return {
            "workers": reading.workers,
            "images_per_s": median[0],
            "torch_images_per_s": median[2],
            "images_per_core_s": median[1],
            "torch_images_per_core_s": median[3],
            "over_torch_per_core": float(np.median([turn[1] / turn[3] for turn in turns])),
            **shares(pipeline),
        }


def _rates(batches: Iterator[int], workers: Sequence[Any], ahead: int, steps: int) -> tuple[float, float]:
    """Images per second, and per second of a core, over some batches after those that are ready.

    Args:
      batches: number of images of each.
      workers: processes that read them. Afterwards they are given the time to read ahead, so that they rest later.
    """
    for _ in itertools.islice(batches, ahead):
        pass
    start, used = time.perf_counter(), _core_seconds(workers)
    images = sum(itertools.islice(batches, steps))
    rates = images / (time.perf_counter() - start), images / (_core_seconds(workers) - used)
    before = -1.0
    while before != (before := _core_seconds(workers)):
        time.sleep(_REST)
    return rates


def _core_seconds(workers: Sequence[Any]) -> float:
    """Seconds that processes have computed."""
    ticks = 0
    for worker in workers:
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # in user mode and in the kernel
    return ticks / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class WordEncoder:
    """A stand-in for a tokenizer: one token per word, answers supervised. It takes next to no time itself."""

    def __call__(self, record: dict[str, Any]) -> EncodedConversation:
        ids, labels = [], []
        for message in record["conversations"]:
            words = message["value"].replace("<image>", " <image> ").split()
            some = [IMAGE_ID if word == "<image>" else 1 + zlib.crc32(word.encode()) % 32000 for word in words]
            ids += some
            labels += some if message["from"] == "gpt" else [IGNORE] * len(some)
        return EncodedConversation(np.array(ids, np.int32), np.array(labels, np.int32))


def make_encoder(tokenizer: str | None, template: str) -> Callable[[dict[str, Any]], EncodedConversation]:
    """The function that makes tokens and labels of a LLaVA record."""
    if tokenizer is None:
        return WordEncoder()
    from ross_jax.data.encoders import build_encoder
    from ross_jax.data.tokenizer import load_tokenizer

    return build_encoder(template, load_tokenizer(tokenizer))


def write_synthetic(folder: Path, samples: int) -> str:
    """Writes a data set whose lengths and share of images resemble LLaVA-1.5's stage 2 mix; images are 640 x 480 JPEGs.

    Returns:
      The path of the JSON file.
    """
    random = np.random.RandomState(0)
    for number in range(32):
        coarse = Image.fromarray(random.randint(0, 256, (24, 32, 3), np.uint8))
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
    records = []
    for number in range(samples):
        words = " ".join(["word"] * int(np.clip(random.lognormal(5, 0.7), 16, 1200)))
        record = {
            "id": str(number),
            "conversations": [{"from": "human", "value": "why"}, {"from": "gpt", "value": words}],
        }
        if random.rand() < 0.94:
            record["image"] = f"{random.randint(32)}.jpg"
            record["conversations"][0]["value"] = "<image>\nwhy"
        records.append(record)
    path = folder / "synthetic.json"
    path.write_text(json.dumps(records))
    return str(path)
