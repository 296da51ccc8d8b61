r"""Conversations: a LLaVA record becomes token ids and labels, turn by turn.

A record:

    {"id": ..., "image": "a.jpg",                     a list for several images, absent for none
     "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A dog."}]}

A template renders the record as segments, and each segment says whether it is supervised. Ids and labels are built
together, so no answer has to be found in a rendered string:

    A chat ... questions. USER: <image>\nWhat is it? ASSISTANT: A dog.</s>USER: Sure? ASSISTANT: Yes.</s>
    ...........................................................###########......................#########   # supervised

Rules of every template:

* Every answer is supervised with its stop token, and nothing else is. An empty answer supervises its stop token.
* Text stays text. A role marker inside a question is harmless. The name of a special token inside a message is encoded
  as ordinary pieces; special tokens come from the template alone.
* `<image>` stands for an image in human turns of records that have images. Elsewhere (an answer, a text about SVG) it
  is text. There must be one marker per image. A single image before or after the text of a message moves to the front,
  on its own line, as in the reference. Several images, or one inside the text, stay where they are.
* A leading system turn, or the record's field `system`, replaces the template's system prompt. A leading answer is
  supervised like any other. A last question without an answer is rendered as a generation prompt. Two turns of one role
  in a row are an error.

`encoders` chooses between these encoders and the reference's behaviour, `conversation_official`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int32

from ross_jax.data.fields import Record, record_images, system_prompt
from ross_jax.data.tokenizer import TextEncoder
from ross_jax.data.turns import IMAGE_MARKER, ConversationError, Role, check_unicode, read_turns, sample_name

IMAGE_ID = -200
"""Stands for an image in `input_ids`."""
IGNORE = -100
"""Label or target of a position where nothing is to be predicted."""

Template = Literal["plain", "v1", "qwen_2", "llama3", "qwen2_5", "qwen3", "chatml"]
Compat = Literal["default", "official"]


@dataclass(frozen=True)
class Turn:
    r"""One message.

    Attributes:
      texts: the text, cut at its n images into n + 1 pieces, some of them empty: ("", "\nWhat?") for "<image>\nWhat?".
    """

    role: Role
    texts: tuple[str, ...]

    @property
    def num_images(self) -> int:
        return len(self.texts) - 1


@dataclass(frozen=True)
class Conversation:
    """A checked conversation.

    Attributes:
      sample: how errors name the record.
      turns: at least one. Roles alternate, after at most one system turn.
    """

    sample: str
    turns: tuple[Turn, ...]

    @property
    def num_images(self) -> int:
        return sum(turn.num_images for turn in self.turns)


@dataclass(frozen=True, eq=False)
class EncodedConversation:
    """Ids and labels of one conversation.

    Attributes:
      input_ids: token ids, with `IMAGE_ID` where an image stands.
      labels: not shifted; the id itself where it is supervised, `IGNORE` elsewhere.
    """

    input_ids: Int32[np.ndarray, "length"]
    labels: Int32[np.ndarray, "length"]

    @property
    def num_images(self) -> int:
        return int(np.count_nonzero(self.input_ids == IMAGE_ID))

    @property
    def num_supervised(self) -> int:
        return int(np.count_nonzero(self.labels != IGNORE))

    def length(self, image_tokens: int) -> int:
        """Number of tokens that the model sees, with `image_tokens` for each image."""
        return len(self.input_ids) + self.num_images * (image_tokens - 1)


class Segment(NamedTuple):
    """A piece of a rendered conversation: text to encode, or an id (a special token, an image)."""

    content: str | int
    supervised: bool = False


IMAGE = Segment(IMAGE_ID)
Encoder = Callable[[Record], EncodedConversation]
PromptEncoder = Callable[[Record], Int32[np.ndarray, "length"]]
Renderer = Callable[[Conversation], list[Segment]]


# Records


def parse_conversation(record: Record) -> Conversation:
    """The checked conversation of a record, its texts cut at its images.

    Raises:
      ConversationError: the record is malformed, or has another number of `<image>` markers than of images.
    """
    turns = _with_system(record, read_turns(record))
    num_images = len(record_images(record))
    conversation = Conversation(
        sample=sample_name(record),
        turns=tuple(
            Turn(role, split_images(text) if num_images and role == "user" else (text,)) for role, text in turns
        ),
    )
    if conversation.num_images != num_images:
        raise ConversationError(
            f"{conversation.sample}: the record names {num_images} image(s), its human turns have "
            f"{conversation.num_images} {IMAGE_MARKER} marker(s); there must be one for each"
        )
    return conversation


def _with_system(record: Record, turns: list[tuple[Role, str]]) -> list[tuple[Role, str]]:
    """The turns, after a system turn if the record has a system prompt of its own."""
    prompt = system_prompt(record)
    if prompt is None:
        return turns
    if not isinstance(prompt, str):
        found = f"{prompt!r:.80} ({type(prompt).__name__})"
        raise ConversationError(f"{sample_name(record)}: the system prompt must be a string, found {found}")
    check_unicode(f"{sample_name(record)}, system prompt", prompt)
    if turns[0][0] == "system":
        raise ConversationError(f"{sample_name(record)}: has a system turn and a field for it; remove one of them")
    return [("system", prompt), *turns]


def split_images(text: str) -> tuple[str, ...]:
    """The text, cut at its `<image>` markers. A single marker at either end moves to the front, on its own line."""
    texts = text.split(IMAGE_MARKER)
    if len(texts) == 2 and not (texts[0].strip() and texts[1].strip()):
        rest = "".join(texts).strip()
        return ("", f"\n{rest}" if rest else "")
    return tuple(texts)


# Templates


def _content(turn: Turn) -> Iterator[Segment]:
    for i, text in enumerate(turn.texts):
        if i > 0:
            yield IMAGE
        yield Segment(text)


def _is_empty(turn: Turn) -> bool:
    return turn.texts == ("",)


@dataclass(frozen=True)
class Dialogue:
    """Renderer of `v1` and `qwen_2`: role names in plain text, and a stop token after each answer.

    Attributes:
      system: system prompt.
      stop: id of the stop token.
    """

    system: str
    stop: int

    def __call__(self, conversation: Conversation) -> list[Segment]:
        turns = conversation.turns
        system = self.system
        if turns[0].role == "system":
            system, turns = turns[0].texts[0], turns[1:]
        segments = [Segment(f"{system} " if system else "")]
        for turn in turns:
            space = "" if _is_empty(turn) else " "
            if turn.role == "user":
                segments += [Segment(f"USER:{space}"), *_content(turn), Segment(" ")]
            else:
                segments += [Segment("ASSISTANT:"), Segment(space + turn.texts[0], True), Segment(self.stop, True)]
        if not turns or turns[-1].role == "user":
            segments.append(Segment("ASSISTANT:"))
        return segments


@dataclass(frozen=True)
class Llama3:
    r"""Renderer of `llama3`: special tokens around each message, and no default system prompt.

        <|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>

    Attributes:
      start_header, end_header: ids of the special tokens around the role.
      stop: id of `<|eot_id|>`.
    """

    start_header: int
    end_header: int
    stop: int

    def __call__(self, conversation: Conversation) -> list[Segment]:
        segments = []
        for turn in conversation.turns:
            answer = turn.role == "assistant"
            segments += self._header(turn.role)
            segments += [segment._replace(supervised=answer) for segment in _content(turn)]
            segments.append(Segment(self.stop, answer))
        if conversation.turns[-1].role != "assistant":
            segments += self._header("assistant")
        return segments

    def _header(self, role: Role) -> list[Segment]:
        return [Segment(self.start_header), Segment(role), Segment(self.end_header), Segment("\n\n")]


@dataclass(frozen=True)
class ChatML:
    r"""Renderer of `qwen2_5` and `qwen3`: ChatML, whatever the tokenizer's own template says.

        <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n

    Qwen3's own template puts a block of thoughts before the last answer alone. Here no answer has one.

    Attributes:
      system: system prompt; empty for none.
      start, stop: ids of the special tokens around a message.
    """

    system: str
    start: int
    stop: int

    def __call__(self, conversation: Conversation) -> list[Segment]:
        turns = conversation.turns
        if self.system and turns[0].role != "system":
            turns = (Turn("system", (self.system,)), *turns)
        segments = []
        for turn in turns:
            answer = turn.role == "assistant"
            segments += [Segment(self.start), Segment(f"{turn.role}\n")]
            segments += [segment._replace(supervised=answer) for segment in _content(turn)]
            segments += [Segment(self.stop, answer), Segment("\n")]
        if turns[-1].role != "assistant":
            segments += [Segment(self.start), Segment("assistant\n")]
        return segments


def render_plain(conversation: Conversation) -> list[Segment]:
    """Renderer of `plain`, for stage 1: the images, then the caption and a newline. The question's text is dropped."""
    turns = conversation.turns
    roles = [turn.role for turn in turns]
    if roles not in (["user"], ["user", "assistant"]):
        raise ConversationError(
            f"{conversation.sample}: the plain template takes one human turn and one answer, found {roles}; "
            "use a template for dialogues"
        )
    if not conversation.num_images:
        raise ConversationError(f"{conversation.sample}: the plain template needs an image, and the record has none")
    segments = [IMAGE] * conversation.num_images
    if len(turns) == 2:
        segments.append(Segment(turns[1].texts[0] + "\n", True))
    return segments


