"""Questions about scenes, and captions of them, in a vocabulary of some eighty words.

Every answer follows from what was drawn or from the stored pixels, and comes from a small closed set, so that chance
and the most frequent answer are known for each type.
"""

import colorsys
import dataclasses

import numpy as np

from ross_jax.demo.scenes import COLOURS, DIRECTIONS, HALF, QUARTERS, SHAPES, Mark, Scene, brightness

COUNTS = ("one", "two", "three", "four")
ANSWERS: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "position": QUARTERS,
    "orientation": DIRECTIONS,
    "count": COUNTS,
    "same_colour": ("yes", "no"),
    "relation": ("left", "right"),
    "brighter_side": ("left", "right"),
    "brighter_end": ("top", "bottom"),
}
"""Question types and the answers that each can have."""
BRIGHTNESS_MARGIN = 12.0
"""Halves are compared only if their mean brightness differs by this much, of 255."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A question of a type of `ANSWERS`, and its answer."""

    type: str
    text: str
    answer: str


def possible_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """One question of each type that the scene has a definite answer to; which mark it is about is random."""
    questions = []
    marks, pixels = scene.marks, scene.pixels

    def ask(kind: str, text: str, answer: str) -> None:
        questions.append(Question(kind, text, answer))

    if marks:
        mark = _pick(marks, rng)
        ask("colour", f"What colour is at the {mark.quarter}?", mark.colour)
        mark = _pick(marks, rng)
        ask("shape", f"What shape is at the {mark.quarter}?", mark.shape)
        ask("count", "How many marks?", COUNTS[len(marks) - 1])
    colours = [mark.colour for mark in marks]
    unique = [mark for mark in marks if colours.count(mark.colour) == 1]
    if unique:
        mark = _pick(unique, rng)
        ask("position", f"Where is {mark.colour}?", mark.quarter)
    arrows = [mark for mark in marks if mark.shape == "arrow"]
    if len(arrows) == 1:
        ask("orientation", "Where does the arrow point?", arrows[0].direction)
    if len(marks) == 2:
        ask("same_colour", "Do both have the same colour?", "yes" if colours[0] == colours[1] else "no")
    pairs = [(a, b) for a in unique for b in unique if is_left(a) != is_left(b)]
    if pairs:
        first, second = _pick(pairs, rng)
        side = "left" if is_left(first) else "right"
        ask("relation", f"Is {first.colour} left or right of {second.colour}?", side)
    if side := brighter_side(pixels):
        ask("brighter_side", "Which side is brighter?", side)
    if end := brighter_end(pixels):
        ask("brighter_end", "Which end is brighter?", end)
    return questions


def is_left(mark: Mark) -> bool:
    """Whether the mark is in a left quarter."""
    return mark.quarter.endswith("left")


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Sentences in random order: the average colour of each quarter, each mark, their number, what is brighter.

    Half of the marks are named before their place and half after it, so that a model learns to look up both.
    """
    sentences = []
    for i, quarter in enumerate(QUARTERS):
        row, column = divmod(i, 2)
        area = scene.pixels[row * HALF : (row + 1) * HALF, column * HALF : (column + 1) * HALF]
        sentences.append(f"{quarter} is {colour_name(area)}")
    for mark in scene.marks:
        pointing = f" pointing {mark.direction}" if mark.direction else ""
        name, place = f"{mark.colour} {mark.shape}{pointing}", f"at the {mark.quarter}"
        sentences.append(f"{place} a {name}" if rng.integers(2) else f"a {name} {place}")
    count = len(scene.marks)
    sentences.append(f"{COUNTS[count - 1] if count else 'no'} mark{'' if count == 1 else 's'}")
    sentences += [f"{side} is brighter" for side in (brighter_side(scene.pixels), brighter_end(scene.pixels)) if side]
    return " ".join(f"{sentences[i].capitalize()}." for i in rng.permutation(len(sentences)))


def brighter_side(pixels: np.ndarray) -> str | None:
    """`left` or `right`; None if the halves differ by less than `BRIGHTNESS_MARGIN`."""
    return _brighter(pixels[:, :HALF], pixels[:, HALF:], "left", "right")


def brighter_end(pixels: np.ndarray) -> str | None:
    """`top` or `bottom`; None if the halves differ by less than `BRIGHTNESS_MARGIN`."""
    return _brighter(pixels[:HALF], pixels[HALF:], "top", "bottom")


def _brighter(first: np.ndarray, second: np.ndarray, name: str, other: str) -> str | None:
    difference = brightness(first) - brightness(second)
    if abs(difference) < BRIGHTNESS_MARGIN:
        return None
    return name if difference > 0 else other


def colour_name(area: np.ndarray) -> str:
    """Tone and hue of the mean of uint8 pixels [height, width, 3], such as `dark blue` or `light grey`."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(area.reshape(-1, 3).mean(axis=0) / 255.0))
    tone = "dark" if value < 0.35 else "light" if value > 0.7 else "medium"
    if saturation < 0.15:
        return f"{tone} grey"
    edges = {0.04: "red", 0.12: "orange", 0.2: "yellow", 0.45: "green", 0.7: "blue", 0.92: "purple", 1.01: "red"}
    return f"{tone} {next(name for edge, name in edges.items() if hue < edge)}"


def _pick(items, rng: np.random.Generator):
    return items[rng.integers(len(items))]
