"""From a template's name to the function that encodes records: where template and `compat` are chosen, once."""

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
    QWEN_2_SYSTEM,
    V1_SYSTEM,
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
    count_images,
    render_plain,
    sample_name,
)
from ross_jax.data.tokenizer import TextEncoder


def build_renderer(template: str, encoder: TextEncoder) -> Renderer:
    """The function that renders a conversation as segments.

    Raises:
      UserError: no such template, or the tokenizer lacks what the template needs.
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
    if template == "chatml":
        return ChatTemplate(encoder)
    names = get_args(Template)
    raise UserError(f"template {template!r}: no such template{nearest(template, names)}; there are {list(names)}")


def _parts(template: str, tokenizer: Any) -> tuple[TextEncoder, Renderer, tuple[int, ...]]:
    encoder = TextEncoder(tokenizer)
    render = build_renderer(template, encoder)
    return encoder, render, () if template == "chatml" else encoder.start  # a chat template brings its own


def build_encoder(template: str, tokenizer: Any, compat: str = "default") -> Encoder:
    """The function that turns a record into ids and labels for training; it can be pickled.

    Args:
      template: one of `Template`.
      tokenizer: from `load_tokenizer`.
      compat: one of `Compat`; `"official"` for the reference's ids and labels, its losses of labels included.

    Raises:
      UserError: here, if template and tokenizer do not fit; `ConversationError`, by the function, for a bad record.
    """
    if _is_official(compat):
        return conversation_official.build_encoder(template, tokenizer)
    return ConversationEncoder(*_parts(template, tokenizer))


def build_prompt_encoder(template: str, tokenizer: Any, compat: str = "default") -> PromptEncoder:
    """The function that turns a record ending with a human turn into the ids of a generation prompt.

    Arguments and errors are those of `build_encoder`.
    """
    if _is_official(compat):
        return conversation_official.build_prompt_encoder(template, tokenizer)
    return ConversationPromptEncoder(*_parts(template, tokenizer))


@dataclass(frozen=True, eq=False)
class ImageEncoder:
    """Record -> ids of its pictures alone: an empty question that ends with its last picture. Nothing is supervised.

    What else the record says, its conversation included, stays out.

    Attributes:
      before: what the template says before a picture.
    """

    before: Int32[np.ndarray, "length"]

    def __call__(self, record: Record) -> EncodedConversation:
        count = count_images(record)
        if not count:
            raise ConversationError(f"{sample_name(record)}: no picture, and without a text loss no use; remove it")
        ids = np.append(self.before, np.full(count, IMAGE_ID, np.int32))
        return EncodedConversation(ids, np.full_like(ids, IGNORE))


@dataclass(frozen=True)
class TrainingEncoder:
    """Record -> ids and labels of its conversation, or of its pictures alone where it has none."""

    conversation: Encoder
    images: ImageEncoder

    def __call__(self, record: Record) -> EncodedConversation:
        return self.conversation(record) if "conversations" in record else self.images(record)


def build_image_encoder(template: str, tokenizer: Any, compat: str = "default") -> ImageEncoder:
    """The function that encodes a record's pictures alone. Arguments and errors are those of `build_encoder`."""
    question = {"from": "human", "value": IMAGE_MARKER}
    ids = build_prompt_encoder(template, tokenizer, compat)({"image": "picture", "conversations": [question]})
    return ImageEncoder(ids[: np.flatnonzero(ids == IMAGE_ID)[0]])


def build_training_encoder(
    template: str, tokenizer: Any, compat: str = "default", text_loss: bool = True
) -> TrainingEncoder | ImageEncoder:
    """The function that encodes whatever a source gives. Arguments and errors are those of `build_encoder`.

    Args:
      text_loss: whether there is one. Without it, every record is its pictures alone.
    """
    images = build_image_encoder(template, tokenizer, compat)
    return TrainingEncoder(build_encoder(template, tokenizer, compat), images) if text_loss else images


def stop_id(template: str, tokenizer: Any) -> int:
    """The id that ends an answer of a template.

    Raises:
      UserError: no such template, or the tokenizer lacks what the template needs.
    """
    encoder = TextEncoder(tokenizer)
    renderer = build_renderer(template, encoder)
    if isinstance(renderer, (Dialogue, Llama3)):
        return renderer.stop
    return encoder.special_id(tokenizer.eos_token, f"template {template!r}")


def _is_official(compat: str) -> bool:
    if compat not in get_args(Compat):
        names = get_args(Compat)
        raise UserError(f"compat {compat!r}: no such mode{nearest(compat, names)}; there are {list(names)}")
    return compat == "official"
