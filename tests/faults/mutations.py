"""Random damage to files: to their bytes, or to the values of JSON.

    mutate(rng, content, kind) -> content

    kind          damage
    bytes         to bytes
    json          to bytes, or to values of valid JSON
    safetensors   as json, to the header, whose length is right again
    png, tar      as bytes, but checksums are right again
    jinja         as bytes, or another piece of program
    pickle        as bytes, or more opcodes

Everything is a function of the random generator's state.
"""

import json
import pickletools
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

_NUMBERS = [0, 1, -1, 127, 255, 2**15, 2**31 - 1, -(2**31), 2**32 - 1, 2**63 - 1, -(2**63), 2**64 - 1]
_TEXTS = ["", "\0", "\ud800", "a" * 300, "../../etc/passwd", "/", "\ue000", "<image>" * 9, "9" * 5000, "%s{}", "é中😀"]
_VALUES: list[Any] = [None, True, False, 0.5, 1e308, -0.0, float("nan"), float("inf"), 10**400, [], {}, [[]], {"": 0}]
_RAW = [b"[" * 100_000, b"9" * 5000, b"\xff\xfe", b"\xed\xa0\x80", b"\0" * 64, b"null", b"-", b'"', b"{{", b"%}", b"\n"]
_PIECES: list[tuple[str, Any]] = [
    ("normalizer", {"type": "Replace", "pattern": {"String": ""}, "content": "abc"}),
    ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "//////8="}),
    ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "CAAAAP////8AAAAA"}),
    (
        "pre_tokenizer",
        {"type": "Split", "pattern": {"Regex": "(x+x+)+y|(.*)*"}, "behavior": "Removed", "invert": True},
    ),
    ("post_processor", {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "z", "type_id": 0}}]}),
    ("model", {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "[UNK]", "max_input_chars_per_word": 1}),
    ("model", {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": None}),
    ("continuing_subword_prefix", "é"),
    ("truncation", {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 5}),
    ("auto_map", {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}),
    ("tokenizer_class", "Mine"),
    ("chat_template", "{{ 'a' * 9999999999 }}"),
]
"""Fields of a tokenizer's files, with values of the right form that its readers do not bear."""
_PROGRAMS = (
    b"{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}",
    b"{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    b"{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}",
    b"{{ 'a' * 9999999999 }}",
    b"{{ 1 // 0 }}",
    b"{{ messages[9].x.y }}",
    b"{{ messages + 1 }}",
    b"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    b"{{ raise_exception('no') }}",
    b"{{ ''.__class__.__mro__ }}",
    b"{% include 'x' %}",
    b"{{ '%999999999d' % 1 }}",
    b"{{ 9 ** 9 ** 9 }}",
)
_OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]


def mutate(rng: random.Random, content: bytes, kind: str) -> bytes:
    """The content with one to four changes."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        content = _KINDS[kind](rng, content)
    return content


def _bytes(rng: random.Random, content: bytes) -> bytes:
    return rng.choice(_DAMAGE)(rng, content)


def _json(rng: random.Random, content: bytes) -> bytes:
    value = _parse(content) if rng.random() < 0.7 else None
    if value is None:
        return _bytes(rng, content)
    return json.dumps(_change(rng, value)).encode("utf-8", "surrogatepass")


def _safetensors(rng: random.Random, content: bytes) -> bytes:
    length = int.from_bytes(content[:8], "little")
    if length > len(content) or rng.random() < 0.3:
        return _bytes(rng, content)
    header = _json(rng, content[8 : 8 + length])
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def _png(rng: random.Random, content: bytes) -> bytes:
    content, fixed, start = _bytes(rng, content), content[:8], 8
    while start + 8 <= len(content):
        (size,) = struct.unpack_from(">I", content, start)
        chunk = content[start + 4 : start + 8 + size]
        fixed += struct.pack(">I", size) + chunk + struct.pack(">I", zlib.crc32(chunk))
        start += size + 12
    return fixed


def _tar(rng: random.Random, content: bytes) -> bytes:
    fixed = bytearray(_bytes(rng, content))
    for start in range(0, len(fixed) - 511, 512):
        if fixed[start + 257 : start + 262] == b"ustar":
            if rng.random() < 0.2:  # the member's size: a number in octal digits, or one with a sign
                negative = b"\xff" * 10 + struct.pack(">h", -512 * rng.randrange(4))
                number = rng.choice([b"%011o\0" % (rng.choice(_NUMBERS) % 2**33), negative])
                fixed[start + 124 : start + 136] = number
            fixed[start + 148 : start + 156] = b" " * 8
            fixed[start + 148 : start + 156] = b"%06o\0 " % sum(fixed[start : start + 512])
    return bytes(fixed)


def _jinja(rng: random.Random, content: bytes) -> bytes:
    if rng.random() < 0.5:
        return _bytes(rng, content)
    place = rng.choice([0, len(content), _place(rng, content)])
    return content[:place] + rng.choice(_PROGRAMS) + content[place:]


def _pickle(rng: random.Random, content: bytes) -> bytes:
    if rng.random() < 0.5:
        return _bytes(rng, content)
    place, opcodes = _place(rng, content), b"".join(rng.choices(_OPCODES, k=rng.randrange(1, 5)))
    return content[:place] + opcodes * rng.choice((1, 1, 1, 100_000)) + content[place:]


_KINDS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "bytes": _bytes,
    "json": _json,
    "safetensors": _safetensors,
    "png": _png,
    "tar": _tar,
    "jinja": _jinja,
    "pickle": _pickle,
}


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
    known = [piece for piece in _PIECES if isinstance(value, dict) and piece[0] in value]
    if known and rng.random() < 0.3:
        return value | dict([rng.choice(known)])
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
    other = rng.choice([*map(rng.choice, (_VALUES, _TEXTS, _NUMBERS)), [value], {"a": value}])
    for _ in range(rng.choice((60, 600)) if rng.random() < 0.05 else 0):
        other = [other]
    return other