V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
QWEN_2_SYSTEM = V1_SYSTEM.replace("user", "human")
QWEN2_5_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


# Encoding


def encode_segments(
    segments: list[Segment], encoder: TextEncoder, start: tuple[int, ...]
) -> tuple[Int32[np.ndarray, "length"], Int32[np.ndarray, "length"]]:
    """(ids, labels) of rendered segments. Neighbouring texts are encoded together, unless only one is supervised.

    As in the reference, text at the start of the sequence and right after an image begins a new text, with the dummy
    prefix of SentencePiece-like tokenizers. Other text continues the text before it.

    Args:
      start: ids in front of the sequence.
    """
    ids: list[int] = list(start)
    supervised: list[bool] = [False] * len(ids)
    continues = False
    pending, pending_supervised = "", False

    def flush() -> None:
        nonlocal pending, continues
        if pending:
            text_ids = encoder.encode(pending, continues)
            ids.extend(text_ids)
            supervised.extend([pending_supervised] * len(text_ids))
            pending, continues = "", True

    for content, is_supervised in segments:
        if isinstance(content, str):
            if is_supervised != pending_supervised:
                flush()
            pending, pending_supervised = pending + content, is_supervised
        else:
            flush()
            ids.append(content)
            supervised.append(is_supervised)
            continues = content != IMAGE_ID
    flush()
    input_ids = np.asarray(ids, np.int32)
    return input_ids, np.where(supervised, input_ids, np.int32(IGNORE))


@dataclass(frozen=True)
class ConversationEncoder:
    """Record -> ids and labels for training.

    Attributes:
      start: ids in front of the sequence.
    """

    encoder: TextEncoder
    render: Renderer
    start: tuple[int, ...]

    def __call__(self, record: Record) -> EncodedConversation:
        conversation = parse_conversation(record)
        encoded = EncodedConversation(*encode_segments(self.render(conversation), self.encoder, self.start))
        if not encoded.num_supervised:
            raise ConversationError(f"{conversation.sample}: no answer, so nothing to learn from; remove the sample")
        return encoded


@dataclass(frozen=True)
class ConversationPromptEncoder:
    """Record whose last turn is a question -> ids after which an answer can be generated."""

    encoder: TextEncoder
    render: Renderer
    start: tuple[int, ...]

    def __call__(self, record: Record) -> Int32[np.ndarray, "length"]:
        conversation = parse_conversation(record)
        if conversation.turns[-1].role != "user":
            raise ConversationError(f"{conversation.sample}: a generation prompt must end with a human turn")
        return encode_segments(self.render(conversation), self.encoder, self.start)[0]
