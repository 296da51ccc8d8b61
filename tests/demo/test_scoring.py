"""The demo's scores equal values computed by hand."""

import math

import numpy as np
import pytest
from PIL import Image

from ross_jax.config import UserError
from ross_jax.demo.figures import plot_losses
from ross_jax.demo.scoring import (
    format_accuracies,
    score_answers,
    standard_error,
)

CHOICES = {"side": ("left", "right"), "count": ("one", "two", "three", "four")}


def test_accuracy_of_each_type():
    types = ["side"] * 4 + ["count"] * 5
    answers = ["left", "left", "left", "right", "one", "two", "three", "four", "two"]
    predictions = ["left", " left ", "right", "right", "one", "two", "two", "four", "Two"]
    side, count = score_answers(types, answers, predictions, CHOICES)
    assert (side.type, side.count, side.accuracy, side.chance, side.most_frequent) == ("side", 4, 0.75, 0.5, 0.75)
    assert side.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert side.z == 0.0
    # Right answers 1 1 0 1 0, those of always "two" 0 1 0 0 1: differences have mean 1/5 and variance 3/5 - 1/25.
    assert (count.type, count.accuracy, count.most_frequent, count.chance) == ("count", 0.6, 0.4, 0.25)
    assert count.z == pytest.approx(0.2 / math.sqrt((3 / 5 - 1 / 25) / 5))


def test_extremes():
    (perfect,) = score_answers(
        ["side"] * 4, ["left", "left", "right", "right"], ["left", "left", "right", "right"], CHOICES
    )
    assert perfect.standard_error == 0.0 and perfect.z == pytest.approx(0.5 / math.sqrt(0.25 / 4))
    (single,) = score_answers(["side"], ["left"], ["right"], CHOICES)
    assert single.z == -math.inf
    (usual,) = score_answers(["side"] * 3, ["left", "left", "right"], ["left"] * 3, CHOICES)
    assert usual.z == 0.0 and usual.accuracy == usual.most_frequent


def test_nonsense_is_refused():
    with pytest.raises(UserError, match="2 types, 1 answers and 1 predictions"):
        score_answers(["side"] * 2, ["left"], ["left"], CHOICES)
    with pytest.raises(UserError, match="'side' with answer 'up'"):
        score_answers(["side"], ["up"], ["left"], CHOICES)
    with pytest.raises(UserError, match="'size' with answer 'left'"):
        score_answers(["size"], ["left"], ["left"], CHOICES)


def test_standard_error():
    assert standard_error(np.array([0.0, 0.0, 1.0, 1.0])) == pytest.approx(0.25)


def test_table():
    scores = score_answers(["side", "count"], ["left", "two"], ["left", "one"], CHOICES)
    lines = format_accuracies({"Ross": scores, "baseline": scores}).splitlines()
    assert [line.split()[0] for line in lines] == ["question", "side", "count", "mean"]
    assert lines[1].split()[:4] == ["side", "1", "0.500", "1.000"]
    assert "Ross" in lines[0] and "baseline" in lines[0]
    assert lines[-1].split() == ["mean", "2", "0.375", "1.000", "0.500", "0.500"]


def test_loss_curves(tmp_path):
    pytest.importorskip("matplotlib", reason="the `demo` extra is not installed")
    curves = {
        "text": {"Ross": ([1, 2, 3], [3.0, 2.0, 1.5]), "baseline": ([1, 2], [3.0, 2.5])},
        "images": {"Ross": ([1], [1.0])},
    }
    for name in ("a.png", "b.png"):
        plot_losses(tmp_path / name, curves)
    with Image.open(tmp_path / "a.png") as image:
        assert image.width > 800 and np.asarray(image).std() > 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
