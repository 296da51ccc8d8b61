#!/usr/bin/env python
"""Shows how conversations become token ids and labels.

    python launch/inspect_data.py --template qwen_2 --tokenizer checkpoints/qwen2 --data llava_mix.json --limit 5

Each conversation is printed as text and as ids. What is supervised is green, or between ⟦ and ⟧ if the output has no
colours. A histogram of lengths follows, and how full rows of --length tokens get. Broken samples are named on stderr
and left out.
"""

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, get_args

import numpy as np

from ross_jax.arguments import SIZE, Parser
from ross_jax.config import Range, UserError, from_dict
from ross_jax.data.conversation import (
    IGNORE,
    IMAGE_ID,
    Compat,
    ConversationError,
    EncodedConversation,
    Template,
)
from ross_jax.data.encoders import build_encoder
from ross_jax.data.fields import Survey
from ross_jax.data.packing import Lengths, PackingConfig, PlanSettings, explain_dropped, make_plan
from ross_jax.data.records import RecordFile
from ross_jax.data.tokenizer import load_tokenizer

BARS = 12  # most bars of the histogram
GREEN, CYAN, BOLD, RESET = "\033[32m", "\033[36m", "\033[1m", "\033[0m"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--template", required=True, choices=get_args(Template), help="conversation template")
    parser.add_argument("--tokenizer", required=True, help="folder of a tokenizer (or a hub id)")
    parser.add_argument("--data", required=True, help="LLaVA conversations, JSON or JSONL")
    parser.add_argument(
        "--compat", default="default", choices=get_args(Compat), help="official: ids and labels of the reference"
    )
    parser.add_argument(
        "--json", metavar="OUT", help="write a list of {id, input_ids, labels}; -200 stands for an image"
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
    return parser.parse_args(arguments)


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
    kinds = zip((encoded.input_ids == IMAGE_ID).tolist(), (encoded.labels != IGNORE).tolist(), strict=True)
    position = 0
    for (is_image, is_supervised), group in groupby(kinds):
        ids = encoded.input_ids[position : (position := position + len(list(group)))].tolist()
        if is_image:
            texts += [painter.image(f"image: {image_tokens} tokens")] * len(ids)
            numbers += [painter.image(str(index)) for index in ids]
            continue
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for parts, shown in ((texts, _printable(text)), (numbers, " ".join(map(str, ids)))):
            parts.append(painter.supervised(shown) if is_supervised else shown)
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
            Path(arguments.json).write_text(json.dumps(output) + "\n")
        except OSError as error:
            raise UserError(f"--json {arguments.json}: cannot be written: {error.strerror}") from error
    if not encoded:
        raise UserError(f"{arguments.data}: none of the {broken} conversations can be used")
    print(summarise(encoded, config, arguments.image_tokens))
    if broken:
        print(f"{broken} conversations are broken and were left out (see above)", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that cannot show every character
    try:
        run(parse_arguments(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
