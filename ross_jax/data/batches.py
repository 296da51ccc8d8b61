"""From encoded conversations and images to the arrays of a batch.

    input_ids   [ 11  12 -200  13  14 ]            N = 3 tokens per image
    tokens      [ 11  12   0   0   0  13  14 ]     0 where the image goes
    targets     [ -   -    -   -   -  14  -  ]     the label of the next position of the same conversation
    image_start         2

A batch is a dictionary of arrays. B = rows, S = tokens per row, I = image slots per row:

    tokens       int32 [B, S]             text ids; 0 at image positions and in padding
    targets      int32 [B, S]             the id to predict at each position, -100 where there is none
    positions    int32 [B, S]             rotary position inside the conversation
    segments     int32 [B, S]             conversation number inside the row, from 1; 0 is padding
    images       uint8 [B, I, H, W, 3]    resized images, not normalised; 0 where the slot is empty
    image_start  int32 [B, I]             where each image's N tokens begin; S where the slot is empty
    image_ids    uint32 [B, I]            the image's number in the data set, from 1; 0 where the slot is empty
    sources      int32 [B, S]             number of the conversation's source; only if there are several

A run that reads precomputed targets or features (`data.precomputed`) has their arrays [B, I, ...] too, and has `images`
only if a component still looks at pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ross_jax.data.conversation import IGNORE, IMAGE_ID, EncodedConversation
from ross_jax.data.packing import Location, PackingConfig

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class RowShape:
    """Sizes of a row.

    Attributes:
      length: S, tokens.
      images: I, image slots.
      image_tokens: N, tokens per image.
      image_size: side of an image in pixels.
    """

    length: int
    images: int
    image_tokens: int
    image_size: int


class Expanded(NamedTuple):
    """A conversation as the model sees it: T tokens, N of them for each image.

    Attributes:
      tokens: int32[T], 0 at image positions.
      targets: int32[T], the label of the next token; `IGNORE` where there is none, and at the end.
      image_start: int32[images], ascending.
    """

    tokens: np.ndarray
    targets: np.ndarray
    image_start: np.ndarray

    @property
    def supervised(self) -> int:
        """Number of positions that have a target."""
        return int(np.count_nonzero(self.targets != IGNORE))


def expand(encoded: EncodedConversation, image_tokens: int, limits: PackingConfig | None = None) -> Expanded:
    """Makes room for images and shifts labels to targets.

    Args:
      image_tokens: N.
      limits: cuts the conversation to what a row can hold. The cut falls before the first token, image or target that
        has no room. An image is never cut: an image without room is left out with everything after it. None: no cut.
    """
    is_image = encoded.input_ids == IMAGE_ID
    sizes = np.where(is_image, image_tokens, 1)
    tokens = np.repeat(np.where(is_image, 0, encoded.input_ids), sizes).astype(np.int32)
    labels = np.repeat(np.where(is_image, IGNORE, encoded.labels), sizes).astype(np.int32)
    image_start = (np.cumsum(sizes) - sizes)[is_image].astype(np.int32)
    if limits is not None:
        end = _cut(labels, image_start, image_tokens, limits)
        tokens, labels, image_start = tokens[:end], labels[:end], image_start[image_start < end]
    # The first token's label is dropped: no token comes before it to predict it.
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


def empty_batch(rows: int, shape: RowShape, sources: bool = False) -> Batch:
    """A batch of padding: no conversation, and every image slot empty.

    Args:
      sources: whether the batch has the field `sources`.
    """
    tokens, slots = (rows, shape.length), (rows, shape.images)
    extra = {"sources": np.zeros(tokens, np.int32)} if sources else {}
    return extra | {
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
    location: Location,
    conversation: Expanded,
    images: Sequence[np.ndarray],
    precomputed: Sequence[Mapping[str, np.ndarray]] = (),
) -> None:
    """Writes one conversation into a row of `batch`, in place.

    The location comes from the plan, not from what the row already holds. So a broken conversation leaves its place
    empty, and nothing else moves.

    Args:
      images: uint8[H, W, 3] for each image of the conversation; empty if the batch has no `images`.
      precomputed: {batch field: array[...]} for each image of the conversation.
    """
    length, count = len(conversation.tokens), len(conversation.image_start)
    span = np.s_[row, location.start : location.start + length]
    slots = np.s_[row, location.slot : location.slot + count]
    batch["tokens"][span] = conversation.tokens
    batch["targets"][span] = conversation.targets
    batch["positions"][span] = np.arange(length)
    batch["segments"][span] = location.segment
    if "sources" in batch:
        batch["sources"][span] = location.source
    batch["image_start"][slots] = location.start + conversation.image_start
    batch["image_ids"][slots] = location.first_image_id + np.arange(count)
    for slot, image in enumerate(images[:count], location.slot):
        batch["images"][row, slot] = image
    for slot, values in enumerate(precomputed[:count], location.slot):
        for name, value in values.items():
            batch[name][row, slot] = value
