"""Chooses, by template and `compat`, the function that encodes records."""

from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from jaxtyping import Int32

from ross_jax.config import UserError, nearest
from ross_jax.data import conversation_official
from ross_jax.data.chat_template import ChatTemplate
from ross_jax.data.conversation import (
    IGNORE,
    IMAGE_ID,
    IMAGE_MARKER,
    QWEN2_5_SYSTEM,
    QWEN_2_SYSTEM,
    V1_SYSTEM,
    ChatML,
    Compat,
    ConversationEncoder,
    ConversationError,
    ConversationPromptEncoder,
    Dialogue,
    EncodedConversation,
    Encoder,
    Llama3,
    PromptEncoder,
    Record,
    Renderer,
    Template,
    render_plain,
    sample_name,
)
from ross_jax.data.fields import TURNS, record_images
from ross_jax.data.tokenizer import TextEncoder


def build_renderer(template: str, encoder: TextEncoder) -> Renderer:
    """The function that renders conversations as segments.

    Raises:
      UserError: the template does not exist, or needs a special token that the tokenizer does not have.
    """
    purpose = f"template {template!r}"
    if template == "plain":
        return render_plain
    if template == "v1":
        return Dialogue(V1_SYSTEM, encoder.special_id(encoder.tokenizer.eos_token, purpose))
    if template == "qwen_2":
        return Dialogue(QWEN_2_SYSTEM, encoder.special_id("<|im_end|>", purpose))
    if template == "llama3":
        names = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
        return Llama3(*(encoder.special_id(name, purpose) for name in names))
    if template in ("qwen2_5", "qwen3"):
        system = QWEN2_5_SYSTEM if template == "qwen2_5" else ""
        return ChatML(system, *(encoder.special_id(name, purpose) for name in ("<|im_start|>", "<|im_end|>")))
    if template == "chatml":
        return ChatTemplate(encoder)
    names = get_args(Template)
    raise UserError(f"template {template!r}: no such template{nearest(template, names)}; there are {list(names)}")


def _parts(template: str, tokenizer: Any) -> tuple[TextEncoder, Renderer, tuple[int, ...]]:
    encoder = TextEncoder(tokenizer)
    render = build_renderer(template, encoder)
    return encoder, render, () if template == "chatml" else encoder.start  # a chat template has its own start


def build_encoder(template: str, tokenizer: Any, compat: str = "default") -> Encoder:
    """The function that turns a record into ids and labels for training. It can be pickled.

    Args:
      template: one of `conversation.Template`.
      tokenizer: from `load_tokenizer`.
      compat: one of `conversation.Compat`. `official` gives the reference's ids and labels, including its mistakes.

    Raises:
      UserError: template and tokenizer do not fit. The function raises `ConversationError` for a bad record.
    """
    if _is_official(compat):
        return conversation_official.build_encoder(template, tokenizer)
    return ConversationEncoder(*_parts(template, tokenizer))


def build_prompt_encoder(template: str, tokenizer: Any, compat: str = "default") -> PromptEncoder:
    """The function that turns a record whose last turn is a question into the ids of a generation prompt.

    Arguments and errors are those of `build_encoder`.
    """
    if _is_official(compat):
        return conversation_official.build_prompt_encoder(template, tokenizer)
    return ConversationPromptEncoder(*_parts(template, tokenizer))


@dataclass(frozen=True, eq=False)
class ImageEncoder:
    """Record -> ids of its images alone: an empty question, cut after its last image. Nothing is supervised.

        [before] [image] [image]            the record's conversation is ignored

    Attributes:
      before: ids that the template puts before the image of an empty question.
    """

    before: Int32[np.ndarray, "length"]

    def __call__(self, record: Record) -> EncodedConversation:
        count = len(record_images(record))
        if not count:
            raise ConversationError(f"{sample_name(record)}: no image, and the run has no text loss; remove it")
        ids = np.append(self.before, np.full(count, IMAGE_ID, np.int32))
        return EncodedConversation(ids, np.full_like(ids, IGNORE))


@dataclass(frozen=True)
class TrainingEncoder:
    """Record -> ids and labels of its conversation, or of its images alone if it has no conversation."""

    conversation: Encoder
    images: ImageEncoder

    def __call__(self, record: Record) -> EncodedConversation:
        return self.conversation(record) if any(field in record for field in TURNS) else self.images(record)


def build_image_encoder(template: str, tokenizer: Any, compat: str = "default") -> ImageEncoder:
    """The function that encodes a record's images alone. Arguments and errors are those of `build_encoder`."""
    question = {"from": "human", "value": IMAGE_MARKER}
    ids = build_prompt_encoder(template, tokenizer, compat)({"image": "image", "conversations": [question]})
    return ImageEncoder(ids[: np.flatnonzero(ids == IMAGE_ID)[0]])


def build_training_encoder(
    template: str, tokenizer: Any, compat: str = "default", text_loss: bool = True
) -> TrainingEncoder | ImageEncoder:
    """The function that encodes the records of any source. Arguments and errors are those of `build_encoder`.

    Args:
      text_loss: whether conversations are read. If not, every record is encoded as its images alone.
    """
    images = build_image_encoder(template, tokenizer, compat)
    return TrainingEncoder(build_encoder(template, tokenizer, compat), images) if text_loss else images


def stop_id(template: str, tokenizer: Any) -> int:
    """The id with which training ends an answer. Errors are those of `build_encoder`."""
    turns = [{"from": "human", "value": IMAGE_MARKER}, {"from": "gpt", "value": "a"}]
    labels = build_encoder(template, tokenizer)({"id": "a probe", "image": "image", "conversations": turns}).labels
    return int(labels[labels != IGNORE][-1])


def stop_ids(template: str, tokenizer: Any) -> tuple[int, ...]:
    r"""Ids that end an answer, `stop_id` first. Errors are those of `build_encoder`.

    `plain` ends an answer with a newline, which may be the end of a longer token, such as `.\n`.
    """
    stop = stop_id(template, tokenizer)
    if template != "plain":
        return (stop,)
    newline = TextEncoder(tokenizer).encode("\n", continues=True)
    if not newline:
        return ()  # a tokenizer that drops newlines
    end = tokenizer.convert_ids_to_tokens(newline[-1])
    longer = sorted(index for token, index in tokenizer.get_vocab().items() if token.endswith(end))
    return tuple(dict.fromkeys((newline[-1], *longer)))


def _is_official(compat: str) -> bool:
    if compat not in get_args(Compat):
        names = get_args(Compat)
        raise UserError(f"compat {compat!r}: no such mode{nearest(compat, names)}; there are {list(names)}")
    return compat == "official"
