"""Rules of matching, against answers worked out by hand from the programs that the rules follow."""

import pytest

from ross_jax.evaluation import matching

OPTIONS = {"A": "cat", "B": "black dog", "C": "猫"}


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("Yes", "Yes"),
        ("no.", "No"),
        ("Yes, there is a dog.", "Yes"),
        ("There is no dog", "No"),
        ("yes or no", "Unknown"),
        ("", "Unknown"),
        ("I cannot tell", "Unknown"),
        ("not at all", "Unknown"),
        ("是", "Unknown"),
        ("yes/no", "Unknown"),
        ("Yes。", "Unknown"),
    ],
)
def test_yes_and_no(answer, read):
    assert matching.read_yes_no(answer) == read


@pytest.mark.parametrize(
    ("answer", "paper", "vlmeval"),
    [
        ("B", "B", "B"),
        ("(B)", "B", "B"),
        ("[B].", "B", "B"),
        ("The answer is B.", "B", "B"),
        ("b", None, None),
        ("black dog", "B", "B"),
        ("It is the Black Dog", "B", "B"),
        ("猫", "C", "C"),
        ("A or B", None, None),
        ("cat and black dog", None, None),
        ("A. because it is very small", "A", None),
        ("B: the black dog is there", "B", "B"),
        ("", None, None),
        ("I'm sorry, but without the image provided", "Z", "Z"),
        ("Z", "Z", "Z"),
        ("D", None, None),
        ("A very long answer about some other matter that never comes to an end", "A", None),
    ],
)
def test_choices(answer, paper, vlmeval):
    assert matching.read_choice(answer, OPTIONS, "paper") == paper
    assert matching.read_choice(answer, OPTIONS, "vlmeval") == vlmeval


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("(a)", True),
        ("A.", True),
        ("Answer: (A)", True),
        ("open", True),
        ("Open.", True),
        ("A. Open", False),
        ("", False),
    ],
)
def test_mmvp(answer, right):
    assert matching.is_mmvp_choice(answer, "A", "Open") == right


@pytest.mark.parametrize(
    ("answer", "target", "right"),
    [
        ("105", "100", True),
        ("105.1", "100", False),
        ("95", "100", True),
        ("12%", "0.12", True),
        ("12", "12%", False),
        ("12.5 %", "12.5%", True),
        ("$12", "12", False),
        ("12 km", "12", False),
        ("0.0", "0", False),
        ("0", "0", True),
        ("3,000", "3,000", True),
        ("3000", "3,000", False),
        ("Yes", "yes", True),
        ("", "yes", False),
        ("nan", "5", False),
    ],
)
def test_relaxed_numbers(answer, target, right):
    assert matching.relaxed(answer, target) == right


@pytest.mark.parametrize(
    ("answer", "targets", "score"),
    [
        ("29%", ["29%"], 1.0),
        ("29 %", ["29%"], 0.75),
        ("  HELLO   world", ["hello world"], 1.0),
        ("kitten", ["sitting", "mitten"], 5 / 6),
        ("abcd", ["abxy"], 0.5),
        ("abcd", ["axyz"], 0.0),
        ("", ["a"], 0.0),
    ],
)
def test_anls(answer, targets, score):
    assert matching.anls(answer, targets) == pytest.approx(score)


def test_agreement_with_people():
    people = ["stop"] * 3 + ["Stop sign"] * 7
    assert matching.vqa_accuracy("stop", people, "paper") == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert matching.vqa_accuracy("The stop sign!", people, "vlmeval") == 1.0
    assert matching.vqa_accuracy("", people, "paper") == 0.0


@pytest.mark.parametrize(
    ("text", "paper", "vlmeval"),
    [
        ("The two dogs.", "2 dogs", "2 dogs"),
        ("dont", "don't", "don't"),
        ("3,000", "3000", "3000"),
        ("U.S.A.", "usa", "usa"),
        ("7. done", "7 done", "7. done"),
        ("John's", "john 's", "john's"),
        ("well-known", "well known", "well known"),
        ("none", "0", "0"),
    ],
)
def test_normalised_text(text, paper, vlmeval):
    assert matching.normalise_vqa(text, "paper") == paper
    assert matching.normalise_vqa(text, "vlmeval") == vlmeval


def test_same_text():
    assert matching.same_text("Left.", "left", "paper") and not matching.same_text("Left.", "left", "vlmeval")
    assert not matching.same_text("the left", "left", "paper")


def test_contained_text():
    assert matching.contains("It says HELLO\nworld", ["hello world"], formula=False)
    assert matching.contains("x ^ 2", ["x^2"], formula=True) and not matching.contains("X^2", ["x^2"], formula=True)
    assert not matching.contains("", ["a"], formula=False)
