#!/usr/bin/env python
"""Shows how conversations become token ids and labels.

    python launch/inspect_data.py --template qwen_2 --tokenizer checkpoints/qwen2 --data llava_mix.json --limit 5

Each conversation is printed as text and as ids, the supervised part green (between ⟦ and ⟧ where there are no colours).
A histogram of the lengths and the efficiency of packing them into rows of --length tokens follow. Broken samples are
named on stderr and left out.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, get_args

import numpy as np

from ross_jax.config import UserError
from ross_jax.data.conversation import (
    IGNORE,
    IMAGE_ID,
    Compat,
    ConversationError,
    EncodedConversation,
    Template,
)
from ross_jax.data.encoders import build_encoder
from ross_jax.data.packing import Lengths, PackingConfig, make_plan
from ross_jax.data.sources import RecordFile
from ross_jax.data.tokenizer import load_tokenizer

BARS = 12  # of the histogram
GREEN, CYAN, BOLD, RESET = "\033[32m", "\033[36m", "\033[1m", "\033[0m"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--template", required=True, choices=get_args(Template), help="conversation template")
    parser.add_argument("--tokenizer", required=True, help="folder of a tokenizer (or a hub id)")
    parser.add_argument("--data", required=True, help="LLaVA conversations, JSON or JSONL")
    parser.add_argument(
        "--compat", default="default", choices=get_args(Compat), help="official: the reference's ids and labels"
    )
    parser.add_argument("--json", metavar="OUT", help="write a list of {id, input_ids, labels}; -200 at a picture")
    parser.add_argument("--limit", type=_positive, help="only the first LIMIT conversations")
    parser.add_argument(
        "--length",
        type=_positive,
        default=PackingConfig.length,
        help="S, tokens of a packed row; also the tokenizer's maximum length, where compat=official cuts texts "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--image-tokens", type=_positive, default=729, help="N, tokens of a picture (default %(default)s)"
    )
    parser.add_argument(
        "--image-slots", type=int, default=PackingConfig.images, help="I, pictures per row (default %(default)s)"
    )
    return parser.parse_args(arguments)


class Painter:
    """Marks stretches of text: by colour on a terminal, by brackets elsewhere or if NO_COLOR is set."""

    def __init__(self, stream: Any):
        self.colours = stream.isatty() and not os.environ.get("NO_COLOR")

    def supervised(self, text: str) -> str:
        return f"{GREEN}{text}{RESET}" if self.colours else f"⟦{text}⟧"

    def image(self, text: str) -> str:
        return f"{CYAN}[{text}]{RESET}" if self.colours else f"[{text}]"

    def heading(self, text: str) -> str:
        return f"{BOLD}{text}{RESET}" if self.colours else text


def describe(encoded: EncodedConversation, tokenizer: Any, painter: Painter, image_tokens: int) -> tuple[str, str]:
    """The conversation as marked text and as marked ids."""
    texts, numbers = [], []
    kinds = [(index == IMAGE_ID, label != IGNORE) for index, label in zip(*_rows(encoded), strict=True)]
    position = 0
    for (is_image, is_supervised), group in groupby(kinds):
        ids = encoded.input_ids[position : (position := position + len(list(group)))].tolist()
        if is_image:
            texts += [painter.image(f"picture: {image_tokens} tokens")] * len(ids)
            numbers += [painter.image(str(index)) for index in ids]
            continue
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for parts, shown in ((texts, _printable(text)), (numbers, " ".join(map(str, ids)))):
            parts.append(painter.supervised(shown) if is_supervised else shown)
    return "".join(texts), " ".join(numbers)


def _rows(encoded: EncodedConversation) -> Iterator[list[int]]:
    yield encoded.input_ids.tolist()
    yield encoded.labels.tolist()


def _printable(text: str) -> str:
    """The text with its control characters spelled out, so that data cannot drive the terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() or c == "\u3000" else ascii(c)[1:-1] for c in text)


def histogram(lengths: Sequence[int], width: int = 50) -> str:
    """Lines of bars, `BARS` at most, between the shortest and the longest."""
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
    """Length statistics, their histogram, and the efficiency of a packing plan."""
    lengths = Lengths(
        tokens=np.array([item.length(image_tokens) for item in encoded], np.int32),
        images=np.array([item.num_images for item in encoded], np.int32),
        supervised=np.array([item.num_supervised for item in encoded], np.int32),
    )
    tokens = lengths.tokens.tolist()
    lines = [
        f"{len(encoded)} conversations, {lengths.images.sum()} pictures; tokens per conversation, {image_tokens} for "
        f"each picture: mean {np.mean(tokens):.0f}, median {np.median(tokens):.0f}, longest {max(tokens)}; "
        f"supervised: {lengths.supervised.sum() / sum(tokens):.1%}",
        histogram(tokens),
    ]
    row = f"rows of {config.length} tokens and {config.images} pictures"
    try:
        plan = make_plan(lengths, config, batch=1)
    except UserError as error:
        return "\n".join([*lines, f"packing into {row}: {error}"])
    statistics = plan.statistics(lengths, config)
    lines.append(
        f"packing into {row}: {statistics['rows']} rows, efficiency {statistics['efficiency']:.1%}; "
        f"{statistics['dropped']} conversations exceed a row"
    )
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> None:
    try:
        config = PackingConfig(length=arguments.length, images=arguments.image_slots)
    except ValueError as error:
        raise UserError(str(error)) from error
    records = RecordFile(arguments.data)
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
            print(f"left out: {error}", file=sys.stderr)
            continue
        name = record.get("id", i)
        encoded.append(item)
        output.append({"id": name, "input_ids": item.input_ids.tolist(), "labels": item.labels.tolist()})
        text, ids = describe(item, tokenizer, painter, arguments.image_tokens)
        length = item.length(arguments.image_tokens)
        counts = f"{length} tokens, {item.num_images} pictures, {item.num_supervised} supervised"
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
    parsed = parse_arguments(arguments)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show every sign
    try:
        run(parsed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
