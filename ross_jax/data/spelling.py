"""Names of files in several spellings: a record and a store often come from different systems.

A name has one of two Unicode forms ("é" is one character, or "e" and an accent), and forward slashes or backslashes.
Older programs store its bytes in the encoding of their country. Python shows these as surrogates, and in a zip file as
characters of code page 437.
"""

import contextlib
import os
import unicodedata
from collections.abc import Iterator

_ENCODINGS = ("utf-8", "cp1252", "cp437", "cp850", "gb18030", "shift_jis", "big5", "euc_kr", "cp1251")
_BRIEF = 100


def spellings(name: str) -> Iterator[str]:
    """Ways in which a store may spell a name, the name itself first."""
    return iter(dict.fromkeys(_spellings(name)))


def _spellings(name: str) -> Iterator[str]:
    yield name
    yield name.replace("\\", "/")
    yield name.replace("/", "\\")
    if name.isascii():
        return
    name = name.replace("\\", "/")
    for form in ("NFC", "NFD"):
        spelling = unicodedata.normalize(form, name)
        yield spelling
        for encoding in _ENCODINGS:
            with contextlib.suppress(UnicodeEncodeError):
                stored = spelling.encode(encoding)
                yield os.fsdecode(stored)
                yield stored.decode("cp437")
    for encoding in _ENCODINGS:  # the record, and not the store, shows an encoding's bytes as surrogates
        with contextlib.suppress(UnicodeError):
            yield os.fsencode(name).decode(encoding)


def briefly(name: str) -> str:
    """A name for a message: a long one without its middle, and printable characters only."""
    if len(name) > _BRIEF:
        name = f"{name[: _BRIEF // 2]}... ({len(name)} characters) ...{name[-_BRIEF // 4 :]}"
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in name)
