"""`compat="official"`: the ids and labels of the reference (its train.py and ross/mm_utils.py), faults included.

The reference prints the whole conversation, encodes it, and then finds the answers by cutting the print at stop tokens
and role markers and adding up the lengths of the pieces' own encodings. What follows from that, and is kept here:

* a message that contains a role marker or a stop token, or a padding id inside a text, makes the lengths disagree: all
  labels of the conversation are lost (the reference prints "tokenization mismatch");
* `qwen_2` supervises the stop token of every answer but the last, `v1` and `llama3` that of every answer;
* an empty answer is joined to the next question in `v1` and `qwen_2`, without a stop token;
* every message's pictures shrink to one at its front; a leading answer is dropped; special tokens' text is special;
* text-only conversations are cut at `tokenizer.model_max_length`, those with pictures only in `collate`;
* a multi-turn generation prompt of `llama3` holds the text `<|eot_conversation|>`.

What the reference raises, on `plain` without a picture or turns out of order, is a `ConversationError` here.

The reference used the slow Llama 2 tokenizer, which puts its dummy prefix in front of every text; the fast one of today
omits it where a text begins with a space, as captions may. `OfficialTokenizer.encode_text` makes up for that.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from ross_jax.config import UserError, nearest
from ross_jax.data.conversation import (
    IGNORE,
    IMAGE_ID,
    IMAGE_MARKER,
    QWEN_2_SYSTEM,
    V1_SYSTEM,
    ConversationError,
    EncodedConversation,
    Encoder,
    PromptEncoder,
    Record,
    count_images,
    read_turns,
    sample_name,
)

END_OF_ROUND = "<|eot_conversation|>"  # the reference's own separator in llama3 prompts; no token


class OfficialTokenizer:
    """Encodes prompts as the reference does: special tokens in the text are special, a start token comes first.

    Attributes:
      pad: id of the padding token, which the reference does not count; None without one.
      max_length: where text-only conversations are cut.
      legacy: whether the reference would take the tokenizer for one that spaces out special tokens.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.pad: int | None = tokenizer.pad_token_id
        self.max_length: int = tokenizer.model_max_length
        self.legacy = bool(getattr(tokenizer, "legacy", False))
        self._omits_prefix = tokenizer("a").input_ids == tokenizer(" a").input_ids

    def encode_text(self, text: str) -> list[int]:
        if self._omits_prefix and text.startswith(" "):
            text = " " + text
        return list(self.tokenizer(text, verbose=False).input_ids)

    def encode_with_images(self, prompt: str) -> list[int]:
        """Every stretch between `<image>` markers is encoded on its own; `IMAGE_ID` stands between them."""
        first, *others = (self.encode_text(text) for text in prompt.split(IMAGE_MARKER))
        starts = bool(first) and first[0] == self.tokenizer.bos_token_id
        ids = first
        for stretch in others:
            ids = [*ids, IMAGE_ID, *stretch[starts:]]
        return ids


def front_images(text: str) -> str:
    """The message with one `<image>` in front, on its own line, if it had any."""
    if IMAGE_MARKER not in text:
        return text
    return f"{IMAGE_MARKER}\n{text.replace(IMAGE_MARKER, '').strip()}".strip()


def read_dialogue(record: Record) -> tuple[list[str], bool]:
    """Messages, human and assistant in turn beginning with the human's, and whether the record has a picture."""
    has_image = count_images(record) > 0
    turns = read_turns(record)
    if turns[0][0] == "system":
        raise ConversationError(f"{sample_name(record)}, conversations[0]: the reference has no system turns")
    texts = [front_images(text) if has_image else text for _, text in turns]
    if turns[0][0] == "assistant":
        texts = texts[1:]
    if not texts:
        raise ConversationError(f"{sample_name(record)}: an answer without a question")
    return texts, has_image


def print_dialogue(system: str, stop: str, texts: Sequence[str | None]) -> str:
    """The prompt of `v1` and `qwen_2`. None is an answer left open; an empty message looks the same."""
    prompt = f"{system} "
    for i, text in enumerate(texts):
        name, separator = (("USER", " "), ("ASSISTANT", stop))[i % 2]
        prompt += f"{name}: {text}{separator}" if text else f"{name}:"
    return prompt


def print_llama3(texts: Sequence[str | None]) -> str:
    """The prompt of `llama3`, with the reference's mark after each answer."""
    prompt = ""
    for i, text in enumerate(texts):
        name, separator = (("user", ""), ("assistant", END_OF_ROUND))[i % 2]
        prompt += f"<|start_header_id|>{name}<|end_header_id|>\n\n"
        if text is not None:
            prompt += f"{text}<|eot_id|>{separator}"
    return prompt


