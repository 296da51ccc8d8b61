"""Ids and labels of the reference (its train.py and ross/mm_utils.py), with its mistakes: `compat="official"`.

The reference renders the whole conversation and encodes it. Then it finds the answers: it cuts the rendered text at
stop tokens and role markers, encodes each piece on its own, and adds up the lengths. Consequences, reproduced here:

* A message that contains a role marker or a stop token, or a padding id inside a text, makes the lengths disagree. Then
  the conversation loses all labels (the reference prints "tokenization mismatch").
* `qwen_2` supervises the stop token of every answer but the last; `v1` and `llama3` supervise all.
* An empty answer is joined to the next question in `v1` and `qwen_2`, without a stop token.
* All images of a message become one image at its front. A leading answer is dropped. Names of special tokens inside a
  message become special tokens.
* Padding ids inside a text vanish, because the attention mask leaves them out.
* Text-only conversations are cut at `tokenizer.model_max_length`.
* A multi-turn generation prompt of `llama3` contains the text `<|eot_conversation|>`.

Where the reference raises an error (`plain` without an image, turns out of order), these encoders raise
`ConversationError`.

The slow Llama 2 tokenizer of the reference puts its dummy prefix before every text. The fast one omits it before a text
that begins with a space, as captions may, so `OfficialTokenizer.encode_text` adds it.
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
    QWEN_2_SYSTEM,
    V1_SYSTEM,
    EncodedConversation,
    Encoder,
    PromptEncoder,
    Record,
)
from ross_jax.data.fields import record_images
from ross_jax.data.turns import IMAGE_MARKER, ConversationError, read_turns, sample_name

END_OF_ROUND = "<|eot_conversation|>"
"""The reference's separator of rounds in `llama3` prompts. It is text and no token."""


class OfficialTokenizer:
    """Encodes prompts as the reference does: names of special tokens are special, and a start token comes first.

    Attributes:
      pad: id of the padding token; None if there is none.
      max_length: number of tokens at which text-only conversations are cut.
      legacy: whether the reference assumes that the tokenizer puts spaces after special tokens.
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
        """Ids of the texts between `<image>` markers, each encoded on its own, with `IMAGE_ID` between them."""
        first, *others = (self.encode_text(text) for text in prompt.split(IMAGE_MARKER))
        starts = bool(first) and first[0] == self.tokenizer.bos_token_id
        ids = first
        for stretch in others:
            ids = [*ids, IMAGE_ID, *stretch[starts:]]
        return ids


def front_images(text: str) -> str:
    """The message with one `<image>` at its front, on its own line, if it contains any."""
    if IMAGE_MARKER not in text:
        return text
    return f"{IMAGE_MARKER}\n{text.replace(IMAGE_MARKER, '').strip()}".strip()


def read_dialogue(record: Record) -> tuple[list[str], bool]:
    """(texts of questions and answers in turn, the first a question; whether the record has an image)."""
    has_image = bool(record_images(record))
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
    """The prompt of `v1` and `qwen_2`. None is an answer that is to be generated; an empty text looks the same."""
    prompt = f"{system} "
    for i, text in enumerate(texts):
        name, separator = (("USER", " "), ("ASSISTANT", stop))[i % 2]
        prompt += f"{name}: {text}{separator}" if text else f"{name}:"
    return prompt


def print_llama3(texts: Sequence[str | None]) -> str:
    """The prompt of `llama3`, with `END_OF_ROUND` after each answer."""
    prompt = ""
    for i, text in enumerate(texts):
        name, separator = (("user", ""), ("assistant", END_OF_ROUND))[i % 2]
        prompt += f"<|start_header_id|>{name}<|end_header_id|>\n\n"
        if text is not None:
            prompt += f"{text}<|eot_id|>{separator}"
    return prompt


class Round(NamedTuple):
    """How the reference measures a round, which is a question with its answer, in tokens.

    Attributes:
      length: distance to the beginning of the next round.
      masked_from, masked_to: the span without supervision, counted from the round's beginning.
    """

    length: int
    masked_from: int
    masked_to: int


Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Scheme:
    """How the reference renders and masks a template.

    Attributes:
      print: texts -> prompt.
      separator: text at which a prompt is cut into rounds.
      is_token: whether the separator is encoded, or only inserted to cut at.
      answer: marker before an answer. A round without exactly one marker ends the search for answers.
      first: position of the first round.
      measure: (text of a round, its part up to the answer, whether it is the first, encode, legacy) -> Round.
      unpadded: whether padding ids are not counted when lengths are compared.
      uncounted: number of tokens that the rounds do not cover.
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
    # A round's encoding has an extra start token and lacks its stop token; later rounds have an extra dummy prefix.
    extra = 0 if is_first or legacy else 1
    return Round(len(encode(text)) - extra, 0, len(encode(head)) - 2 - extra)


def _measure_qwen_2(text: str, head: str, is_first: bool, encode: Encode, legacy: bool) -> Round:
    ids, head_ids = encode(text), encode(head)
    shared = min(len(ids), len(head_ids))
    common = next((i for i in range(shared) if ids[i] != head_ids[i]), shared)
    stop = 0 if is_first or legacy else 1  # stop token of the previous round, which precedes this one
    return Round(len(ids) + stop, 0 if is_first else 1, common + stop)


def _measure_llama3(text: str, head: str, is_first: bool, encode: Encode, legacy: bool) -> Round:
    extra = 0 if is_first or legacy else 1  # the encoding of each round begins with <|begin_of_text|>
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
    """bool[length]: True where the reference supervises. All False if its lengths disagree."""
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
    """Record -> ids and labels, by the template's entry in `SCHEMES`."""

    template: str
    tokenizer: OfficialTokenizer

    def __call__(self, record: Record) -> EncodedConversation:
        scheme = SCHEMES[self.template]
        texts, has_image = read_dialogue(record)
        prompt = scheme.print(texts)
        if has_image and self.template == "v1" and IMAGE_MARKER not in prompt:
            raise ConversationError(f"{sample_name(record)}: the record has an image, its text no {IMAGE_MARKER}")
        encode = self.tokenizer.encode_with_images if has_image else self.tokenizer.encode_text
        ids = encode(prompt if scheme.is_token else prompt.replace(scheme.separator, ""))
        if not has_image:
            ids = ids[: self.tokenizer.max_length]
        supervised = supervised_positions(scheme, prompt, ids, encode, self.tokenizer)
        return _encoded(ids, supervised, self.tokenizer.pad)


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
        caption = front_images(turns[1][1]) if record_images(record) else turns[1][1]
        ids = self.tokenizer.encode_with_images(f"{IMAGE_MARKER}{caption}\n")
        masked = len(self.tokenizer.encode_with_images(IMAGE_MARKER))
        return _encoded(ids, np.arange(len(ids)) >= masked, self.tokenizer.pad)


@dataclass(frozen=True)
class OfficialPromptEncoder:
    """Record whose last turn is a question -> ids of the reference's generation prompt."""

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


def _encoded(ids: Sequence[int], supervised: Bool[np.ndarray, "length"], pad: int | None) -> EncodedConversation:
    """Ids and labels without padding ids, which the reference's attention mask leaves out."""
    input_ids = np.asarray(ids, np.int32)
    kept = np.ones(len(input_ids), bool) if pad is None else input_ids != pad
    labels = np.where(supervised, input_ids, np.int32(IGNORE))
    return EncodedConversation(input_ids[kept], labels[kept])


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
