#!/usr/bin/env python
"""Shows how conversations become token ids and labels, or checks all data of a recipe before a run.

    python launch/inspect_data.py --template qwen_2 --tokenizer checkpoints/qwen2 --data llava_mix.json --limit 5
    python launch/inspect_data.py --check --config=configs/ross.py:stage=finetune --html=data.html

Each conversation is printed as text and as ids. What is supervised is green, or between ⟦ and ⟧ if the output has no
colours. A histogram of lengths follows, and how full rows of --length tokens get. Broken samples are named on stderr
and left out.

--check encodes every record and decodes every image of the recipe's sources on all cores, and prints a table with a
row for each source, and examples of what is wrong. It exits with 0 if all samples can be used as they are, with 3 if
some cannot and the recipe allows so many, and with 1 if a run would stop. --config.FIELD=VALUE overrides a field.
"""

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from ross_jax.arguments import SIZE, Parser
from ross_jax.command_line import load_recipe
from ross_jax.config import Range, UserError, from_dict
from ross_jax.console import talk
from ross_jax.data.check import PROBLEMS, check, stops_run, table
from ross_jax.data.conversation import (
    Compat,
    ConversationError,
    EncodedConversation,
    Template,
)
from ross_jax.data.encoders import build_encoder
from ross_jax.data.fields import Survey
from ross_jax.data.packing import Lengths, PackingConfig, PlanSettings, explain_dropped, make_plan
from ross_jax.data.page import make_page, pieces
from ross_jax.data.records import RecordFile
from ross_jax.data.sources import found_in_fields, make_mixture, open_sources
from ross_jax.data.tokenizer import load_tokenizer
from ross_jax.process import leave
from ross_jax.storage import location
from ross_jax.training.preprocessing import make_preprocessing

SOME_LEFT_OUT = 3  # exit status
BARS = 12  # most bars of the histogram
GREEN, CYAN, BOLD, RESET = "\033[32m", "\033[36m", "\033[1m", "\033[0m"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--template", choices=get_args(Template), help="conversation template")
    parser.add_argument("--tokenizer", help="folder of a tokenizer (or a hub id)")
    parser.add_argument("--data", help="conversations, JSON or JSONL")
    parser.add_argument("--check", action="store_true", help="check all data of the recipe --config")
    parser.add_argument("--config", metavar="RECIPE", help="with --check: PATH or PATH:ARGUMENTS of a recipe")
    parser.add_argument(
        "--html", type=location, metavar="FILE", help="with --check: write a page that shows samples of each source"
    )
    parser.add_argument(
        "--compat", default="default", choices=get_args(Compat), help="official: ids and labels of the reference"
    )
    parser.add_argument(
        "--json", type=location, metavar="OUT", help="write a list of {id, input_ids, labels}; -200 stands for an image"
    )
    parser.add_argument("--limit", type=int, within=Range(1, 2**31 - 1), help="only the first LIMIT conversations")
    parser.add_argument(
        "--length",
        type=int,
        within=SIZE,
        default=PackingConfig.length,
        help="S, tokens per packed row; also the tokenizer's maximum length, at which --compat=official cuts texts "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--image-tokens",
        type=int,
        within=SIZE,
        default=729,
        help="N, tokens per image (default %(default)s)",
    )
    parser.add_argument(
        "--image-slots", type=int, default=PackingConfig.images, help="I, image slots per row (default %(default)s)"
    )
    parsed, others = parser.parse_known_args(arguments)
    if not parsed.check:
        parsed = parser.parse_args(arguments)
        missing = [f"--{name}" for name in ("template", "tokenizer", "data") if getattr(parsed, name) is None]
        if missing:
            parser.error(f"the following arguments are required: {', '.join(missing)}; or --check and --config")
    elif not parsed.config:
        parser.error("--check needs --config, the recipe of the run")
    parsed.overrides = others
    return parsed


class Painter:
    """Marks pieces of text: by colour on a terminal, else (or if NO_COLOR is set) by brackets."""

    def __init__(self, stream: Any):
        self.colours = stream.isatty() and not os.environ.get("NO_COLOR")

    def supervised(self, text: str) -> str:
        return f"{GREEN}{text}{RESET}" if self.colours else f"⟦{text}⟧"

    def image(self, text: str) -> str:
        return f"{CYAN}[{text}]{RESET}" if self.colours else f"[{text}]"

    def heading(self, text: str) -> str:
        return f"{BOLD}{text}{RESET}" if self.colours else text


def describe(encoded: EncodedConversation, tokenizer: Any, painter: Painter, image_tokens: int) -> tuple[str, str]:
    """(the conversation as marked text, the same as marked ids)."""
    texts, numbers = [], []
    for kind, ids, text in pieces(encoded, tokenizer):
        if kind == "image":
            texts.append(painter.image(f"image: {image_tokens} tokens"))
            numbers.append(painter.image(str(ids[0])))
            continue
        for parts, shown in ((texts, _printable(text)), (numbers, " ".join(map(str, ids)))):
            parts.append(painter.supervised(shown) if kind == "supervised" else shown)
    return "".join(texts), " ".join(numbers)