class Round(NamedTuple):
    """How the reference measures one question with its answer, in tokens.

    Attributes:
      length: by how much it moves on.
      masked_from: where it begins to mask, from the round's own beginning.
      masked_to: where it stops.
    """

    length: int
    masked_from: int
    masked_to: int


Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Scheme:
    """How the reference prints and masks one template.

    Attributes:
      print: messages -> prompt.
      separator: where a prompt is cut into rounds.
      is_token: whether the separator is encoded too, or only drawn in for the cutting.
      answer: the marker before an answer; a round that does not hold exactly one of them ends the search.
      first: position of the first round.
      measure: (round, its part up to the answer, is it the first, encode, legacy) -> Round.
      unpadded: whether padding ids are left out when the lengths are compared.
      uncounted: how many tokens the rounds do not cover.
    """

    print: Callable[[Sequence[str | None]], str]
    separator: str
    is_token: bool
    answer: str
    first: int
    measure: Callable[[str, str, bool, Encode, bool], Round]
    unpadded: bool
    uncounted: int


def _measure_v1(text: str, head: str, is_first: bool, encode: Encode, legacy: bool) -> Round:
    # A round's own encoding has a start token too many and a stop token too few; later ones also a dummy prefix.
    extra = 0 if is_first or legacy else 1
    return Round(len(encode(text)) - extra, 0, len(encode(head)) - 2 - extra)


def _measure_qwen_2(text: str, head: str, is_first: bool, encode: Encode, legacy: bool) -> Round:
    ids, head_ids = encode(text), encode(head)
    shared = min(len(ids), len(head_ids))
    common = next((i for i in range(shared) if ids[i] != head_ids[i]), shared)
    stop = 0 if is_first or legacy else 1  # the previous round's, which stands in front of this one
    return Round(len(ids) + stop, 0 if is_first else 1, common + stop)


def _measure_llama3(text: str, head: str, is_first: bool, encode: Encode, legacy: bool) -> Round:
    extra = 0 if is_first or legacy else 1  # each round's own encoding begins with <|begin_of_text|>
    return Round(len(encode(text)) - extra, 0, len(encode(head)) - extra)


SCHEMES: Mapping[str, Scheme] = {
    "v1": Scheme(
        print=lambda texts: print_dialogue(V1_SYSTEM, "</s>", texts),
        separator="</s>",
        is_token=True,
        answer=" ASSISTANT: ",
        first=1,
        measure=_measure_v1,
        unpadded=True,
        uncounted=0,
    ),
    "qwen_2": Scheme(
        print=lambda texts: print_dialogue(QWEN_2_SYSTEM, "<|im_end|>", texts),
        separator="<|im_end|>",
        is_token=True,
        answer=" ASSISTANT: ",
        first=0,
        measure=_measure_qwen_2,
        unpadded=True,
        uncounted=1,
    ),
    "llama3": Scheme(
        print=print_llama3,
        separator=END_OF_ROUND,
        is_token=False,
        answer="<|start_header_id|>assistant<|end_header_id|>\n\n",
        first=0,
        measure=_measure_llama3,
        unpadded=False,
        uncounted=0,
    ),
}


def supervised_positions(
    scheme: Scheme, prompt: str, ids: Sequence[int], encode: Encode, tokenizer: OfficialTokenizer
) -> Bool[np.ndarray, "length"]:
    """Which positions the reference supervises; none where its lengths disagree."""
    supervised = np.ones(len(ids), bool)
    position = scheme.first
    supervised[:position] = False
    for i, text in enumerate(prompt.split(scheme.separator)):
        parts = text.split(scheme.answer)
        if len(parts) != 2:
            break
        measured = scheme.measure(text, parts[0] + scheme.answer, i == 0, encode, tokenizer.legacy)
        supervised[position + measured.masked_from : position + measured.masked_to] = False
        position += measured.length
    supervised[position:] = False
    total = sum(index != tokenizer.pad for index in ids) if scheme.unpadded else len(ids)
    if position < tokenizer.max_length and position != total - scheme.uncounted:
        supervised[:] = False
    return supervised


