"""A conversation that keeps its keys and values between turns."""

import hashlib
from typing import TYPE_CHECKING, Any

from ross_jax.data.conversation import IMAGE_MARKER
from ross_jax.inference.engine import Prompt
from ross_jax.inference.prompts import AnyImage, AnyImages, Request

if TYPE_CHECKING:
    from ross_jax.inference.model import Model


class Chat:
    """A conversation with a model. Make one with `Model.chat`.

    A turn reads what the cache does not hold yet. What the cache holds is compared token by token and image by image:
    an answer equals that of `Model.ask` with the same history.

    Attributes:
      images: images so far, in their order.
      history: (question, answer) of the turns so far.
    """

    def __init__(self, model: "Model"):
        self._model = model
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.images: list[AnyImage] = []
        self.history: list[tuple[str, str]] = []
        self._rows: Any = None
        self._held: list[Any] = []

    def ask(self, prompt: str, images: AnyImages = (), **settings: Any) -> str:
        """Answers the next question.

        Args:
          prompt: the question.
          images: images that this question adds. They stand before it unless it marks their places.
          settings: other fields of `Request`, but for `history`.

        Raises:
          UserError: as `Model.ask`. The conversation is then as it was before.
        """
        new = [images] if isinstance(images, AnyImage) else list(images)
        if IMAGE_MARKER not in prompt:
            prompt = f"{IMAGE_MARKER}\n" * len(new) + prompt
        everything = [*self.images, *new]
        request = Request(everything, prompt, self.history, **settings)
        item, answer = self._model.prepare(request)
        self._extend(item, answer.receive)
        self.images, self.history = everything, [*self.history, (prompt, answer.text)]
        return answer.text

    def _extend(self, prompt: Prompt, receive: Any) -> None:
        engine = self._model.engine
        identity = _identity(prompt, engine.decoding.config)
        kept = next(
            (i for i, pair in enumerate(zip(self._held, identity, strict=False)) if pair[0] != pair[1]),
            min(len(self._held), len(identity)),
        )
        kept = min(kept, len(identity) - 1)  # never inside an image: its positions differ all or not at all
        made: list[int] = []

        def note(ids: list[int], ended: bool) -> bool:
            made[:] = ids
            return receive(ids, ended)

        self._held, rows, self._rows = [], self._rows, None  # an interruption leaves a row that is not to be trusted
        rows = engine.continue_row(rows, prompt, kept, note)
        self._rows, self._held = rows, identity + made[:-1]


def _identity(prompt: Prompt, config: Any) -> list[Any]:
    """What each position of a prompt holds: a token, or the digest of an image."""
    held: list[Any] = [int(token) for token in prompt.tokens]
    for image, start in zip(prompt.images, prompt.image_start, strict=True):
        digest = hashlib.sha256(image.tobytes()).digest()
        held[start : start + config.vision.num_tokens] = [digest] * config.vision.num_tokens
    return held
