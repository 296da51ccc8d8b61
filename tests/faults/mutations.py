"""Random damage to files: to their bytes, or to the values of JSON.

    mutate(rng, content, kind) -> content      kind: "bytes", "text" or "json"

Everything is a function of the random generator's state.
"""

import json
import random
import struct
from typing import Any

_NUMBERS = [0, 1, -1, 127, 255, 2**15, 2**31 - 1, -(2**31), 2**32 - 1, 2**63 - 1, -(2**63), 2**64 - 1]
_TEXTS = ["", "\0", "\ud800", "a" * 300, "../../etc/passwd", "/", "\ue000", "<image>" * 9, "9" * 5000, "%s{}", "é中😀"]
_VALUES: list[Any] = [None, True, False, 0.5, 1e308, -0.0, float("nan"), float("inf"), 10**400, [], {}, [[]], {"": 0}]
_RAW = [b"[" * 100_000, b"9" * 5000, b"\xff\xfe", b"\xed\xa0\x80", b"\0" * 64, b"null", b"-", b'"', b"{{", b"%}", b"\n"]


def mutate(rng: random.Random, content: bytes, kind: str) -> bytes:
    """The content with one to four changes."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        value = _parse(content) if kind == "json" and rng.random() < 0.7 else None
        if value is not None:
            content = json.dumps(_change(rng, value)).encode("utf-8", "surrogatepass")
        else:
            content = rng.choice(_DAMAGE)(rng, content)
    return content


def _parse(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _place(rng: random.Random, content: bytes) -> int:
    """A place in the content, near the beginning half of the time: headers are there."""
    return rng.randrange(min(len(content), 200) if rng.random() < 0.5 else len(content)) if content else 0


def _flip(rng: random.Random, content: bytes) -> bytes:
    if not content:
        return content
    place = _place(rng, content)
    return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]


def _truncate(rng: random.Random, content: bytes) -> bytes:
    return content[: _place(rng, content)]


def _insert(rng: random.Random, content: bytes) -> bytes:
    place = _place(rng, content)
    return content[:place] + rng.choice([rng.randbytes(rng.randrange(1, 9)), *_RAW]) + content[place:]


def _duplicate(rng: random.Random, content: bytes) -> bytes:
    start, end = sorted((_place(rng, content), _place(rng, content)))
    return content[:end] + content[start:end] * rng.choice((1, 2, 50)) + content[end:]


def _remove(rng: random.Random, content: bytes) -> bytes:
    start, end = sorted((_place(rng, content), _place(rng, content)))
    return content[:start] + content[end:]


def _number(rng: random.Random, content: bytes) -> bytes:
    """Overwrites one to eight bytes with a whole number at a border, in either order of bytes."""
    place, form = _place(rng, content), rng.choice("BHIQ")
    number = struct.pack(rng.choice("<>") + form, rng.choice(_NUMBERS) % 2 ** (8 * struct.calcsize(form)))
    return content[:place] + number + content[place + len(number) :]


_DAMAGE = (_flip, _flip, _truncate, _insert, _duplicate, _remove, _number, _number)


def _change(rng: random.Random, value: Any) -> Any:
    """A JSON value with one value in it replaced, removed, copied to another key, or nested deeply."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        how = rng.random()
        if how < 0.1:
            return {name: inner for name, inner in value.items() if name != key}
        if how < 0.2:
            return value | {rng.choice([*value, *_TEXTS]): value[key]}
        return value | {key: _change(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.9:
        place = rng.randrange(len(value))
        how = rng.random()
        if how < 0.1:
            return value[:place] + value[place + 1 :]
        if how < 0.2:
            return value[:place] + [value[place]] * rng.choice((2, 100)) + value[place:]
        return [*value[:place], _change(rng, value[place]), *value[place + 1 :]]
    other = rng.choice((rng.choice(_VALUES), rng.choice(_TEXTS), rng.choice(_NUMBERS), [value], {"a": value}))
    if rng.random() < 0.05:
        for _ in range(900):
            other = [other]
    return other
