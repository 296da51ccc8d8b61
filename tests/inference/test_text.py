"""The text of an answer whose tokens are characters, or bytes of them."""

import pytest

from ross_jax.inference.text import Answer

END = 256


class Bytes:
    """A tokenizer whose ids are bytes; `END` is a special token."""

    def decode(self, ids, skip_special_tokens=False):
        return b"".join(b"<end>" if i == END else bytes([i]) for i in ids).decode(errors="replace")


def stream(content: bytes, stop=(), ends: bool = True) -> tuple[list[str], str]:
    """Pieces and text of an answer that arrives byte by byte."""
    pieces: list[str] = []
    answer = Answer(Bytes(), (END,), stop, pieces.append)
    ids = [*content, *([END] if ends else [])]
    for count in range(1, len(ids) + 1):
        if answer.receive(ids[:count], count == len(ids)):
            break
    return pieces, answer.text


@pytest.mark.parametrize("ends", [True, False])
def test_characters_are_whole(ends):
    """Characters of one to four bytes arrive whole; white space at both ends is no part of the answer."""
    pieces, text = stream(" a é中 😀 \n".encode(), ends=ends)
    assert pieces == ["a", " é", "中", " 😀"] and text == "a é中 😀"


def test_a_stop_text_is_never_begun():
    """Nothing of a stop text is passed on, however its beginning repeats."""
    pieces, text = stream(b"ab-a-a-b-c", stop=["-a-b", "xyz"])
    assert text == "ab-a" == "".join(pieces)
    pieces, text = stream(b"ab-a-a", stop=["-a-b"])
    assert text == "ab-a-a" == "".join(pieces)


def test_the_first_of_several_stop_texts_counts():
    assert stream(b"one, two. three", stop=[".", ","])[1] == "one"


def test_an_answer_that_nobody_watches_is_decoded_at_its_end():
    answer = Answer(Bytes(), (END,))
    assert not answer.watched and not answer.receive([*b"ab"], False) and answer.text == ""
    assert not answer.receive([*b"ab c", END], True) and answer.text == "ab c"
