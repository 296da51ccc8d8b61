"""Scenes: a random crop of a photograph with up to four drawn marks, at most one in each quarter of the picture.

+-------+-------+
|  (o)  |       |     quarters: top left, top right, bottom left, bottom right
+-------+-------+     marks: 20 to 28 pixels across, one flat colour
|       |  -->  |
+-------+-------+
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

SIZE = 64
"""Side of a scene in pixels."""
HALF = SIZE // 2
QUARTERS = ("top left", "top right", "bottom left", "bottom right")
SHAPES = ("square", "circle", "cross", "arrow")
DIRECTIONS = ("up", "left", "down", "right")
"""Directions of an arrow, in steps of 90 degrees anticlockwise."""
COLOURS = {
    "red": (225, 25, 35),
    "green": (25, 175, 45),
    "blue": (25, 60, 225),
    "yellow": (250, 220, 25),
    "pink": (250, 95, 205),
    "cyan": (25, 215, 230),
}
MARK_SIZES = (20, 28)
"""Smallest and largest side of a mark's box, in pixels."""
CROP_SIZES = (64, 256)
"""Smallest and largest side of a crop, in pixels of the photograph."""
_MIN_CONTRAST = 10.0


@dataclasses.dataclass(frozen=True)
class Mark:
    """A drawn mark.

    Attributes:
      quarter: one of `QUARTERS`.
      shape: one of `SHAPES`.
      colour: a key of `COLOURS`.
      direction: one of `DIRECTIONS` for an arrow; None for other shapes.
      top, left, size: the mark's box, in pixels of the scene.
    """

    quarter: str
    shape: str
    colour: str
    direction: str | None
    top: int
    left: int
    size: int


@dataclasses.dataclass(frozen=True)
class Scene:
    """A picture and its marks.

    Attributes:
      photo: name of the photograph that was cropped.
      pixels: the picture with its marks.
      marks: the marks, in the order of `QUARTERS`.
    """

    photo: str
    pixels: UInt8[np.ndarray, "64 64 3"]
    marks: tuple[Mark, ...]


def random_scene(photographs: dict[str, Image.Image], rng: np.random.Generator, min_marks: int = 1) -> Scene:
    """A crop of a random photograph with `min_marks` to four random marks.

    Colours are independent, except that exactly two marks share a colour in half of the cases.
    """
    photo = list(photographs)[rng.integers(len(photographs))]
    pixels = random_crop(photographs[photo], rng)
    marks = _random_marks(int(rng.integers(min_marks, len(QUARTERS) + 1)), rng)
    for mark in marks:
        _draw(pixels, mark)
    return Scene(photo, pixels, marks)


def random_crop(photo: Image.Image, rng: np.random.Generator) -> UInt8[np.ndarray, "64 64 3"]:
    """A square of random size and place, scaled to `SIZE` pixels and mirrored at random on both axes.

    A square of nearly one colour, such as empty sky, is replaced by another, at most 20 times.
    """
    smallest, largest = math.log(CROP_SIZES[0]), math.log(CROP_SIZES[1])
    for _ in range(20):
        side = math.exp(rng.uniform(smallest, largest))
        left, top = rng.uniform(0, photo.width - side), rng.uniform(0, photo.height - side)
        box = (left, top, left + side, top + side)
        pixels = np.asarray(photo.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box))
        if pixels.mean(axis=2).std() >= _MIN_CONTRAST:
            break
    horizontal, vertical = rng.integers(2, size=2)
    return np.array(pixels[:: -1 if vertical else 1, :: -1 if horizontal else 1])


def brightness(pixels: UInt8[np.ndarray, "height width 3"]) -> float:
    """Mean over all pixels and channels, on a scale of 0 to 255."""
    return float(pixels.mean())


def _random_marks(count: int, rng: np.random.Generator) -> tuple[Mark, ...]:
    names = list(COLOURS)
    colours = [names[i] for i in rng.integers(len(names), size=count)]
    if count == 2 and rng.integers(2):
        colours[1] = colours[0]
    elif count == 2:
        colours[1] = names[(names.index(colours[0]) + rng.integers(1, len(names))) % len(names)]
    marks = []
    for place, colour in zip(sorted(rng.choice(len(QUARTERS), count, replace=False)), colours, strict=True):
        shape = SHAPES[rng.integers(len(SHAPES))]
        direction = DIRECTIONS[rng.integers(len(DIRECTIONS))] if shape == "arrow" else None
        size = int(rng.integers(MARK_SIZES[0] // 2, MARK_SIZES[1] // 2 + 1)) * 2
        top, left = rng.integers(1, HALF - size, size=2)
        row, column = divmod(int(place), 2)
        marks.append(
            Mark(QUARTERS[place], shape, colour, direction, int(row * HALF + top), int(column * HALF + left), size)
        )
    return tuple(marks)


def _draw(pixels: UInt8[np.ndarray, "64 64 3"], mark: Mark) -> None:
    box = pixels[mark.top : mark.top + mark.size, mark.left : mark.left + mark.size]
    box[_shape(mark)] = COLOURS[mark.colour]


def _shape(mark: Mark) -> Bool[np.ndarray, "size size"]:
    """True where a pixel of the mark's box is filled."""
    ticks = (np.arange(mark.size) + 0.5) / mark.size * 2 - 1
    x, y = np.abs(ticks)[None], ticks[:, None]
    if mark.shape == "square":
        return np.ones((mark.size, mark.size), bool)
    if mark.shape == "circle":
        return x**2 + y**2 <= 1
    if mark.shape == "cross":
        return (x <= 0.34) | (np.abs(y) <= 0.34)
    up = np.where(y < 0.1, x <= (y + 1.05) / 1.1, x <= 0.3)
    return np.rot90(up, DIRECTIONS.index(mark.direction))
