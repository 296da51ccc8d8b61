"""Prompts with their pictures, laid out in batches of one shape."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from ross_jax.config import UserError
from ross_jax.data.batches import Batch, Expanded, RowShape, empty_batch, expand, place
from ross_jax.data.conversation import IGNORE, EncodedConversation
from ross_jax.data.packing import Location
from ross_jax.inference.model import Model

Images = Sequence[UInt8[np.ndarray, "height width 3"]]


def expand_prompt(model: Model, encode: Any, record: dict[str, Any], images: Images) -> Expanded:
    """A prompt with room for its pictures; `expand` without anything supervised.

    Raises:
      UserError: the record is no prompt, or has another number of pictures.
    """
    ids = encode(record)
    prompt = expand(EncodedConversation(ids, np.full_like(ids, IGNORE)), model.config.vision.num_tokens)
    if len(prompt.image_start) != len(images):
        raise UserError(
            f"prompt {record.get('id', '')}: {len(prompt.image_start)} <image> marks for {len(images)} pictures"
        )
    return prompt


def prompt_batches(
    prompts: Sequence[Expanded], images: Sequence[Images], rows: int, image_tokens: int, image_size: int
) -> Iterator[Batch]:
    """Batches of `rows` prompts, padded on the left to the longest of all; the last one's free rows stay empty."""
    length = max(len(prompt.tokens) for prompt in prompts)
    shape = RowShape(length, max(len(each) for each in images), image_tokens, image_size)
    for first in range(0, len(prompts), rows):
        batch = empty_batch(rows, shape)
        for row, prompt in enumerate(prompts[first : first + rows]):
            location = Location(start=length - len(prompt.tokens), slot=0, segment=1, first_image_id=0)
            place(batch, row, location, prompt, images[first + row])
        yield batch
