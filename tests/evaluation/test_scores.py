"""Scores of benchmarks, worked out by hand, and groups of which one record is broken."""

import math

import pytest

from ross_jax.evaluation import scores
from ross_jax.evaluation.benchmarks import BENCHMARKS, MODELS, score
from ross_jax.evaluation.questions import Broken
from ross_jax.evaluation.scores import Answered


def record(index, prediction, *answers, choices="", **fields):
    options = dict(zip("ABCD", choices.split(), strict=False))
    return Answered(str(index), "", prediction, answers, options, fields)


def test_pope():
    """Unknown answers are wrong, and count as no for F1. A record of two splits counts in both."""
    found = scores.yes_no(
        [
            record(0, "Yes.", "Yes", category="random,popular"),
            record(1, "no", "Yes", category="random"),
            record(2, "maybe", "No", category="random"),
            record(3, "yes", "No", category="popular"),
        ]
    )
    assert found["category/random/accuracy"] == pytest.approx(100 / 3)
    assert found["category/random/f1"] == pytest.approx(100 * 2 / 3)
    assert found["category/popular/precision"] == 50
    assert found["accuracy"] == pytest.approx(100 * 2 / 5) and found["yes_ratio"] == pytest.approx(100 * 3 / 5)
    assert found["unknown"] == 20 and found["accuracy_lmms"] == 0


def test_hallusion():
    """Figures: 0 is all right, 1 is not. Questions: 1 is all right, 0 is not."""
    found = scores.hallusion(
        [
            record("VD_x_y_0_0_0", "Yes", "Yes", **{"l2-category": "map"}),
            record("VD_x_y_0_0_1", "No", "No", **{"l2-category": "map"}),
            record("VD_x_y_0_1_0", "Yes", "No", **{"l2-category": "map"}),
            record("VD_x_y_0_1_1", "No", "no", **{"l2-category": "map"}),
        ]
    )
    assert (found["aAcc"], found["fAcc"], found["qAcc"]) == (75, 50, 50)


def test_circular():
    """Every rotation must be right; which is the first one is told by `g_index`, or by the index."""
    rows = [
        record(1, "A", "A", choices="x y"),
        record(1000001, "B", "B", choices="y x"),
        record(2, "A", "A", choices="x y"),
        record(1000002, "A", "B", choices="y x"),
        record(3, "x", "A", choices="x y"),
    ]
    found = scores.circular(rows)
    assert found["accuracy"] == pytest.approx(100 * 2 / 3) and found["accuracy_first"] == 100


def test_open_questions_of_mmmu():
    rows = [
        record(0, "It is 24.", "24", split="validation"),
        record(1, "12", "24", "24.0", split="validation"),
        record(2, "B", "B", choices="x y", split="dev"),
    ]
    found = scores.mmmu(rows)
    assert found["split/validation/accuracy"] == 50 and found["split/dev/accuracy"] == 100


def test_pairs_of_mmvp():
    """The third pair has one answer only, so it is left out."""
    rows = [record(i, text, "A", choices="open closed") for i, text in enumerate(["A", "open", "(a)", "b", "A"], 1)]
    result = score(BENCHMARKS["mmvp"], rows)
    assert result.scores == {"pairs": 50, "accuracy": 75, "pairs_vlmeval": 50, "accuracy_vlmeval": 50}
    assert result.left_out == 1


def test_several_accepted_answers():
    assert scores.document([record(0, "12 km", "twelve", "12 km")])["anls"] == 100
    assert scores.exact([record(0, " blue ", "azure", "blue"), record(1, "Blue", "blue")])["accuracy"] == 50
    assert scores.chart([record(0, "10.4", "10", split="test_human")])["split/test_human/accuracy"] == 100
    rows = [record(0, "y = x ^ 2", "x^2", category=scores.FORMULAS), record(1, "hello", "world", "HELLO")]
    assert scores.ocr(rows)["score"] == 2


def test_a_broken_record_leaves_its_group_out():
    rows = [record(1, "A", "A", choices="x y"), record(2, "A", "A", choices="x y"), record(1000002, "B", "A")]
    result = score(BENCHMARKS["mmbench_en"], rows, [Broken("x", "no image", "1000001")])
    assert result.scores["accuracy"] == 0 and result.left_out == 1
    assert result.scores["accuracy_first"] == 100
    alone = score(BENCHMARKS["ai2d"], rows[:2], [Broken("x", "no image", "9")])
    assert alone.left_out == 0 and alone.scores["accuracy"] == 100


def test_nothing_to_score():
    assert score(BENCHMARKS["pope"], []).scores == {}
    assert math.isnan(scores.percent([]))


def test_every_benchmark_is_whole():
    for benchmark in BENCHMARKS.values():
        assert len(benchmark.paper) in (0, len(MODELS)) and benchmark.files and benchmark.title
