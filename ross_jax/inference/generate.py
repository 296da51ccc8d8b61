"""Greedy generation with a static key-value cache."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ross_jax.config import required
from ross_jax.models.language import LanguageModel, empty_cache
from ross_jax.models.layers import apply
from ross_jax.models.ross import Ross, RossConfig


class Generation(NamedTuple):
    """Generated ids.

    Attributes:
      tokens: new ids. After a row's end the first stop token is repeated.
      lengths: number of new ids in each row, with the stop token.
      logits: scores from which each id was chosen, on request.
    """

    tokens: Int[Array, "batch new"]
    lengths: Int[Array, " batch"]
    logits: Float[Array, "batch new vocab"] | None


def generate(
    config: RossConfig,
    params: Any,
    tokens: Int[Array, "batch seq"],
    segments: Int[Array, "batch seq"],
    images: Float[Array, "batch images height width 3"],
    image_start: Int[Array, "batch images"],
    max_new_tokens: int,
    stop_token: int | Sequence[int] | None = None,
    dtype: DTypeLike = jnp.float32,
    return_logits: bool = False,
    limits: Int[Array, " batch"] | None = None,
) -> Generation:
    """Extends prompts by the most likely ids. When it is compiled, arguments that are not arrays must be static.

    Args:
      config: sizes of the components.
      params: parameters with `language`, and `vision` and `projector` if there are images.
      tokens: prompts, padded on the left to one length; anything at image positions.
      segments: 1 at a prompt's tokens, 0 at its padding.
      images: normalised images; `[batch, 0, height, width, 3]` for prompts without images.
      image_start: index in the padded row where each image's tokens begin; `seq` where the slot is empty.
      max_new_tokens: number of new ids per row; generation ends earlier when every row has stopped.
      stop_token: id that ends a row, or several. None: rows end only at `max_new_tokens`.
      dtype: dtype of activations.
      return_logits: also return the scores.
      limits: number of new ids of each row, at most `max_new_tokens`; 0 for padding. None: `max_new_tokens`.
    """
    batch, length = tokens.shape
    ross, sizes = Ross(config, dtype), required(config.language)
    language, text_params = LanguageModel(sizes, dtype), params["language"]

    if images.shape[1]:
        projected = apply(ross, params, images, method="encode_images")
        embeddings = apply(ross, params, tokens, projected, image_start, method="embed")
    else:
        embeddings = apply(language, text_params, tokens, method="embed")
    positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
    cache = empty_cache(sizes, batch, length + max_new_tokens, dtype)
    output = apply(language, text_params, embeddings, positions, segments, cache)
    scores = apply(language, text_params, output.hidden[:, -1], method="logits")

    stops = np.array([] if stop_token is None else stop_token, np.int32).reshape(-1)
    filler = stops[0] if stops.size else 0
    limits = jnp.full(batch, max_new_tokens) if limits is None else limits
    new_tokens = jnp.full((batch, max_new_tokens), filler, jnp.int32)
    kept = jnp.zeros((batch, max_new_tokens, sizes.vocab_size), jnp.float32) if return_logits else None

    def unfinished(state):
        step, _, _, stopped, *_ = state
        return (step < max_new_tokens) & ~jnp.all(stopped)

    def extend(state):
        step, scores, cache, stopped, lengths, new_tokens, kept = state
        chosen = jnp.where(stopped, filler, jnp.argmax(scores, axis=-1)).astype(jnp.int32)
        new_tokens = new_tokens.at[:, step].set(chosen)
        lengths = lengths + ~stopped
        kept = kept.at[:, step].set(scores) if return_logits else None
        stopped = stopped | jnp.isin(chosen, stops) | (lengths >= limits)
        embedded = apply(language, text_params, chosen[:, None], method="embed")
        where = (positions[:, -1] + 1 + step)[:, None]
        output = apply(language, text_params, embedded, where, jnp.ones((batch, 1), jnp.int32), cache)
        scores = apply(language, text_params, output.hidden[:, 0], method="logits")
        return step + 1, scores, output.cache, stopped, lengths, new_tokens, kept

    state = (
        jnp.zeros((), jnp.int32),
        scores,
        output.cache,
        limits <= 0,
        jnp.zeros(batch, jnp.int32),
        new_tokens,
        kept,
    )
    with jax.named_scope("decode"):
        *_, lengths, new_tokens, kept = jax.lax.while_loop(unfinished, extend, state)
    return Generation(new_tokens, lengths, kept)
