"""Requests to a model, and their prompts as batches of one shape.

A batch of B prompts, padded on the left to S tokens; I images of N tokens each:

    tokens    [  0   0   0 | 11  12   0   0   0  13  14 ]      0 at image positions and in padding
    segments  [  0   0   0 |  1   1   1   1   1   1   1 ]
    image_start                       5
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ross_jax.config import Range, UserError
from ross_jax.data.batches import Batch, Expanded, RowShape, empty_batch, place
from ross_jax.data.conversation import IMAGE_MARKER
from ross_jax.data.images import ImageConfig, ImageError, decode, preprocess
from ross_jax.data.packing import Location
from ross_jax.storage import location

MAX_NEW_TOKENS = 2**15
"""Longest answer that can be asked for. Room for all of it is made before the first token."""
AnyImage = str | Path | Image.Image | np.ndarray
"""Path of an image file, a PIL image, or an array uint8[height, width, 3]."""
AnyImages = AnyImage | Sequence[AnyImage]
Resized = UInt8[np.ndarray, "side side 3"]


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A question about images, and how it is to be answered.

    Attributes:
      images: one image, several, or `()` for none.
      prompt: the question. Images stand before the first question, unless the questions mark their places: `<image>`.
      history: (question, answer) of the turns before, the oldest first.
      max_new_tokens: length of the longest answer in tokens; a longer answer is cut.
      temperature: divides the scores before the next token is drawn; 0 takes the most likely token.
      top_k: draws from the k most likely tokens; 0 draws from all.
      top_p: draws from the most likely tokens that together have this probability.
      min_p: draws from tokens with at least this share of the most likely token's probability.
      repetition_penalty: divides the scores of tokens that the text already has.
      seed: seed of the draws.
      stop: texts that end the answer, besides the template's stop token.
      on_text: receives each piece of the answer as soon as it is known.

    Raises:
      UserError: a value that makes no sense. Names the field.
    """

    images: AnyImages
    prompt: str
    history: Sequence[Sequence[str]] = ()
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: Sequence[str] = ()
    on_text: Callable[[str], None] | None = None

    def __post_init__(self):
        Range(1, MAX_NEW_TOKENS).check("max_new_tokens", self.max_new_tokens)
        for i, turn in enumerate(self.history):
            if isinstance(turn, str) or len(turn) != 2:
                raise UserError(f"history[{i}]: expected (question, answer), found {turn!r:.80}")
        for name, allowed in _RANGES.items():
            allowed.check(name, getattr(self, name))
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise UserError(f"stop {self.stop!r}: expected a list of texts, none of them empty")
        if self.on_text is not None and not callable(self.on_text):
            raise UserError(f"on_text {self.on_text!r}: expected a function that takes a text")

    @property
    def drawing(self) -> tuple[float, int, float, float, float, int]:
        """How tokens are drawn: temperature, top_k, top_p, min_p, repetition_penalty, seed."""
        return (self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty, self.seed)

    def record(self, images: int) -> dict[str, Any]:
        """The conversation as a record in LLaVA's format, with a mark for each of so many images.

        Raises:
          UserError: the questions have marks, and there is no image.
        """
        questions = [question for question, _ in self.history] + [self.prompt]
        marks = sum(question.count(IMAGE_MARKER) for question in questions)
        if marks and not images:  # without images, marks would be text
            raise UserError(
                f"the prompt has {marks} {IMAGE_MARKER} mark(s), and there are 0 images; name an image for each mark, "
                "or leave the marks out"
            )
        if not marks:
            questions[0] = f"{IMAGE_MARKER}\n" * images + questions[0]
        turns = [{"from": "human", "value": questions[0]}]
        for (_, answer), question in zip(self.history, questions[1:], strict=True):
            turns += [{"from": "gpt", "value": answer}, {"from": "human", "value": question}]
        return {"id": self.prompt, "image": [f"images[{i}]" for i in range(images)], "conversations": turns}


_RANGES = {
    "temperature": Range(0.0, 1e6),
    "top_k": Range(0, 2**31 - 1),
    "top_p": Range(1e-6, 1.0),
    "min_p": Range(0.0, 1.0),
    "repetition_penalty": Range(1e-3, 1e3),
    "seed": Range(0, 2**32 - 1),
}


def read_images(images: AnyImages, config: ImageConfig) -> list[Resized]:
    """Images as a vision encoder takes them.

    Args:
      images: one image or several.
      config: how images are resized.

    Raises:
      ImageError: a file that cannot be read, or an array that is no image. Names the file, or the image's number.
    """
    several = [images] if isinstance(images, AnyImage) else images
    names = [str(image) if isinstance(image, str | Path) else f"images[{i}]" for i, image in enumerate(several)]
    return [preprocess(_decode(image, name), config, name) for image, name in zip(several, names, strict=True)]


def _decode(image: AnyImage, name: str) -> Image.Image:
    if isinstance(image, str | Path):
        try:
            return decode(location(image).read_bytes(), name)
        except OSError as error:
            raise ImageError(f"{name}: cannot be read ({error.strerror or error})") from error
    if isinstance(image, np.ndarray) and (image.dtype != np.uint8 or image.ndim not in (2, 3)):
        raise ImageError(f"{name}: {image.dtype}{list(image.shape)}; expected uint8[height, width, 3]")
    if not isinstance(image, AnyImage):
        raise ImageError(f"{name}: {type(image).__name__}; expected a path, a PIL image or an array")
    return decode(image, name)


def prompt_batches(
    prompts: Sequence[Expanded],
    images: Sequence[Sequence[Resized]],
    rows: int,
    image_tokens: int,
    image_size: int,
    multiple: int = 1,
) -> Iterator[Batch]:
    """Batches of prompts, all of one shape; rows that the last batch has left are padding.

    Args:
      prompts: the prompts, with room for their images.
      images: the images of each prompt.
      rows: B, prompts per batch.
      image_tokens: N, tokens per image.
      image_size: side of an image in pixels.
      multiple: S is the longest prompt's length, rounded up to a multiple of this.
    """
    length = -(-max(len(prompt.tokens) for prompt in prompts) // multiple) * multiple
    shape = RowShape(length, max(len(each) for each in images), image_tokens, image_size)
    for first in range(0, len(prompts), rows):
        batch = empty_batch(rows, shape)
        for row, prompt in enumerate(prompts[first : first + rows]):
            location = Location(start=length - len(prompt.tokens), slot=0, segment=1, first_image_id=0)
            place(batch, row, location, prompt, images[first + row])
        yield batch
