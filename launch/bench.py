#!/usr/bin/env python
"""Measures parts of ross_jax on this machine.

    python launch/bench.py data                                    a synthetic data set
    python launch/bench.py data --data mix.json --images coco.zip --tokenizer DIR --template qwen_2 --workers 8

One subcommand per part. Each prints its figures, and writes them as JSON if asked with --json FILE.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ross_jax.config import UserError
from ross_jax.data.conversation import IGNORE, IMAGE_ID, EncodedConversation
from ross_jax.data.images import ImageConfig
from ross_jax.data.packing import PackingConfig
from ross_jax.data.pipeline import DataConfig, open_pipeline
from ross_jax.data.sources import SourceConfig

Figures = dict[str, float | int | str]


# data


def add_data(parser: argparse.ArgumentParser) -> None:
    parser.description = "Reads batches as training does: samples/s, and how full the rows are."
    parser.add_argument("--data", help="LLaVA conversations, JSON or JSONL; default: a synthetic data set")
    parser.add_argument("--images", nargs="*", default=[], help="folders, .zip or .tar files with its pictures")
    parser.add_argument("--tokenizer", help="folder of a tokenizer; default: one token per word")
    parser.add_argument("--template", default="v1", help="conversation template, with --tokenizer")
    parser.add_argument("--samples", type=int, default=2000, help="size of the synthetic data set")
    parser.add_argument("--layout", choices=("pack", "pad"), default="pack")
    parser.add_argument("--length", type=int, default=2048, help="S, tokens per row")
    parser.add_argument("--image-slots", type=int, default=2, help="I, pictures per row")
    parser.add_argument("--image-tokens", type=int, default=729, help="N, tokens per picture")
    parser.add_argument("--image-size", type=int, default=384, help="side of a picture in pixels")
    parser.add_argument("--image-mode", choices=("pad", "square", "crop"), default="pad")
    parser.add_argument("--batch", type=int, default=32, help="conversations per step")
    parser.add_argument("--steps", type=int, default=20, help="steps to read")
    parser.add_argument("--workers", type=int, default=0, help="worker processes; 0: threads")
    parser.add_argument("--threads", type=int, default=4, help="reading threads, without workers")


def run_data(arguments: argparse.Namespace) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        path, images = arguments.data, arguments.images
        if path is None:
            path, images = write_synthetic(Path(folder), arguments.samples), [folder]
        config = DataConfig(
            sources=(SourceConfig(path, images=tuple(images)),),
            packing=PackingConfig(arguments.length, arguments.image_slots, layout=arguments.layout),
            batch=arguments.batch,
            workers=arguments.workers,
            threads=arguments.threads,
        )
        start = time.perf_counter()
        image_config = ImageConfig(arguments.image_size, mode=arguments.image_mode)
        encode = make_encoder(arguments.tokenizer, arguments.template)
        pipeline = open_pipeline(config, encode, image_config, arguments.image_tokens)
        ready = time.perf_counter()
        plan = pipeline.plans[0]
        steps = samples = pictures = tokens = 0
        batches = pipeline.batches()
        first = next(batches)  # starts threads or workers: not measured
        begin = time.perf_counter()
        for batch in itertools.islice(batches, arguments.steps):
            steps += 1
            samples += int(batch["segments"].max(axis=1).sum())
            pictures += int(np.count_nonzero(batch["image_ids"]))
            tokens += int(np.count_nonzero(batch["segments"]))
        seconds = time.perf_counter() - begin
        batches.close()
    if not steps:
        raise UserError(f"the data set has only one step of {arguments.batch} conversations; lower --batch")
    return {
        "measure_and_plan_s": ready - start,
        "first_batch_s": begin - ready,
        "samples_per_s": samples / seconds,
        "pictures_per_s": pictures / seconds,
        "tokens_per_s": tokens / seconds,
        "batch_mb": sum(array.nbytes for array in first.values()) / 1e6,
        "steps_read": steps,
        **plan.statistics(pipeline.lengths, config.packing),
    }


@dataclass(frozen=True)
class WordEncoder:
    """A stand-in for a tokenizer: one token per word, answers supervised. Fast, so that reading is what is measured."""

    def __call__(self, record: dict[str, Any]) -> EncodedConversation:
        ids, labels = [], []
        for message in record["conversations"]:
            words = message["value"].replace("<image>", " <image> ").split()
            some = [IMAGE_ID if word == "<image>" else 1 + zlib.crc32(word.encode()) % 32000 for word in words]
            ids += some
            labels += some if message["from"] == "gpt" else [IGNORE] * len(some)
        return EncodedConversation(np.array(ids, np.int32), np.array(labels, np.int32))


def make_encoder(tokenizer: str | None, template: str) -> Callable[[dict[str, Any]], EncodedConversation]:
    if tokenizer is None:
        return WordEncoder()
    from ross_jax.data.encoders import build_encoder
    from ross_jax.data.tokenizer import load_tokenizer

    return build_encoder(template, load_tokenizer(tokenizer))


def write_synthetic(folder: Path, samples: int) -> str:
    """JPEGs of 640 x 480 and conversations whose lengths and share of text resemble LLaVA-1.5's stage 2 mix."""
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


# Each part: the function that adds its flags, and the one that measures.
COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], Figures]]] = {
    "data": (add_data, run_data),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, (add_flags, _) in COMMANDS.items():
        subparser = subparsers.add_parser(name)
        subparser.add_argument("--json", metavar="FILE", help="write the figures there too")
        add_flags(subparser)
    parsed = parser.parse_args(arguments)
    try:
        figures = COMMANDS[parsed.command][1](parsed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, value in figures.items():
        print(f"{name:24} {value:.4g}" if isinstance(value, float) else f"{name:24} {value}")
    if parsed.json:
        Path(parsed.json).write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
