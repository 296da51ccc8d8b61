r"""Jinja chat templates that render conversations as training does, for programs that know transformers alone.

    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
        ->  "A chat ... questions. USER: <image>\nWhat? ASSISTANT:"

Images stand where `data.conversation` puts them: a single one before or after a question moves to the front, on its
own line. Names of special tokens inside a message are not text for these programs, as they are in training.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np

from ross_jax.data.conversation import IMAGE_ID, IMAGE_MARKER, QWEN_2_SYSTEM, V1_SYSTEM, Template
from ross_jax.data.encoders import build_prompt_encoder
from ross_jax.data.tokenizer import TextEncoder
from ross_jax.data.tokenizer_check import default_template

_TEXT = (
    "{%- macro raw(m) %}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% set ns = namespace(text=false) %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}{{ '<image>' if ns.text else '<image>\\n' }}"
    "{% else %}{% set ns.text = true %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endmacro %}"
)
"""Macro: text of a message, whose content is a text or a list of parts. `<image>` stands for an image."""
_QUESTION = (
    "{%- macro question(m) %}{% set texts = raw(m).split('<image>') %}"
    "{% if texts | length == 2 and not (texts[0] | trim and texts[1] | trim) %}{% set rest = texts | join | trim %}"
    "{% set texts = ['', '\\n' + rest if rest else ''] %}{% endif %}"
    "{% for text in texts %}{% if not loop.first %}<image>{{ 'GAP' if text and text[0] != ' ' }}{% endif %}{{ text }}"
    "{% endfor %}{% endmacro %}"
)
"""Macro: text of a user's message, with its images in their places."""
_DIALOGUE = (
    "{%- if messages[0]['role'] == 'system' %}{% set system = raw(messages[0]) %}{% else %}{% set system = 'SYSTEM' %}"
    "{% endif %}{{ system + ' ' if system }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{% set text = question(m) %}USER:{{ ' ' if text }}{{ text }}{{ ' ' }}"
    "{% elif m['role'] == 'assistant' %}{% set text = raw(m) %}ASSISTANT:{{ ' ' if text }}{{ text }}STOP"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_LLAMA3 = (
    "{%- for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>{{ '\\n\\n' }}"
    "{{ question(m) if m['role'] == 'user' else raw(m) }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{{ '\\n\\n' }}{% endif %}"
)
_PLAIN = (
    "{%- for m in messages %}{% if m['role'] == 'user' %}{% for text in raw(m).split('<image>') %}"
    "{{ '<image>' if not loop.first }}{% endfor %}{% else %}{% set text = raw(m) + '\\n' %}"
    "{{ 'GAP' if text[0] != ' ' }}{{ text }}{% endif %}{% endfor %}"
)
_AS_TEXT = (
    "{%- set ns = namespace(messages=[]) %}{% for m in messages %}{% set ns.messages = ns.messages + "
    "[{'role': m['role'], 'content': question(m) if m['role'] == 'user' else raw(m)}] %}{% endfor %}"
    "{% set messages = ns.messages -%}\n"
)
"""Replaces messages by messages whose content is text, for a tokenizer's own template."""
_PROBES: tuple[tuple[int, tuple[str, ...]], ...] = (
    (1, ("What is it?",)),
    (1, (" Two  spaces, and an end ",)),
    (1, ("",)),
    (2, ("Compare\nthem.", "A dog.", "Sure?")),
    (1, ("What?", "A cat, \n not a dog", "Sure?", "Yes", "Why?")),
    (0, ("No image.",)),
)
"""(number of images, question, answer, question, ...) of conversations that both renderings are compared with."""


def chat_template(template: Template | str, tokenizer: Any) -> str:
    """The Jinja text that renders conversations as training with `template` and `tokenizer` does."""
    if template in ("v1", "qwen_2"):
        system, stop = (V1_SYSTEM, tokenizer.eos_token) if template == "v1" else (QWEN_2_SYSTEM, "<|im_end|>")
        body = _DIALOGUE.replace("SYSTEM", system.replace("'", "\\'")).replace("STOP", stop)
    elif template == "chatml":
        body = _AS_TEXT + str(default_template(tokenizer.chat_template))
    else:
        body = {"llama3": _LLAMA3, "plain": _PLAIN}[template]
    encoder = TextEncoder(tokenizer)
    # Training encodes the text behind an image as a new text, which has a space in front in SentencePiece.
    begins_anew = encoder.encode("\na") != encoder.encode("\na", continues=True)
    return _TEXT + (_QUESTION + body).replace("GAP", " " if begins_anew else "")


def recognise(text: str, tokenizer: Callable[[], Any]) -> str | None:
    """The conversation template that `chat_template` made a text from; None if it made none of that text.

    Args:
      tokenizer: loads the tokenizer beside the text.
    """
    if not text.startswith(_TEXT):
        return None
    if _AS_TEXT.strip() in text:
        return "chatml"
    loaded = tokenizer()
    return next((name for name in get_args(Template) if name != "chatml" and chat_template(name, loaded) == text), None)


def differences(template: str, tokenizer: Any, folder: Path, image_id: int) -> list[str]:
    """Renderings in which transformers' ids differ from training's, one line each; empty if there are none.

    Args:
      template: conversation template of the training.
      tokenizer: the tokenizer of the training.
      folder: an export, which transformers alone reads.
      image_id: id of `<image>` in the export.
    """
    from transformers import AutoTokenizer

    encode, exported = build_prompt_encoder(template, tokenizer), AutoTokenizer.from_pretrained(str(folder))
    found = []
    for count, turns in _PROBES:
        if template == "plain" and (len(turns) > 1 or not count):
            continue
        text = exported.apply_chat_template(_messages(count, turns), tokenize=False, add_generation_prompt=True)
        # Processors and servers of transformers' models do not add a begin-of-sequence token where the text has it.
        starts = bool(exported.bos_token) and text.startswith(exported.bos_token)
        theirs = exported(text, add_special_tokens=not starts).input_ids
        ids = encode(_record(count, turns))
        ours = np.where(ids == IMAGE_ID, image_id, ids).tolist()
        if theirs != ours:
            found.append(f"{text!r:.200} becomes {exported.convert_ids_to_tokens(theirs)}, training has {ours}")
    return found


def _messages(count: int, turns: tuple[str, ...]) -> list[dict[str, Any]]:
    images = [{"type": "image"}] * count
    first = {"role": "user", "content": [*images, {"type": "text", "text": turns[0]}]}
    return [first, *({"role": role, "content": text} for role, text in zip(_roles(), turns[1:], strict=False))]


def _record(count: int, turns: tuple[str, ...]) -> dict[str, Any]:
    first = {"from": "human", "value": f"{IMAGE_MARKER}\n" * count + turns[0]}
    later = ({"from": role, "value": text} for role, text in zip(_roles(), turns[1:], strict=False))
    return {"id": "a probe", "image": ["image"] * count, "conversations": [first, *later]}


def _roles() -> Iterator[str]:
    while True:
        yield "assistant"
        yield "user"
