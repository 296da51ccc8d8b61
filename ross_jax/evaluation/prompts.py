"""Prompts of benchmarks, word for word as the reference and lmms-eval build them. Images stand before the prompt.

Each function takes a `Question` and returns the text. README.md says which benchmark has which.
"""

import re
from collections.abc import Callable

from ross_jax.evaluation.questions import Question

Prompt = Callable[[Question], str]


def bare(question: Question) -> str:
    """The question alone."""
    return question.question


def one_word_or_phrase(question: Question) -> str:
    """The question, to be answered with a word or phrase."""
    return f"{question.question}\nAnswer the question using a single word or phrase."


def one_word(question: Question) -> str:
    """The question, to be answered with a word (ChartQA)."""
    return f"{question.question}\nAnswer the question with a single word."


def with_ocr(question: Question) -> str:
    """The question after its recognised words, if the file has them (TextVQA)."""
    words = f"\nReference OCR token: {', '.join(question.ocr_tokens)}" if question.ocr_tokens else ""
    text = question.question.capitalize()
    return f"{text}{words}\nAnswer the question using a single word or phrase."


def choice(question: Question) -> str:
    """Hint, question and options, to be answered with a letter; in Chinese if any of them is."""
    lines = [question.hint] if question.hint is not None else []
    lines += [question.question, *(f"{letter}. {text}" for letter, text in question.choices.items())]
    text = "\n".join(lines)
    chinese = re.search("[\u4e00-\u9fff]", text)
    if question.choices:
        end = "请直接回答选项字母。" if chinese else "Answer with the option's letter from the given choices directly."
    else:
        end = "请直接回答问题。" if chinese else "Answer the question directly."
    return f"{text}\n{end}"


def mmvp(question: Question) -> str:
    """Question and options, to be answered with a letter."""
    options = "".join(f"\n{letter}. {text}" for letter, text in question.choices.items())
    end = "Answer with the option's letter from the given choices directly."
    return f"{question.question} Options:{options}\n{end}"
