"""Generation on the device: rows of a static key-value cache take prompts and extend them, each at its own length.

A row with a prompt of 4 tokens (one of them an image's) and 2 new ones, in a cache with 8 slots per row:

    slot      0   1   2   3   4   5   6   7
    holds   [ 11  im  12  13  21  -   -   - ]     lengths 5; `tokens` has 22, which is chosen but not in the cache yet
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ross_jax.config import required
from ross_jax.inference.sampling import Drawing, choose
from ross_jax.models.image_tokens import scatter_images
from ross_jax.models.language import Cache, LanguageModel, empty_cache
from ross_jax.models.layers import apply
from ross_jax.models.ross import Ross, RossConfig
from ross_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Everything static about generation.

    Attributes:
      config: sizes of the components.
      dtype: dtype of activations and of the cache.
      stops: ids that end an answer.
      stacked: as in `LanguageModel`.
    """

    config: RossConfig
    dtype: DTypeLike = "float32"
    stops: tuple[int, ...] = ()
    stacked: bool = True

    @property
    def language(self) -> LanguageModel:
        return LanguageModel(required(self.config.language), self.dtype, stacked=self.stacked)


class Prompts(NamedTuple):
    """Prompts of one length, padded behind their ends.

    Attributes:
      tokens: ids; anything at image positions and in padding.
      lengths: number of tokens of each prompt, images included.
      images: normalised images; no slots for prompts without images.
      image_start: index of each image's first token; `seq` where the slot is empty.
    """

    tokens: Int[Array, "batch seq"]
    lengths: Int[Array, " batch"]
    images: Float[Array, "batch images height width 3"]
    image_start: Int[Array, "batch images"]


class Rows(NamedTuple):
    """State of all rows.

    Attributes:
      cache: keys and values of prompts and answers.
      tokens: the token that each row chose last. It is not in the cache.
      counts: number of tokens that each row has chosen.
      limits: number of tokens at which each row stops.
      stopped: whether a row has stopped. It then waits for another prompt.
      seen: True for tokens of each row's text.
      drawing: how each row's tokens are drawn.
    """

    cache: Cache
    tokens: Int[Array, " batch"]
    counts: Int[Array, " batch"]
    limits: Int[Array, " batch"]
    stopped: Bool[Array, " batch"]
    seen: Bool[Array, "batch vocab"]
    drawing: Drawing


def greedy(rows: int) -> Drawing:
    """Settings that take the most likely token."""
    one = jnp.ones(rows, jnp.float32)
    return Drawing(0 * one, jnp.zeros(rows, jnp.int32), one, 0 * one, one, jnp.zeros(rows, jnp.uint32))


def empty_rows(decoding: Decoding, rows: int, slots: int) -> Rows:
    """Rows that have stopped, each with room for `slots` tokens of a prompt and its answer."""
    sizes = required(decoding.config.language)
    zeros = jnp.zeros(rows, jnp.int32)
    cache = empty_cache(sizes, rows, slots, decoding.dtype, decoding.stacked)
    seen = jnp.zeros((rows, sizes.vocab_size), bool)
    return Rows(cache, zeros, zeros, zeros, jnp.ones(rows, bool), seen, greedy(rows))


