"""Answers to a queue of prompts over a fixed number of rows: a row that has finished takes the next prompt.

Lengths are rounded up to `bucket` sizes, so that a long queue compiles a handful of programs: one that extends all
rows, and for each bucket of prompts that occurs one that reads as many prompts as there are rows, and one that reads a
few.
"""

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, UInt8

from ross_jax.config import UserError
from ross_jax.inference.generate import (
    Decoding,
    Prompts,
    Rows,
    advance,
    choose_tokens,
    empty_rows,
    insert,
    read,
)
from ross_jax.inference.sampling import Drawing
from ross_jax.models.language import Cache, unstack
from ross_jax.models.ross import normalise
from ross_jax.sharding import MeshConfig, constrain, use_mesh
from ross_jax.tree import flatten, unflatten

STEPS = 32
"""Most tokens that rows are extended by before the host looks at them."""
WATCHED_STEPS = 4
"""Most tokens at a time while an answer is read as it is made, or while a stop text may end it."""
SMALLEST = 32
"""Smallest bucket."""


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt whose images have room.

    Attributes:
      tokens: int[length]; 0 at image positions.
      image_start: index of each image's first token.
      images: resized images.
      limit: number of new tokens at most.
      drawing: temperature, top_k, top_p, min_p, penalty, seed.
      watched: whether the host wants to see new tokens soon.
    """

    tokens: Int[np.ndarray, " length"]
    image_start: Sequence[int]
    images: Sequence[UInt8[np.ndarray, "side side 3"]]
    limit: int
    drawing: tuple[float, int, float, float, float, int] = (0.0, 0, 1.0, 0.0, 1.0, 0)
    watched: bool = False


class Arrivals(NamedTuple):
    """Prompts and their settings; row `slots[i]` takes prompt i, none does if there is no such row.

    Attributes:
      images: uint8 images, not normalised yet.
      seen: True for tokens of each prompt's text.
    """

    prompts: Prompts
    slots: Int[Array, " prompts"]
    limits: Int[Array, " prompts"]
    seen: Bool[Array, "prompts vocab"]
    drawing: Drawing


def bucket(length: int) -> int:
    """The smallest size of 32, 48, 64, 96, 128, 192, ... that holds `length`."""
    size = SMALLEST
    while size < length:
        size *= 2
    return size * 3 // 4 if size > SMALLEST and size * 3 // 4 >= length else size


@partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(decoding: Decoding, rows: int, slots: int) -> Rows:
    return empty_rows(decoding, rows, slots)


def _grown(decoding: Decoding, rows: Rows | None, count: int, slots: int) -> Rows:
    """Empty rows with more slots, whose caches begin with those of `rows`."""
    empty = _empty(decoding, count, slots)
    return empty if rows is None else empty._replace(cache=_move(empty.cache, rows.cache))


@partial(jax.jit, donate_argnums=0)
def _move(cache: Cache, old: Cache) -> Cache:
    return insert(cache, old, jnp.arange(len(old.lengths)))


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _admit(decoding: Decoding, params: Any, rows: Rows, new: Arrivals) -> tuple[Rows, Array, Array]:
    """Rows with the new prompts read and their first tokens chosen; also these tokens, and which rows have stopped."""
    prompts = new.prompts._replace(images=normalise(decoding.config, new.prompts.images))
    scores, cache = read(decoding, params, Prompts(*(constrain(each, "batch") for each in prompts)))
    rows = _start(rows._replace(cache=insert(rows.cache, cache, new.slots)), new)
    placed = jnp.zeros((len(rows.tokens), scores.shape[-1]), scores.dtype).at[new.slots].set(scores, mode="drop")
    return _first(decoding, rows, placed, new.slots)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _append(decoding: Decoding, params: Any, rows: Rows, new: Arrivals, kept: Array) -> tuple[Rows, Array, Array]:
    """Appends one prompt to each row behind its first `kept` tokens; otherwise as `_admit`."""
    prompts = new.prompts._replace(images=normalise(decoding.config, new.prompts.images))
    scores, cache = read(decoding, params, prompts, rows.cache._replace(lengths=kept))
    return _first(decoding, _start(rows._replace(cache=cache), new), scores, new.slots)


def _start(rows: Rows, new: Arrivals) -> Rows:
    def place(values: Array, new_values: Array) -> Array:
        return values.at[new.slots].set(new_values, mode="drop")

    return rows._replace(
        counts=place(rows.counts, jnp.zeros_like(new.limits)),
        limits=place(rows.limits, new.limits),
        seen=place(rows.seen, new.seen),
        drawing=jax.tree.map(place, rows.drawing, new.drawing),
    )


def _first(decoding: Decoding, rows: Rows, scores: Array, slots: Array) -> tuple[Rows, Array, Array]:
    """Chooses the first tokens of the rows `slots`, and of no others."""
    starting = jnp.zeros(len(rows.tokens), bool).at[slots].set(True, mode="drop")
    chosen = choose_tokens(decoding, rows._replace(stopped=~starting), scores)
    rows = chosen._replace(stopped=jnp.where(starting, chosen.stopped, rows.stopped))
    return rows, constrain(rows.tokens), constrain(rows.stopped)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _extend(
    decoding: Decoding, params: Any, rows: Rows, ended: Array, steps: Array, free: Array
) -> tuple[Rows, Array, Array]:
    """Extends rows by up to `steps` tokens, until `free` rows have stopped.

    Args:
      ended: True for rows that the host has stopped.

    Returns:
      The rows; int[batch, STEPS], -1 where there is no token; and which rows have stopped.
    """
    rows = rows._replace(stopped=rows.stopped | ended)

    def unfinished(state):
        step, rows, _ = state
        return (step < steps) & (rows.stopped.sum() < free)

    def extend(state):
        step, rows, made = state
        after, _ = advance(decoding, params, rows)
        return step + 1, after, made.at[:, step].set(jnp.where(rows.stopped, -1, after.tokens))

    made = jnp.full((len(rows.tokens), STEPS), -1, jnp.int32)
    with jax.named_scope("decode"):
        _, rows, made = jax.lax.while_loop(unfinished, extend, (jnp.zeros((), jnp.int32), rows, made))
    return rows, constrain(made), constrain(rows.stopped)


Receive = Callable[[int, list[int], bool], bool]
"""(number of the prompt, its new tokens so far, whether it has ended) -> whether to end it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Engine:
    """A model's parameters, ready to generate.

    Attributes:
      decoding: everything static.
      params: parameters of `vision`, `projector` and `language`.
      mesh: devices over which rows and parameters are split. None: the default device.
      mesh_config: its rules.
    """

    decoding: Decoding
    params: Any
    mesh: Mesh | None = None
    mesh_config: MeshConfig | None = None

    @property
    def unit(self) -> int:
        """Rows come in multiples of this number of replicas."""
        return 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def run(self, prompts: Sequence[Prompt], rows: int, receive: Receive) -> None:
        """Answers all prompts, those with the longest answers first.

        Args:
          rows: prompts that are answered at once; rounded up to a multiple of `unit`.
          receive: called for a prompt whenever it has new tokens.

        Raises:
          UserError: the devices' memory cannot hold the keys and values.
        """
        if not prompts:
            return
        count = -(-min(rows, len(prompts)) // self.unit) * self.unit
        slots = bucket(max(len(prompt.tokens) + prompt.limit for prompt in prompts))
        waiting = deque(sorted(range(len(prompts)), key=lambda i: -prompts[i].limit))
        places: list[int | None] = [None] * count
        made: dict[int, list[int]] = {}
        cut = np.zeros(count, bool)

        def take(tokens: np.ndarray, stopped: np.ndarray, only: Sequence[int]) -> None:
            """Passes on the new tokens of rows `only`."""
            for row in only:
                number = places[row]
                new = [int(token) for token in tokens[row] if token >= 0]
                if number is None or not new:
                    continue
                made[number] += new
                if receive(number, made[number], bool(stopped[row])) or stopped[row]:
                    cut[row], places[row] = not stopped[row], None
                    del made[number]

        with self._ambient(count, slots):
            state = _empty(self.decoding, count, slots)
            while waiting or any(place is not None for place in places):
                free = [row for row, place in enumerate(places) if place is None]
                while waiting and free:
                    chosen = free if len(free) > max(self.unit, count // 2) and len(waiting) > count // 2 else None
                    size = count if chosen else self.unit
                    entering = (chosen or free[: self.unit])[: len(waiting)]
                    free = free[len(entering) :]
                    numbers = [waiting.popleft() for _ in entering]
                    for row, number in zip(entering, numbers, strict=True):
                        places[row], made[number] = number, []
                    arrivals = self._arrivals([prompts[number] for number in numbers], entering, size, count)
                    state, tokens, stopped = _admit(self.decoding, self.params, state, arrivals)
                    cut[entering] = False
                    take(np.asarray(tokens)[:, None], np.asarray(stopped), entering)
                    free += [row for row in entering if places[row] is None]
                running = [number for number in places if number is not None]
                if not running:
                    continue
                steps = WATCHED_STEPS if any(prompts[number].watched for number in running) else STEPS
                wanted = min(count, count - len(running) + min(self.unit, len(waiting))) if waiting else count
                state, tokens, stopped = _extend(
                    self.decoding, self.params, state, cut, np.int32(steps), np.int32(wanted)
                )
                take(np.asarray(tokens), np.asarray(stopped), range(count))

    def continue_row(
        self, state: Rows | None, prompt: Prompt, kept: int, receive: Callable[[list[int], bool], bool]
    ) -> Rows:
        """Answers a prompt whose first `kept` tokens a single row's cache holds; returns the row's new state.

        Args:
          state: the row. It is used up. None: there is no row yet, and `kept` is 0.
          receive: as in `run`, without the prompt's number.

        Raises:
          UserError: as `run`.
        """
        unread = dataclasses.replace(
            prompt,
            tokens=prompt.tokens[kept:],
            images=[image for image, start in zip(prompt.images, prompt.image_start, strict=True) if start >= kept],
            image_start=[start - kept for start in prompt.image_start if start >= kept],
        )
        slots = bucket(kept + max(bucket(len(unread.tokens)), len(unread.tokens) + prompt.limit))
        with self._ambient(self.unit, slots):
            rows = state
            if rows is None or rows.cache.slots < slots:
                rows = _grown(self.decoding, rows, self.unit, slots)
            new = self._arrivals([unread], [0], self.unit, self.unit)
            np.asarray(new.seen)[0, self._text(prompt)] = True
            lengths: Any = np.full(self.unit, kept, np.int32)
            rows, tokens, stopped = _append(self.decoding, self.params, rows, new, lengths)
            made, done = [int(np.asarray(tokens)[0])], bool(np.asarray(stopped)[0])
            cut = receive(made, done)
            steps = np.int32(WATCHED_STEPS if prompt.watched else STEPS)
            while not (done or cut):
                rows, tokens, stopped = _extend(
                    self.decoding, self.params, rows, np.zeros(self.unit, bool), steps, np.int32(self.unit)
                )
                made += [int(token) for token in np.asarray(tokens)[0] if token >= 0]
                done = bool(np.asarray(stopped)[0])
                cut = receive(made, done)
        return rows

    def _arrivals(self, prompts: Sequence[Prompt], rows: Sequence[int], size: int, count: int) -> Arrivals:
        """Arrays for `size` prompts, of which those given come first; the rest goes to a row that does not exist."""
        length = bucket(max(len(prompt.tokens) for prompt in prompts))
        most = max(len(prompt.images) for prompt in prompts)
        images = 0 if not most else 2 ** (most - 1).bit_length()
        side = next((image.shape[0] for prompt in prompts for image in prompt.images), 1)
        tokens: Any = np.zeros((size, length), np.int32)
        lengths: Any = np.zeros(size, np.int32)
        pixels: Any = np.zeros((size, images, side, side, 3), np.uint8)
        starts: Any = np.full((size, images), length, np.int32)
        slots: Any = np.full(size, count, np.int32)
        limits: Any = np.ones(size, np.int32)
        language = self.decoding.language.config
        seen: Any = np.zeros((size, language.vocab_size), bool)
        settings = [(0.0, 0, 1.0, 0.0, 1.0, 0)] * size
        for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            tokens[i, : len(prompt.tokens)], lengths[i] = prompt.tokens, len(prompt.tokens)
            for j, (image, start) in enumerate(zip(prompt.images, prompt.image_start, strict=True)):
                pixels[i, j], starts[i, j] = image, start
            slots[i], limits[i], settings[i] = row, prompt.limit, prompt.drawing
            seen[i, self._text(prompt)] = True
        kinds = (np.float32, np.int32, np.float32, np.float32, np.float32, np.uint32)
        drawing: Any = [np.array(each, kind) for each, kind in zip(zip(*settings, strict=True), kinds, strict=True)]
        return Arrivals(Prompts(tokens, lengths, pixels, starts), slots, limits, seen, Drawing(*drawing))

    def _text(self, prompt: Prompt) -> np.ndarray:
        """The tokens of a prompt that are not at image positions."""
        text = np.ones(len(prompt.tokens), bool)
        for start in prompt.image_start:
            text[start : start + self.decoding.config.vision.num_tokens] = False
        return prompt.tokens[text]

    @contextlib.contextmanager
    def _ambient(self, rows: int, slots: int) -> Iterator[None]:
        try:
            with use_mesh(self.mesh, self.mesh_config) if self.mesh else contextlib.nullcontext():
                yield
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise UserError(
                f"not enough memory for {rows} row(s) of {slots} tokens (prompt and answer); lower max_new_tokens or "
                "rows, or take dtype bfloat16"
            ) from error


def make_engine(
    decoding: Decoding, params: Any, mesh: Mesh | None = None, mesh_config: MeshConfig | None = None
) -> Engine:
    """An engine for the devices there are.

    On a single CPU the language model's weights are copied: layer by layer, and in float32 unless they are quantised,
    because CPUs are slow with stacked layers and with bfloat16.

    Args:
      params: parameters with stacked layers.
    """
    if mesh is None and jax.default_backend() == "cpu":
        decoding = dataclasses.replace(decoding, dtype="float32", stacked=False)
        widened = {
            path: leaf.astype(jnp.float32) if isinstance(leaf, jax.Array) else leaf
            for path, leaf in flatten(params).items()
        }
        params = unflatten(widened)
        params["language"] = unstack(params["language"])
    return Engine(decoding, params, mesh, mesh_config)