@dataclass(frozen=True)
class OfficialEncoder:
    """Record -> ids and labels, by one of `SCHEMES`."""

    template: str
    tokenizer: OfficialTokenizer

    def __call__(self, record: Record) -> EncodedConversation:
        scheme = SCHEMES[self.template]
        texts, has_image = read_dialogue(record)
        prompt = scheme.print(texts)
        if has_image and self.template == "v1" and IMAGE_MARKER not in prompt:
            raise ConversationError(f"{sample_name(record)}: the record has a picture, its text no {IMAGE_MARKER}")
        encode = self.tokenizer.encode_with_images if has_image else self.tokenizer.encode_text
        ids = encode(prompt if scheme.is_token else prompt.replace(scheme.separator, ""))
        if not has_image:
            ids = ids[: self.tokenizer.max_length]
        supervised = supervised_positions(scheme, prompt, ids, encode, self.tokenizer)
        return _encoded(ids, supervised)


@dataclass(frozen=True)
class OfficialPlainEncoder:
    """Record -> ids and labels of a caption: `<image>`, then the caption and a newline."""

    tokenizer: OfficialTokenizer

    def __call__(self, record: Record) -> EncodedConversation:
        turns = read_turns(record)
        if len(turns) != 2:
            raise ConversationError(
                f"{sample_name(record)}: plain takes a question and a caption, found {len(turns)} turns"
            )
        if IMAGE_MARKER not in turns[0][1]:
            raise ConversationError(f"{sample_name(record)}, conversations[0]: plain needs {IMAGE_MARKER}")
        caption = front_images(turns[1][1]) if count_images(record) else turns[1][1]
        ids = self.tokenizer.encode_with_images(f"{IMAGE_MARKER}{caption}\n")
        masked = len(self.tokenizer.encode_with_images(IMAGE_MARKER))
        return _encoded(ids, np.arange(len(ids)) >= masked)


@dataclass(frozen=True)
class OfficialPromptEncoder:
    """Record that ends with a human turn -> ids of the reference's generation prompt."""

    template: str
    tokenizer: OfficialTokenizer

    def __call__(self, record: Record) -> Int32[np.ndarray, "length"]:
        texts, _ = read_dialogue(record)
        if len(texts) % 2 == 0:
            raise ConversationError(f"{sample_name(record)}: a generation prompt must end with a human turn")
        if self.template == "plain":
            prompt = texts[0]
        else:
            prompt = SCHEMES[self.template].print([*texts, None])
        return np.asarray(self.tokenizer.encode_with_images(prompt), np.int32)


def _encoded(ids: Sequence[int], supervised: Bool[np.ndarray, "length"]) -> EncodedConversation:
    input_ids = np.asarray(ids, np.int32)
    return EncodedConversation(input_ids, np.where(supervised, input_ids, np.int32(IGNORE)))


def _check_template(template: str) -> None:
    names = ["plain", *SCHEMES]
    if template not in names:
        raise UserError(
            f"template {template!r}: the reference does not have it{nearest(template, names)}; "
            f"compat='official' knows {names}"
        )


def build_encoder(template: str, tokenizer: Any) -> Encoder:
    """`encoders.build_encoder` for `compat="official"`."""
    _check_template(template)
    if template == "plain":
        return OfficialPlainEncoder(OfficialTokenizer(tokenizer))
    return OfficialEncoder(template, OfficialTokenizer(tokenizer))


def build_prompt_encoder(template: str, tokenizer: Any) -> PromptEncoder:
    """`encoders.build_prompt_encoder` for `compat="official"`."""
    _check_template(template)
    return OfficialPromptEncoder(template, OfficialTokenizer(tokenizer))


class OfficialBatch(NamedTuple):
    """What the reference's collator makes of several conversations."""

    input_ids: Int32[np.ndarray, "batch length"]
    labels: Int32[np.ndarray, "batch length"]
    attention_mask: Bool[np.ndarray, "batch length"]


def collate(conversations: Sequence[EncodedConversation], pad: int, max_length: int) -> OfficialBatch:
    """Pads on the right to the longest, then cuts at `max_length`, pictures included.

    Padding ids inside a text are masked out as well, as in the reference.
    """
    longest = max(len(conversation.input_ids) for conversation in conversations)

    def padded(rows: list[np.ndarray], value: int) -> Int32[np.ndarray, "batch length"]:
        out = np.full((len(rows), longest), value, np.int32)
        for row, values in zip(out, rows, strict=True):
            row[: len(values)] = values
        return out[:, :max_length]

    input_ids = padded([conversation.input_ids for conversation in conversations], pad)
    labels = padded([conversation.labels for conversation in conversations], IGNORE)
    return OfficialBatch(input_ids, labels, input_ids != pad)
