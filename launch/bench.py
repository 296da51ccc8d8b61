#!/usr/bin/env python
"""Measures parts of ross_jax on this machine.

    python launch/bench.py data                                    a synthetic data set
    python launch/bench.py data --data mix.json --images coco.zip --tokenizer DIR --template qwen_2 --workers 8
    python launch/bench.py data --compare torch --workers 4        beside a PyTorch DataLoader
    python launch/bench.py step                                    a mid-size model's train step
    python launch/bench.py step --compare torch                    beside the same step in PyTorch
    python launch/bench.py step --compare padding                  packed rows beside padded ones
    python launch/bench.py step --config=configs/ross.py:stage=finetune --config.data.batch=8
    python launch/bench.py generate                                answers of a language model of 110 M parameters
    python launch/bench.py generate --compare torch                beside transformers' generate

Each subcommand prints its figures, and with --json FILE writes them as JSON.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ross_jax.arguments import SIZE, Parser
from ross_jax.bench import data, generate, step
from ross_jax.command_line import load_recipe
from ross_jax.config import Range, UserError
from ross_jax.console import talk
from ross_jax.data.images import ImageConfig
from ross_jax.data.packing import PackingConfig
from ross_jax.models.quantization import DTYPES
from ross_jax.process import leave
from ross_jax.storage import location

RECIPE = Path(__file__).parents[1] / "configs" / "bench.py"
Figures = dict[str, float | int | str]
MEASURES = {None: step.measure, "torch": step.against_torch, "padding": step.against_padding}


def add_data(parser: Parser) -> None:
    parser.description = "Reads batches as training does: samples/s, and how full the rows are."
    parser.add_argument("--data", help="path of a source; default: a synthetic data set with JPEGs of 640 x 480")
    kinds = ("llava", "parquet", "webdataset", "images")
    parser.add_argument("--kind", choices=kinds, default="llava", help="of the source, as config.data.sources[0].kind")
    parser.add_argument("--compare", choices=("torch",), help="in turns with a PyTorch DataLoader of as many workers")
    parser.add_argument("--images", nargs="*", default=[], help="folders, .zip or .tar files with its images")
    parser.add_argument("--tokenizer", help="folder of a tokenizer; default: one token per word")
    parser.add_argument("--template", default="v1", help="conversation template, with --tokenizer")
    parser.add_argument("--samples", type=int, within=Range(1, 2**24), default=2000, help="size of the synthetic set")
    parser.add_argument("--layout", choices=("pack", "pad"), default="pack")
    parser.add_argument("--length", type=int, within=SIZE, default=2048, help="S, tokens per row")
    parser.add_argument("--image-slots", type=int, within=Range(0, 4096), default=2, help="I, images per row")
    parser.add_argument("--image-tokens", type=int, within=SIZE, default=729, help="N, tokens per image")
    parser.add_argument("--image-size", type=int, within=Range(1, 2**14), default=384, help="pixels of an image's side")
    parser.add_argument("--image-mode", choices=("pad", "square", "crop"), default="pad")
    parser.add_argument("--batch", type=int, within=SIZE, default=32, help="conversations per step")
    parser.add_argument("--steps", type=int, within=SIZE, default=20, help="steps to read")
    parser.add_argument("--workers", type=int, within=Range(0, 1024), default=0, help="worker processes; 0: threads")
    parser.add_argument("--threads", type=int, within=Range(0, 1024), default=4, help="reader threads, without workers")
    parser.add_argument("--local-cache", metavar="DIR", help="keeps what is read from a bucket, as data.local_cache")
    parser.add_argument("--second-epoch", action="store_true", help="read all of an epoch, and measure the next, too")


def run_data(arguments: argparse.Namespace, others: list[str]) -> Figures:
    if others:
        raise UserError(f"unexpected arguments {others}")
    measure = data.against_torch if arguments.compare else data.measure
    return measure(
        data.Reading(
            data=arguments.data,
            kind=arguments.kind,
            images=tuple(arguments.images),
            tokenizer=arguments.tokenizer,
            template=arguments.template,
            samples=arguments.samples,
            packing=PackingConfig(arguments.length, arguments.image_slots, layout=arguments.layout),
            image_config=ImageConfig(arguments.image_size, mode=arguments.image_mode),
            image_tokens=arguments.image_tokens,
            batch=arguments.batch,
            steps=arguments.steps,
            workers=arguments.workers,
            threads=arguments.threads,
            local_cache=arguments.local_cache,
            second=arguments.second_epoch,
        )
    )


def add_step(parser: Parser) -> None:
    parser.description = (
        "Runs a recipe's train step on the devices of this machine, with random parameters and packed rows of made-up "
        "conversations whose lengths resemble LLaVA-1.5's stage 2."
    )
    parser.epilog = "--config.FIELD=VALUE overrides a field of the recipe, as in launch/train.py."
    parser.add_argument("--config", default=str(RECIPE), metavar="RECIPE", help="default: configs/bench.py")
    comparisons = [name for name in MEASURES if name]
    parser.add_argument("--compare", choices=comparisons, help="what to measure beside the step")
    parser.add_argument("--repeats", type=int, within=SIZE, default=5, help="steps to time; their median counts")
    parser.add_argument("--rows", type=int, within=SIZE, help="rows of a step; default: from config.data.batch")


def run_step(arguments: argparse.Namespace, others: list[str]) -> Figures:
    if arguments.compare == "torch":
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch shares the GPU's memory
    return MEASURES[arguments.compare](load_recipe(arguments.config, others), arguments.repeats, arguments.rows)


def add_generate(parser: Parser) -> None:
    parser.description = (
        "Answers made-up prompts with the engine of launch/generate.py: tokens/s of prompts and answers, and a queue "
        "of prompts with answers of 4 to 128 tokens."
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    parser.add_argument("--batches", type=int, nargs="+", within=SIZE, default=[1, 8, 32], help="rows at once")
    parser.add_argument("--prompt", type=int, within=SIZE, default=128, help="tokens of a prompt")
    parser.add_argument("--new", type=int, within=Range(2, 2**20), default=64, help="tokens of an answer")
    parser.add_argument("--repeats", type=int, within=SIZE, default=3, help="runs of each; their median counts")
    parser.add_argument("--queue", type=int, within=Range(0, 2**16), default=64, help="prompts of the queue; 0: none")
    parser.add_argument("--core-seconds", action="store_true", help="count seconds of cores, beside other programs")
    parser.add_argument("--quantize", choices=tuple(DTYPES), help="keep the matrices of our side in 8 bits")
    parser.add_argument("--compare", choices=("torch",), help="run transformers' generate beside, on equal weights")


def run_generate(arguments: argparse.Namespace, others: list[str]) -> Figures:
    if others:
        raise UserError(f"unexpected arguments {others}")
    names = ("dtype", "quantize", "prompt", "new", "repeats", "queue", "core_seconds")
    asked = generate.Generating(
        **{name: getattr(arguments, name) for name in names},
        batches=tuple(arguments.batches),
        compare=bool(arguments.compare),
    )
    return generate.measure(asked)


Run = Callable[[argparse.Namespace, list[str]], Figures]
COMMANDS: dict[str, tuple[Callable[[Parser], None], Run]] = {
    "data": (add_data, run_data),
    "step": (add_step, run_step),
    "generate": (add_generate, run_generate),
}
"""Subcommand -> function that adds its flags, and function that measures. The second also gets all unknown flags."""


def main(arguments: Sequence[str] | None = None) -> int:
    talk()
    parser = Parser(description=__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, (add_flags, _) in COMMANDS.items():
        subparser = subparsers.add_parser(name, formatter_class=argparse.HelpFormatter)
        subparser.add_argument("--json", type=location, metavar="FILE", help="write the figures there too")
        add_flags(subparser)
    try:
        parsed, others = parser.parse_known_args(arguments)
        for name in others:
            if name.startswith("--") and not re.match(r"--(no)?config\.", name):
                flag = name[2:].partition("=")[0]
                raise UserError(
                    f"unexpected arguments {others}: Unknown command line flag {flag!r}{parser.nearest(name)}"
                )
        figures = COMMANDS[parsed.command][1](parsed, others)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, value in figures.items():
        print(f"{name:34} {value:.4g}" if isinstance(value, float) else f"{name:34} {value}")
    if parsed.json:
        parsed.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    leave(main)
