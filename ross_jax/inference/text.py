"""The text of an answer while its tokens arrive."""

from collections.abc import Callable, Sequence
from typing import Any


class Answer:
    """Tokens of one answer as text: ends at a stop text, and passes on pieces that are final.

    The pieces together are the answer. A piece never ends inside a character, inside a stop text, or with white space
    that may turn out to be the end of the answer.
    """

    def __init__(
        self,
        tokenizer: Any,
        stops: Sequence[int],
        stop: Sequence[str] = (),
        on_text: Callable[[str], None] | None = None,
    ):
        """`stops` are ids that end an answer, `stop` texts that do."""
        self._tokenizer, self._stops, self._stop, self._on_text = tokenizer, stops, stop, on_text
        self.text, self.ids = "", ()
        self._passed = ""

    @property
    def watched(self) -> bool:
        """Whether someone waits for pieces, or a text may end the answer."""
        return bool(self._stop) or self._on_text is not None

    def receive(self, ids: Sequence[int], ended: bool) -> bool:
        """Takes all tokens so far; returns whether a stop text ends the answer."""
        self.ids = tuple(ids)
        if not (ended or self.watched):
            return False
        text = self._decode(ids).lstrip()
        if not ended:  # a character's first bytes decode to replacement characters
            text = text.rstrip("\ufffd")
        ends = [text.find(each) for each in self._stop if each in text]
        cut = bool(ends)
        if cut:
            text = text[: min(ends)]
        elif not ended:
            text = text[: len(text) - max((_overlap(text, each) for each in self._stop), default=0)]
        self.text = text.rstrip()
        if self._on_text and self.text.startswith(self._passed) and len(self.text) > len(self._passed):
            piece, self._passed = self.text[len(self._passed) :], self.text
            self._on_text(piece)
        return cut

    def _decode(self, ids: Sequence[int]) -> str:
        ends = bool(ids) and ids[-1] in self._stops
        if ends and not self._tokenizer.decode(ids[-1:]).endswith("\n"):  # the end of `plain` can hold text: `.\n`
            ids = ids[:-1]
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
