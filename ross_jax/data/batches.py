"""From encoded conversations and pictures to the arrays of a batch.

    input_ids   [ 11  12 -200  13  14 ]            N = 3 tokens per picture
    tokens      [ 11  12   0   0   0  13  14 ]     0 where the picture goes
    targets     [ -   -    -   -   -  14  -  ]     the label of the next position of the same conversation
    image_start         2

A batch is a dictionary with the arrays of `BATCH_FIELDS`; B = rows, S = tokens per row, I = picture slots per row:

    tokens       int32 [B, S]             text ids; 0 at picture positions and in padding
    targets      int32 [B, S]             the id to predict at each position, -100 where nothing is
    positions    int32 [B, S]             rotary position inside its segment
    segments     int32 [B, S]             conversation number inside the row, from 1; 0 = padding
    images       uint8 [B, I, H, W, 3]    resized pictures, not normalised; 0 where the slot is empty
    image_start  int32 [B, I]             where each picture's N tokens begin; S where the slot is empty
    image_ids    uint32 [B, I]            the picture's identity, from 1; 0 where the slot is empty

Where something was computed of the pictures before (`ross_jax.data.precomputed`), its arrays [B, I, ...] are there too,
and `images` only if something else still needs it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from ross_jax.data.conversation import IGNORE, IMAGE_ID
from ross_jax.data.packing import PackingConfig

BATCH_FIELDS = ("tokens", "targets", "positions", "segments", "images", "image_start", "image_ids")

Batch = dict[str, np.ndarray]


@runtime_checkable
class Encoded(Protocol):
    """What a conversation encoder returns.

    Attributes:
      input_ids: int32 [length], `IMAGE_ID` where a picture stands.
      labels: int32 [length], not shifted: the id itself where it is supervised, `IGNORE` elsewhere.
    """

    input_ids: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class RowShape:
    """S, I, N and the side of a picture in pixels."""

    length: int
    images: int
    image_tokens: int
    image_size: int


class Expanded(NamedTuple):
    """A conversation as the model sees it, T = its length with N tokens for each picture.

    Attributes:
      tokens: int32 [T], 0 at picture positions.
      targets: int32 [T], shifted: the label of the next token; `IGNORE` at the end.
      image_start: int32 [pictures], ascending.
    """

    tokens: np.ndarray
    targets: np.ndarray
    image_start: np.ndarray

    @property
    def supervised(self) -> int:
        """Positions that have a target."""
        return int(np.count_nonzero(self.targets != IGNORE))


def expand(encoded: Encoded, image_tokens: int, limits: PackingConfig | None = None) -> Expanded:
    """Makes room for pictures and shifts labels to targets.

    Args:
      encoded: ids and labels.
      image_tokens: N.
      limits: cut the conversation to what a row can hold. None: leave it whole. The cut falls before the first token,
        picture or target that has no room, so a picture is never cut: it is inside whole, or left out with all that
        follows it.
    """
    is_image = encoded.input_ids == IMAGE_ID
    sizes = np.where(is_image, image_tokens, 1)
    tokens = np.repeat(np.where(is_image, 0, encoded.input_ids), sizes).astype(np.int32)
    labels = np.repeat(np.where(is_image, IGNORE, encoded.labels), sizes).astype(np.int32)
    image_start = (np.cumsum(sizes) - sizes)[is_image].astype(np.int32)
    if limits is not None:
        end = _cut(labels, image_start, image_tokens, limits)
        tokens, labels, image_start = tokens[:end], labels[:end], image_start[image_start < end]
    # The first token's label is no target: nothing comes before it that could predict it.
    targets = np.append(labels[1:], np.int32(IGNORE)).astype(np.int32)[: len(labels)]
    return Expanded(tokens, targets, image_start)


def _cut(labels: np.ndarray, image_start: np.ndarray, image_tokens: int, limits: PackingConfig) -> int:
    ends = [limits.length, len(labels)]
    ends += image_start[image_start + image_tokens > limits.length].tolist()
    ends += image_start[limits.images :].tolist()
    if limits.supervised is not None:
        supervised = 1 + np.flatnonzero(labels[1:] != IGNORE)
        ends += supervised[limits.supervised :].tolist()
    return min(ends)


def empty_batch(rows: int, shape: RowShape) -> Batch:
    """A batch of padding: no conversation, every picture slot empty."""
    tokens, slots = (rows, shape.length), (rows, shape.images)
    return {
        "tokens": np.zeros(tokens, np.int32),
        "targets": np.full(tokens, IGNORE, np.int32),
        "positions": np.zeros(tokens, np.int32),
        "segments": np.zeros(tokens, np.int32),
        "images": np.zeros((*slots, shape.image_size, shape.image_size, 3), np.uint8),
        "image_start": np.full(slots, shape.length, np.int32),
        "image_ids": np.zeros(slots, np.uint32),
    }


def place(
    batch: Batch,
    row: int,
    conversation: Expanded,
    images: Sequence[np.ndarray],
    *,
    start: int,
    slot: int,
    segment: int,
    first_image_id: int,
    precomputed: Sequence[Mapping[str, np.ndarray]] = (),
) -> None:
    """Writes one conversation into a row of `batch`, in place.

    The caller knows from the plan where it goes, whether or not the conversations before it turned out usable: so a
    broken one leaves its place empty and nothing moves.

    Args:
      images: uint8 [H, W, 3] each, as many as the conversation has.
      start: its first position in the row.
      slot: its first picture slot.
      segment: its number in the row, from 1.
      first_image_id: identity of its first picture; the others count on.
      precomputed: of each picture, by the batch's field.
    """
    length, count = len(conversation.tokens), len(conversation.image_start)
    span, slots = np.s_[row, start : start + length], np.s_[row, slot : slot + count]
    batch["tokens"][span] = conversation.tokens
    batch["targets"][span] = conversation.targets
    batch["positions"][span] = np.arange(length)
    batch["segments"][span] = segment
    batch["image_start"][slots] = start + conversation.image_start
    batch["image_ids"][slots] = first_image_id + np.arange(count)
    for offset, image in enumerate(images[:count]):
        batch["images"][row, slot + offset] = image
    for offset, values in enumerate(precomputed[:count]):
        for name, value in values.items():
            batch[name][row, slot + offset] = value
