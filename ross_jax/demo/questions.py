"""Questions about scenes and captions of scenes, in a vocabulary of about eighty words.

Every answer follows from the drawn marks or the stored pixels. Each question type has a small closed set of answers, so
that the accuracies of guessing and of always giving the most frequent answer are known.
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
"""Question type -> possible answers."""
BRIGHTNESS_MARGIN = 12.0
"""Smallest difference in mean brightness, on a scale of 0 to 255, at which one half of a scene counts as brighter."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with its answer; `type` is a key of `ANSWERS`."""

    type: str
    text: str
    answer: str


def possible_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """One question of each type that has a definite answer in the scene. The mark asked about is random."""
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
    """Whether the mark lies in one of the two left quarters."""
    return mark.quarter.endswith("left")


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Sentences in random order: mean colour of each quarter, each mark, number of marks, brighter halves.

    A mark's name comes before its place or after it, at random, so that a model learns to find a mark by place and a
    place by mark.
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
    """`left` or `right`; None if the two differ by less than `BRIGHTNESS_MARGIN`."""
    return _brighter(pixels[:, :HALF], pixels[:, HALF:], "left", "right")


def brighter_end(pixels: np.ndarray) -> str | None:
    """`top` or `bottom`; None if the two differ by less than `BRIGHTNESS_MARGIN`."""
    return _brighter(pixels[:HALF], pixels[HALF:], "top", "bottom")


def _brighter(first: np.ndarray, second: np.ndarray, name: str, other: str) -> str | None:
    difference = brightness(first) - brightness(second)
    if abs(difference) < BRIGHTNESS_MARGIN:
        return None
    return name if difference > 0 else other


def colour_name(area: np.ndarray) -> str:
    """Tone and hue of the mean colour of uint8 pixels [height, width, 3], such as `dark blue` or `light grey`."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(area.reshape(-1, 3).mean(axis=0) / 255.0))
    tone = "dark" if value < 0.35 else "light" if value > 0.7 else "medium"
    if saturation < 0.15:
        return f"{tone} grey"
    edges = {0.04: "red", 0.12: "orange", 0.2: "yellow", 0.45: "green", 0.7: "blue", 0.92: "purple", 1.01: "red"}
    return f"{tone} {next(name for edge, name in edges.items() if hue < edge)}"


def _pick(items, rng: np.random.Generator):
    return items[rng.integers(len(items))]