def _printable(text: str) -> str:
    """The text with control characters escaped, so that data cannot control the terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() or c == "\u3000" else ascii(c)[1:-1] for c in text)


def histogram(lengths: Sequence[int], width: int = 50) -> str:
    """A histogram of lengths with at most `BARS` lines, one per interval: `  10 to 20:       3 ####`."""
    low, high = min(lengths), max(lengths)
    step = max(1, -(-(high - low + 1) // BARS))
    counts = np.bincount((np.asarray(lengths) - low) // step)
    digits = len(str(low + step * len(counts)))
    return "\n".join(
        f"  {low + step * i:{digits}} to {low + step * (i + 1) - 1:{digits}}: {count:7} "
        + "#" * -(-width * int(count) // int(counts.max()))
        for i, count in enumerate(counts)
    )


def summarise(encoded: Sequence[EncodedConversation], config: PackingConfig, image_tokens: int) -> str:
    """Statistics of lengths, their histogram, and how full packed rows get."""
    lengths = Lengths(
        tokens=np.array([item.length(image_tokens) for item in encoded], np.int32),
        images=np.array([item.num_images for item in encoded], np.int32),
        supervised=np.array([item.num_supervised for item in encoded], np.int32),
    )
    tokens = lengths.tokens.tolist()
    lines = [
        f"{len(encoded)} conversations, {lengths.images.sum()} images; tokens per conversation, {image_tokens} for "
        f"each image: mean {np.mean(tokens):.0f}, median {np.median(tokens):.0f}, longest {max(tokens)}; "
        f"supervised: {lengths.supervised.sum() / sum(tokens):.1%}",
        histogram(tokens),
    ]
    row = f"rows of {config.length} tokens and {config.images} images"
    try:
        plan = make_plan(lengths, PlanSettings(config, batch=1))
    except UserError as error:
        return "\n".join([*lines, f"packing into {row}: {error}"])
    statistics = plan.statistics(lengths, config)
    lines.append(
        f"packing into {row}: {statistics['rows']} rows, efficiency {statistics['efficiency']:.1%}; "
        f"{statistics['dropped']} conversations exceed a row"
    )
    lines += filter(None, [explain_dropped(plan, lengths, config)])
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> None:
    limits = {"length": arguments.length, "images": arguments.image_slots}
    config = from_dict(PackingConfig, limits, "--length and --image-slots")
    survey = Survey()
    records = RecordFile(arguments.data, visit=survey.add)
    for found in survey.findings(arguments.data):
        print(f"warning: {found}", file=sys.stderr)
    tokenizer = load_tokenizer(arguments.tokenizer, max_length=arguments.length)
    encode = build_encoder(arguments.template, tokenizer, arguments.compat)
    painter = Painter(sys.stdout)
    encoded, output, broken = [], [], 0
    for i in range(min(len(records), arguments.limit or len(records))):
        record = records[i]
        try:
            item = encode(record)
        except ConversationError as error:
            broken += 1
            print(f"left out: {records.place(i)}: {error}", file=sys.stderr)
            continue
        name = record.get("id", i)
        encoded.append(item)
        output.append({"id": name, "input_ids": item.input_ids.tolist(), "labels": item.labels.tolist()})
        text, ids = describe(item, tokenizer, painter, arguments.image_tokens)
        length = item.length(arguments.image_tokens)
        counts = f"{length} tokens, {item.num_images} images, {item.num_supervised} supervised"
        print(painter.heading(f"== {_printable(str(name))}: {counts}"))
        print(f"{text}\nids: {ids}\n")
    if arguments.json:
        try:
            arguments.json.write_text(json.dumps(output) + "\n")
        except OSError as error:
            raise UserError(f"--json {arguments.json}: cannot be written: {error.strerror or error}") from error
    if not encoded:
        raise UserError(f"{arguments.data}: none of the {broken} conversations can be used")
    print(summarise(encoded, config, arguments.image_tokens))
    if broken:
        print(f"{broken} conversations are broken and were left out (see above)", file=sys.stderr)


def run_check(arguments: argparse.Namespace) -> int:
    """Checks the sources of a recipe. Returns the exit status."""
    config = load_recipe(arguments.config, arguments.overrides)
    data, tokenizer = config.data, load_tokenizer(config.text.tokenizer)
    preprocessing = make_preprocessing(config, tokenizer)
    source, _ = open_sources(data.sources, limits=data.limits)
    for finding in found_in_fields(source, data.max_broken):
        print(f"warning: {finding}", file=sys.stderr)
    mixture = make_mixture(data.sources, source, data.shuffle_memory)
    findings = check(source, preprocessing, data, mixture)
    reason = stops_run(findings, data, mixture)
    cells = table(findings)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for name, *numbers in cells:
        print(f"{name:{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(numbers, widths[1:], strict=True)))
    for found in findings:
        for problem, examples in found.examples.items():
            if examples:
                print(f"\n{found.name}: {problem} ({found.counts[problem]})")
                print(*(f"  {_printable(each.reason)}" for each in examples), sep="\n")
    if arguments.html:
        page = make_page(f"Data of {arguments.config}", findings, source, preprocessing, data.packing, tokenizer)
        try:
            arguments.html.write_text(page, encoding="utf-8")
        except OSError as error:
            raise UserError(f"--html {arguments.html}: cannot be written: {error.strerror or error}") from error
    if reason:
        raise UserError(reason)
    return SOME_LEFT_OUT if any(found.counts[problem] for found in findings for problem in PROBLEMS) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    talk()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that cannot show every character
    try:
        parsed = parse_arguments(arguments)
        if parsed.check:
            return run_check(parsed)
        run(parsed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


if __name__ == "__main__":
    leave(main)
