"""Measures how fast training reads its batches, and how full their rows are."""

import itertools
import json
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ross_jax.config import UserError
from ross_jax.data.conversation import IGNORE, IMAGE_ID, EncodedConversation
from ross_jax.data.images import ImageConfig
from ross_jax.data.packing import PackingConfig
from ross_jax.data.pipeline import DataConfig, Preprocessing, open_pipeline
from ross_jax.data.sources import SourceConfig

Figures = dict[str, float | int | str]


@dataclass(frozen=True)
class Reading:
    """What is read, and how.

    Attributes:
      data: LLaVA conversations, JSON or JSONL. None: a synthetic data set.
      images: folders, .zip or .tar files with the data's images.
      tokenizer: folder of a tokenizer. None: one token per word.
      template: conversation template, with a tokenizer.
      samples: conversations of the synthetic data set.
      image_tokens: N, tokens per image.
      batch: conversations per step.
      steps: number of steps to read.
      workers: processes that read. 0: threads read.
      threads: threads that read, without workers.
    """

    data: str | None
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


def measure(reading: Reading) -> Figures:
    """Reads batches, and returns rates, sizes and how full the rows are.

    Raises:
      UserError: data that cannot be used, or that is too little for two steps.
    """
    with tempfile.TemporaryDirectory() as folder:
        path, images = reading.data, reading.images
        if path is None:
            path, images = write_synthetic(Path(folder), reading.samples), (folder,)
        config = DataConfig(
            sources=(SourceConfig(path, images=images),),
            packing=reading.packing,
            batch=reading.batch,
            workers=reading.workers,
            threads=reading.threads,
        )
        start = time.perf_counter()
        encode = make_encoder(reading.tokenizer, reading.template)
        pipeline = open_pipeline(config, Preprocessing(encode, reading.image_config, reading.image_tokens))
        ready = time.perf_counter()
        plan = pipeline.plans[0]
        steps = samples = image_count = tokens = 0
        batches = pipeline.batches()
        first = next(batches)  # starts threads or workers: not measured
        begin = time.perf_counter()
        for batch in itertools.islice(batches, reading.steps):
            steps += 1
            samples += int(batch["segments"].max(axis=1).sum())
            image_count += int(np.count_nonzero(batch["image_ids"]))
            tokens += int(np.count_nonzero(batch["segments"]))
        seconds = time.perf_counter() - begin
        batches.close()
    if not steps:
        raise UserError(f"the data set has only one step of {reading.batch} conversations; lower --batch")
    return {
        "measure_and_plan_s": ready - start,
        "first_batch_s": begin - ready,
        "samples_per_s": samples / seconds,
        "images_per_s": image_count / seconds,
        "tokens_per_s": tokens / seconds,
        "batch_mb": sum(array.nbytes for array in first.values()) / 1e6,
        "steps_read": steps,
        **plan.statistics(pipeline.lengths, config.packing),
    }


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
