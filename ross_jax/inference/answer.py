"""Answers to questions about pictures: prompts in batches, greedy decoding, text."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from ross_jax.data.encoders import build_prompt_encoder, stop_id
from ross_jax.inference.generate import generate
from ross_jax.inference.model import Model
from ross_jax.inference.prompts import Images, expand_prompt, prompt_batches
from ross_jax.models.ross import normalise


def answer(
    model: Model,
    records: Sequence[dict[str, Any]],
    images: Sequence[Images],
    max_new_tokens: int = 64,
    rows: int = 8,
    template: str | None = None,
    dtype: str = "float32",
) -> list[str]:
    """Greedy answers to conversations whose last turn is a question.

    Args:
      model: with vision encoder, projector and language model.
      records: in LLaVA's format.
      images: of each record, resized to the encoder's size.
      max_new_tokens: of an answer; a longer one is cut.
      rows: prompts that are answered at once.
      template: of the conversations; None: the model's own.
      dtype: of activations.

    Raises:
      UserError: no template, a record that is no prompt, a tokenizer that does not fit.
    """
    template = model.choose_template(template)
    if not records:
        return []
    tokenizer = model.tokenizer()
    encode = build_prompt_encoder(template, tokenizer)
    stop = stop_id(template, tokenizer)
    prompts = [expand_prompt(model, encode, *each) for each in zip(records, images, strict=True)]

    @jax.jit
    def run(params: Any, batch: dict[str, Array]):
        images = normalise(model.config, batch["images"])
        extend = partial(generate, max_new_tokens=max_new_tokens, stop_token=stop, dtype=dtype)
        result = extend(model.config, params, batch["tokens"], batch["segments"], images, batch["image_start"])
        return result.tokens, result.lengths

    texts: list[str] = []
    vision = model.config.vision
    for batch in prompt_batches(prompts, images, rows, vision.num_tokens, vision.image_size):
        tokens, lengths = map(np.asarray, run(model.params, batch))
        for ids, length in zip(tokens, lengths, strict=True):
            texts.append(tokenizer.decode([i for i in ids[:length] if i != stop], skip_special_tokens=False).strip())
    return texts[: len(records)]
