"""From a template's name to the function that encodes records: where template and `compat` are chosen, once."""

from typing import Any, get_args

from ross_jax.config import UserError, nearest
from ross_jax.data import conversation_official
from ross_jax.data.chat_template import ChatTemplate
from ross_jax.data.conversation import (
    QWEN_2_SYSTEM,
    V1_SYSTEM,
    Compat,
    ConversationEncoder,
    ConversationPromptEncoder,
    Dialogue,
    Encoder,
    Llama3,
    PromptEncoder,
    Renderer,
    Template,
    render_plain,
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
