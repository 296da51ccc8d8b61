"""Answers to questions about pictures: prompts laid out in batches of one shape, greedy decoding, text."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, UInt8

from ross_jax.config import UserError
from ross_jax.data.batches import Batch, Expanded, RowShape, empty_batch, expand, place
from ross_jax.data.conversation import IGNORE, EncodedConversation
from ross_jax.data.encoders import build_prompt_encoder, stop_id
from ross_jax.inference.generate import generate
from ross_jax.inference.model import Model
from ross_jax.models.ross import normalise

Pictures = Sequence[UInt8[np.ndarray, "height width 3"]]


def expand_prompt(model: Model, encode: Any, record: dict[str, Any], pictures: Pictures) -> Expanded:
    """A prompt with room for its pictures; `expand` without anything supervised.

    Raises:
      UserError: the record is no prompt, or has another number of pictures.
    """
    ids = encode(record)
    prompt = expand(EncodedConversation(ids, np.full_like(ids, IGNORE)), model.config.vision.num_tokens)
    if len(prompt.image_start) != len(pictures):
        raise UserError(
            f"prompt {record.get('id', '')}: {len(prompt.image_start)} <image> marks for {len(pictures)} pictures"
        )
    return prompt


def prompt_batches(
    prompts: Sequence[Expanded], pictures: Sequence[Pictures], rows: int, image_tokens: int, image_size: int
) -> Iterator[Batch]:
    """Batches of `rows` prompts, padded on the left to the longest of all; the last one's free rows stay empty."""
    length = max(len(prompt.tokens) for prompt in prompts)
    shape = RowShape(length, max(len(each) for each in pictures), image_tokens, image_size)
    for first in range(0, len(prompts), rows):
        batch = empty_batch(rows, shape)
        for row, prompt in enumerate(prompts[first : first + rows]):
            start, own = length - len(prompt.tokens), pictures[first + row]
            place(batch, row, prompt, own, start=start, slot=0, segment=1, first_image_id=0)
        yield batch


def answer(
    model: Model,
    records: Sequence[dict[str, Any]],
    pictures: Sequence[Pictures],
    max_new_tokens: int = 64,
    rows: int = 8,
    template: str | None = None,
    dtype: str = "float32",
) -> list[str]:
    """Greedy answers to conversations whose last turn is a question.

    Args:
      model: with vision encoder, projector and language model.
      records: in LLaVA's format.
      pictures: of each record, resized to the encoder's size.
      max_new_tokens: of an answer; a longer one is cut.
      rows: prompts that are answered at once.
      template: of the conversations; None: the model's own.
      dtype: of activations.

    Raises:
      UserError: no template, a record that is no prompt, a tokenizer that does not fit.
    """
    template = template or model.template
    if template is None:
        raise UserError(f"{model.folder}: does not say its conversation template; name one")
    if not records:
        return []
    tokenizer = model.tokenizer()
    encode = build_prompt_encoder(template, tokenizer)
    stop = stop_id(template, tokenizer)
    prompts = [expand_prompt(model, encode, *each) for each in zip(records, pictures, strict=True)]

    @jax.jit
    def run(params: Any, batch: dict[str, Array]):
        images = normalise(model.config, batch["images"])
        extend = partial(generate, max_new_tokens=max_new_tokens, stop_token=stop, dtype=dtype)
        result = extend(model.config, params, batch["tokens"], batch["segments"], images, batch["image_start"])
        return result.tokens, result.lengths

    texts: list[str] = []
    vision = model.config.vision
    for batch in prompt_batches(prompts, pictures, rows, vision.num_tokens, vision.image_size):
        tokens, lengths = map(np.asarray, run(model.params, batch))
        for ids, length in zip(tokens, lengths, strict=True):
            texts.append(tokenizer.decode([i for i in ids[:length] if i != stop], skip_special_tokens=False).strip())
    return texts[: len(records)]
