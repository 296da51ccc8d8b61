"""Rules by which a model's answer counts as right, as the public harnesses and the reference's scripts have them.

    read_yes_no("Yes, there is.")                       "Yes"
    read_choice("(B) because ...", {"A": "cat", ...})   "B"
    anls("29 %", ["29%"])                               0.75

Each rule follows one program to the letter, odd corners included, so that its numbers can be compared. README.md lists
the programs. Answers are what the model wrote, without surrounding white space.
"""

import functools
import re
import string
from collections.abc import Mapping, Sequence
from typing import Literal

Rule = Literal["paper", "vlmeval"]
"""`paper`: the programs with which the paper was scored. `vlmeval`: ms-vlmeval 0.0.20, where it differs."""

REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_NO_ANSWER = "Failed to obtain answer via API"
_CHOICE_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LAST_WORDS = 4

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_MOST_PERIODS = 32  # both programs pass re.UNICODE, which is 32, as the number of replacements
_ARTICLES = ("a", "an", "the")
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(i) for i, word in enumerate(_DIGITS)} | {"none": "0"}
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def read_yes_no(answer: str) -> str:
    """`Yes`, `No` or `Unknown`: the one of the words yes and no that the answer has."""
    words = strip_punctuation(answer.lower()).split()
    yes, no = "yes" in words, "no" in words
    return "Unknown" if yes == no else "Yes" if yes else "No"


def read_choice(answer: str, choices: Mapping[str, str], rule: Rule) -> str | None:
    """The letter that the answer chooses, `Z` for a refusal, None if it chooses nothing.

    A letter that stands alone counts if it is the only one; with the rule `vlmeval`, only among the last four words.
    Otherwise the answer chooses the one option whose text it contains, unless it is more than twice as long as all
    options together.
    """
    return _lone_letter(answer, choices, rule) or _named_option(answer, choices)


def _lone_letter(answer: str, choices: Mapping[str, str], rule: Rule) -> str | None:
    if _NO_ANSWER in answer:
        return None
    if any(refusal in answer for refusal in REFUSALS):
        return "Z"
    words = answer.translate(_CHOICE_MARKS).split()
    found = [letter for letter in choices if letter in words]
    if not found and "Z" in words:
        return "Z"
    if len(found) != 1 or (rule == "vlmeval" and words.index(found[0]) < len(words) - _LAST_WORDS):
        return None
    return found[0]


def _named_option(answer: str, choices: Mapping[str, str]) -> str | None:
    answer = answer.lower()
    if len(answer) > 2 * sum(map(len, choices.values())):
        return None
    found = [letter for letter, text in choices.items() if text.lower() in answer]
    return found[0] if len(found) == 1 else None


def is_mmvp_choice(answer: str, letter: str, text: str) -> bool:
    """Whether an answer names the right option of MMVP, by its letter or by its whole text, case ignored.

    What follows the last `answer is` or `answer:` counts, without `.:,` at the end and brackets around it.
    """
    answer = answer.lower().strip()
    for words in ("answer is", "answer is:", "answer:"):
        answer = answer.rsplit(words, 1)[-1]
    answer = answer.strip().rstrip(".:,").lstrip("(").rstrip(")")
    return answer in (letter.lower(), text.lower())


def relaxed(answer: str, target: str) -> bool:
    """Whether a number is within 5 % of the target, or, where one is no number, whether the texts are the same.

    `12%` is 0.12. A target of 0 is compared as text. Case is ignored.
    """
    found, expected = _number(answer), _number(target)
    if found is not None and expected:
        return abs(found - expected) / abs(expected) <= 0.05
    return answer.lower() == target.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def anls(answer: str, targets: Sequence[str], threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity to the nearest target; 0 below the threshold.

    Case and the amount of white space are ignored in the distance, but the length that divides it counts every
    character.
    """

    def distance(target: str) -> float:
        length = max(len(target.upper()), len(answer.upper()))
        return _edits(_squeezed(target), _squeezed(answer)) / length if length else 0.0

    similarity = 1 - min(map(distance, targets))
    return similarity if similarity >= threshold else 0.0


def _squeezed(text: str) -> str:
    return " ".join(text.lower().split())


def _edits(first: str, second: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def vqa_accuracy(answer: str, targets: Sequence[str], rule: Rule) -> float:
    """Agreement with the people who answered: 1 if three others than the one left out gave this answer.

    The mean over leaving out each person once, after both sides were normalised.
    """
    answer, people = normalise_vqa(answer, rule), [normalise_vqa(target, rule) for target in targets]
    same = people.count(answer)
    scores = [min(1, float(same - (person == answer)) / 3) for person in people]
    return sum(scores) / len(scores)


def normalise_vqa(text: str, rule: Rule) -> str:
    """Text as the VQA evaluation compares it: without articles and punctuation, with digits for numbers up to ten."""
    if rule == "paper":
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    text = strip_punctuation(text, r"\.(?!\d)" if rule == "paper" else r"(?<!\d)\.(?!\d)")
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    table = contractions()
    return " ".join(table.get(word, word) for word in words if word not in _ARTICLES)


def strip_punctuation(text: str, period: str = r"(?<!\d)\.(?!\d)") -> str:
    """Text without punctuation. A mark inside a word becomes a space, unless it also stands at a word's edge.

    Args:
      period: pattern of the periods that go; the first 32 do.
    """
    result, commas = text, re.search(r"\d,\d", text)
    for mark in _PUNCTUATION:
        edge = f"{mark} " in text or f" {mark}" in text or commas
        result = result.replace(mark, "" if edge else " ")
    return re.sub(period, "", result, count=_MOST_PERIODS)


@functools.cache
def contractions() -> dict[str, str]:
    """Misspelt contraction -> contraction. A misspelling lacks one apostrophe."""
    places = ((word, i) for word in _CONTRACTIONS.split() for i, sign in enumerate(word) if sign == "'")
    return {word[:i] + word[i + 1 :]: word for word, i in places} | {"somebody'd": "somebodyd"}


def same_text(answer: str, target: str, rule: Rule) -> bool:
    """Whether texts are equal but for case. `paper` also ignores ASCII punctuation, `vlmeval` surrounding space."""
    if rule == "vlmeval":
        return answer.strip().lower() == target.strip().lower()
    without = str.maketrans("", "", string.punctuation)
    return answer.lower().translate(without) == target.lower().translate(without)


def contains(answer: str, targets: Sequence[str], formula: bool) -> bool:
    """Whether the answer contains one of the targets (OCRBench). Case is ignored, in formulas all spaces instead."""

    def plain(text: str) -> str:
        text = text if formula else text.lower()
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if formula else text

    return any(plain(target) in plain(answer) for target in targets)
