r"""Turns of a record, in the layouts in which conversations are published.

    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
    "messages":      [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}]
    "messages":      [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}, ...]
    "texts":         [{"user": "What?", "assistant": "A dog."}]

The fields of a turn, `from` and `value` or `role` and `content`, and typed parts may stand in `conversations` and in
`messages`. An image part becomes the mark `<image>`. In all layouts but the first, a record that has images and no mark
for them has its images in front of the first question.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from ross_jax.config import UserError, nearest
from ross_jax.data.fields import Record, image_part, record_images, turns_field

IMAGE_MARKER = "<image>"

Role = Literal["system", "user", "assistant"]
ROLES: Mapping[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


class ConversationError(UserError):
    """A record that cannot become ids and labels. The text names the sample and, if there is one, the turn."""


def sample_name(record: Record) -> str:
    """How errors name a record."""
    return "sample without an id" if record.get("id") is None else f"sample {record['id']!r:.80}"


def no_conversations(record: Record) -> str:
    """What is wrong with a record that has no turns, and what to do."""
    near = nearest("conversations", map(str, record))
    found = f"no 'conversations'{near}; it has {sorted(map(str, record))!s:.200}"
    turns = "[{'from': 'human', 'value': QUESTION}, {'from': 'gpt', 'value': ANSWER}]"
    return f"{found}; expected 'conversations': {turns}, or 'messages' with 'role' and 'content'"


def read_turns(record: Record) -> list[tuple[Role, str]]:
    """The turns of a record as (role, text), checked.

    Raises:
      ConversationError: names the sample and the turn.
    """
    sample, field = sample_name(record), turns_field(record)
    if field is None:
        raise ConversationError(f"{sample}: {no_conversations(record)}")
    messages = record[field]
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ConversationError(f"{sample}: {field!r} must be a list of at least one turn, found {messages!r:.80}")
    turns: list[tuple[Role, str]] = []
    for i, message in enumerate(messages):
        where = f"{sample}, {field}[{i}]"
        if not isinstance(message, Mapping):
            raise ConversationError(f"{where}: expected an object with {_expected(field)}, found {message!r:.80}")
        for speaker, content in _said(where, field, message):
            if speaker not in ROLES:
                raise ConversationError(
                    f"{where}: {speaker!r} is no role{nearest(speaker, ROLES)}; roles are {list(ROLES)}"
                )
            role = ROLES[speaker]
            if role == "system" and turns:
                raise ConversationError(f"{where}: a system turn can only be the first turn; move or remove it")
            if turns and turns[-1][0] == role:
                raise ConversationError(
                    f"{where}: two {speaker!r} turns in a row; merge them, or add what is between them"
                )
            text = content if isinstance(content, str) else _joined(where, role, content)
            check_unicode(where, text)
            turns.append((role, text))
    return turns if _is_llava(messages) else _with_images_in_front(record, turns)


def _expected(field: str) -> str:
    return {"texts": "'user' and 'assistant'", "messages": "'role' and 'content'"}.get(field, "'from' and 'value'")


def _said(where: str, field: str, message: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(speaker, text or parts) of a turn, or of both turns of an item of `texts`."""
    by_role = "from" not in message and (field == "messages" or "role" in message or "content" in message)
    names = ("role", "content") if by_role else ("from", "value")
    names = ("user", "assistant") if field == "texts" else names
    for key in names:
        if key not in message:
            raise ConversationError(f"{where}: no {key!r}; it has {sorted(map(str, message))}")
    for key in names:
        kinds = (str,) if key in ("role", "from") else (str, list, tuple)
        if not isinstance(message[key], kinds):
            found = f"{message[key]!r:.80} ({type(message[key]).__name__})"
            raise ConversationError(f"{where}: {key!r} must be a string, found {found}")
    if field == "texts":
        yield from ((key, message[key]) for key in names)
    else:
        yield message[names[0]], message[names[1]]


def _joined(where: str, role: Role, parts: list[Any]) -> str:
    """The text of typed parts, with a mark for each image."""
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and image_part(part):
            if role != "user":
                raise ConversationError(f"{where}: an image in a turn of the {role}; images belong in questions")
            texts.append(IMAGE_MARKER)
        elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ConversationError(f"{where}: a part of type {kind!r}; parts are of type 'text' or 'image'")
    return "".join(texts)


def _is_llava(messages: list[Any]) -> bool:
    return all("from" in message for message in messages)


def _with_images_in_front(record: Record, turns: list[tuple[Role, str]]) -> list[tuple[Role, str]]:
    """The turns, with a mark for each image before the first question if no question has one."""
    questions = [i for i, (role, _) in enumerate(turns) if role == "user"]
    if not questions or any(IMAGE_MARKER in turns[i][1] for i in questions):
        return turns
    first, marks = questions[0], IMAGE_MARKER * len(record_images(record))
    if marks:
        turns[first] = "user", f"{marks}\n{turns[first][1]}"
    return turns


def check_unicode(where: str, text: str) -> None:
    """Raises ConversationError, with the place, if a text cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConversationError(f"{where}: the text is no valid Unicode (a lone surrogate): {error}") from error