def read(
    decoding: Decoding, params: Any, prompts: Prompts, cache: Cache | None = None
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """Scores of each prompt's next token, and the cache.

    Args:
      cache: what the rows have read before; the prompts are appended. None: nothing, and the cache that is returned has
        no room for more.
    """
    language, text = decoding.language, params["language"]
    ross = Ross(decoding.config, decoding.dtype)
    embeddings = constrain(apply(language, text, prompts.tokens, method="embed"), "batch")
    if prompts.images.shape[1]:
        projected = apply(ross, params, prompts.images, method="encode_images")
        embeddings = scatter_images(embeddings, projected, prompts.image_start)
    places = jnp.arange(prompts.tokens.shape[1])
    segments = (places < prompts.lengths[:, None]).astype(jnp.int32)
    positions = jnp.broadcast_to(places, segments.shape) + (0 if cache is None else cache.lengths[:, None])
    output = apply(language, text, embeddings, positions, segments, cache, keep=cache is None)
    last = jnp.take_along_axis(output.hidden, jnp.maximum(prompts.lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    return apply(language, text, last, method="logits"), output.cache


def advance(decoding: Decoding, params: Any, rows: Rows) -> tuple[Rows, Float[Array, "batch vocab"]]:
    """Chooses one more token for each row that has not stopped; also returns the scores."""
    language, text = decoding.language, params["language"]
    embedded = apply(language, text, rows.tokens[:, None], method="embed")
    running = (~rows.stopped).astype(jnp.int32)
    output = apply(language, text, embedded, rows.cache.lengths[:, None], running[:, None], rows.cache)
    scores = apply(language, text, output.hidden[:, 0], method="logits")
    return choose_tokens(decoding, rows._replace(cache=output.cache), scores), scores


def choose_tokens(decoding: Decoding, rows: Rows, scores: Float[Array, "batch vocab"]) -> Rows:
    """The rows with their next tokens. Rows that have stopped keep theirs."""
    running = ~rows.stopped
    chosen = jnp.where(running, choose(scores, rows.seen, rows.drawing, rows.counts), rows.tokens)
    counts = rows.counts + running
    ended = jnp.isin(chosen, np.array(decoding.stops, np.int32)) | (counts >= rows.limits)
    seen = rows.seen.at[jnp.arange(len(chosen)), chosen].max(running)
    return rows._replace(tokens=chosen, counts=counts, stopped=rows.stopped | ended, seen=seen)


class Generation(NamedTuple):
    """Generated ids.

    Attributes:
      tokens: new ids. A row's last id is repeated after its end.
      lengths: number of new ids in each row, with the stop token.
      logits: scores from which each id was chosen, on request.
    """

    tokens: Int[Array, "batch new"]
    lengths: Int[Array, " batch"]
    logits: Float[Array, "batch new vocab"] | None


def generate(
    decoding: Decoding, params: Any, prompts: Prompts, max_new_tokens: int, return_logits: bool = False
) -> Generation:
    """Extends prompts by the most likely ids, in one program. When compiled, only arrays are traced.

    Args:
      params: parameters with `language`, and `vision` and `projector` if there are images.
      max_new_tokens: number of new ids per row; generation ends earlier when every row has stopped.
      return_logits: also return the scores.
    """
    batch, length = prompts.tokens.shape
    rows = empty_rows(decoding, batch, length + max_new_tokens)
    scores, read_cache = read(decoding, params, prompts)
    rows = rows._replace(
        cache=insert(rows.cache, read_cache, jnp.arange(batch)),
        limits=jnp.full(batch, max_new_tokens, jnp.int32),
        stopped=jnp.zeros(batch, bool),
    )
    kept = jnp.zeros((batch, max_new_tokens, scores.shape[-1]), jnp.float32) if return_logits else None
    tokens = jnp.zeros((batch, max_new_tokens), jnp.int32)

    def unfinished(state):
        step, rows, *_ = state
        return (step < max_new_tokens) & ~jnp.all(rows.stopped)

    def record(step, rows, scores, tokens, kept):
        tokens = jnp.where(jnp.arange(max_new_tokens) >= step, rows.tokens[:, None], tokens)
        return step + 1, rows, tokens, kept.at[:, step].set(scores) if return_logits else None

    def extend(state):
        step, rows, tokens, kept = state
        return record(step, *advance(decoding, params, rows), tokens, kept)

    first = choose_tokens(decoding, rows, scores)
    with jax.named_scope("decode"):
        state = record(jnp.zeros((), jnp.int32), first, scores, tokens, kept)
        _, rows, tokens, kept = jax.lax.while_loop(unfinished, extend, state)
    return Generation(tokens, rows.counts, kept)


def insert(cache: Cache, new: Cache, slots: Int[Array, " prompts"]) -> Cache:
    """Puts keys and values of prompts into rows `slots` of a cache; a prompt whose row does not exist is dropped."""

    def place(states: Array, new: Array) -> Array:
        return states.at[:, slots, : new.shape[2]].set(new.astype(states.dtype), mode="drop")

    keys, values = jax.tree.map(place, (cache.keys, cache.values), (new.keys, new.values))
    return Cache(keys, values, cache.lengths.at[slots].set(new.lengths, mode="drop"))
