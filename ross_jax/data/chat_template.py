"""The `chatml` template: the tokenizer's own chat template, with answers found by rendering prefixes.

A chat template is a program that renders a whole conversation, and does not say which part of the result is an answer.
So turn k is rendered three times, and compared:

    before    turns[:k]                             `before`
    marked    turns[:k] + turn k with a mark        `before` header MARK footer
    after     turns[:k + 1]                         `before` header text footer

Header and footer belong to the template, so their special tokens are special. The text belongs to the record and stays
text. In an answer, the text is supervised, and the footer up to its first special token, which is the stop token.

Two kinds of template are refused, because they would train what is never generated: `before` is not a prefix of the
other two (a turn is rendered differently once others follow it), or the generation prompt is not an answer's header.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from ross_jax.config import UserError
from ross_jax.data.conversation import IMAGE, Conversation, ConversationError, Segment, Turn
from ross_jax.data.tokenizer import TextEncoder

Message = dict[str, str]


class ChatTemplate:
    """Renders conversations with the chat template of `encoder.tokenizer`.

    Raises:
      UserError: the tokenizer has no chat template, or one that cannot be used. `__call__` raises `ConversationError`
        if the template refuses a conversation or changes its text.
    """

    def __init__(self, encoder: TextEncoder):
        self.encoder = encoder
        if not encoder.tokenizer.chat_template:
            raise UserError(
                "template 'chatml' needs a tokenizer with a chat template, and this one has none; add its "
                "chat_template.jinja to the folder, or choose another template"
            )
        turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
        probe = Conversation("a probe", tuple(Turn(role, (text,)) for role, text in turns))
        try:
            self(probe)
        except ConversationError as error:
            where = getattr(encoder.tokenizer, "name_or_path", "")
            raise UserError(f"template 'chatml' cannot use the chat template of tokenizer {where}: {error}") from error

    def __call__(self, conversation: Conversation) -> list[Segment]:
        turns = conversation.turns
        every_text = [text for turn in turns for text in turn.texts]
        marks = _marks([*every_text, str(self.encoder.tokenizer.chat_template)])
        image_mark, text_mark = next(marks), next(marks)
        messages = [{"role": turn.role, "content": image_mark.join(turn.texts)} for turn in turns]
        segments: list[Segment] = []
        before = ""
        for k, turn in enumerate(turns):
            where = f"{conversation.sample}, turn {k}"
            marked = self._print(where, [*messages[:k], {"role": turn.role, "content": text_mark}])
            after = self._print(where, messages[: k + 1])
            if not marked.startswith(before) or marked.count(text_mark) != 1:
                raise _unstable(where)
            header, footer = marked[len(before) :].split(text_mark)
            text = after[len(before) + len(header) : len(after) - len(footer)]
            if after != before + header + text + footer:
                raise _unstable(where)
            if text.strip() != messages[k]["content"].strip():
                raise ConversationError(f"{where}: the chat template changes the text of this turn")
            if turn.role == "assistant":
                if k > 0 and self._print(where, messages[:k], open_answer=True) != before + header:
                    raise ConversationError(
                        f"{where}: the chat template's generation prompt is not what it prints before an answer, so it "
                        "is not prefix-stable; choose another template, or mend the tokenizer's chat template"
                    )
                segments += self._template_text(header)
                segments.append(Segment(text, True))
                segments += self._stop(where, footer)
            else:
                segments += self._template_text(header)
                segments += _between(map(Segment, text.split(image_mark)))
                segments += self._template_text(footer)
            before = after
        if turns[-1].role != "assistant":
            prompt = self._print(conversation.sample, messages, open_answer=True)
            if not prompt.startswith(before):
                raise _unstable(conversation.sample)
            segments += self._template_text(prompt[len(before) :])
        return segments

    def _print(self, where: str, messages: list[Message], open_answer: bool = False) -> str:
        tokenizer: Any = self.encoder.tokenizer
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_answer)
        except Exception as error:  # a template is a program, and may raise anything
            raise ConversationError(f"{where}: the chat template refuses this conversation: {error}") from error

    def _template_text(self, text: str) -> list[Segment]:
        return [Segment(part) for part in self.encoder.split_special(text)]

    def _stop(self, where: str, footer: str) -> list[Segment]:
        parts = self.encoder.split_special(footer)
        stop = next((i for i, part in enumerate(parts) if isinstance(part, int)), None)
        if stop is None:
            raise ConversationError(
                f"{where}: the chat template ends an answer with {footer!r}, without a special token, so a model could "
                "not learn to stop; choose another template"
            )
        return [Segment(part, i <= stop) for i, part in enumerate(parts)]


def _unstable(where: str) -> ConversationError:
    return ConversationError(
        f"{where}: the chat template is not prefix-stable: what it prints around this turn depends on the text or on "
        "what follows, so answers cannot be told from the rest; choose another template, or mend this one"
    )


def _marks(texts: list[str]) -> Iterator[str]:
    """Strings that occur in none of `texts`, with private-use characters at both ends to set them off."""
    number = 0
    while True:
        mark = f"\ue000{number}\ue001"
        if not any(mark in text for text in texts):
            yield mark
        number += 1


def _between(segments: Iterable[Segment]) -> Iterator[Segment]:
    for i, segment in enumerate(segments):
        if i > 0:
            yield IMAGE
        yield segment
