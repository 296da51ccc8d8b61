"""The demo's data set: each stored answer equals the answer computed from the stored pixels."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ross_jax.config import UserError
from ross_jax.data.archives import open_store
from ross_jax.demo import photographs
from ross_jax.demo.dataset import DatasetConfig, write_dataset
from ross_jax.demo.photographs import PHOTOGRAPHS, Photograph, load_photographs
from ross_jax.demo.questions import ANSWERS, BRIGHTNESS_MARGIN, colour_name
from ross_jax.demo.scenes import COLOURS, QUARTERS

SMALL = DatasetConfig(pretrain=80, finetune=300, heldout_per_type=24)
pytest.importorskip("skimage", reason="the `demo` extra is not installed")
pytest.importorskip("sklearn", reason="the `demo` extra is not installed")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "data"
    assert write_dataset(folder, SMALL)
    return folder


def read(folder: Path, name: str):
    return json.loads((folder / f"{name}.json").read_text())


def questions(folder: Path):
    """Yields (question, answer, image) of each question in `finetune.json` and `heldout.json`."""
    for name in ("finetune", "heldout"):
        for record in read(folder, name):
            pixels = np.asarray(Image.open(folder / "images" / record["image"]))
            turns = record["conversations"]
            for human, gpt in zip(turns[::2], turns[1::2], strict=True):
                yield human["value"].removeprefix("<image>\n"), gpt["value"], pixels


def find_marks(pixels: np.ndarray) -> dict[str, tuple[str, np.ndarray]]:
    """Quarter -> (colour, filled pixels of the mark's bounding box), found by exact colours."""
    found = {}
    for i, quarter in enumerate(QUARTERS):
        row, column = divmod(i, 2)
        area = pixels[row * 32 : row * 32 + 32, column * 32 : column * 32 + 32]
        for colour, value in COLOURS.items():
            filled = (area == np.array(value, np.uint8)).all(axis=-1)
            if filled.sum() >= 60:  # photographs hold fewer pixels of a mark's colour
                assert quarter not in found
                rows, columns = np.flatnonzero(filled.any(1)), np.flatnonzero(filled.any(0))
                found[quarter] = colour, filled[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return found


def shape_of(filled: np.ndarray) -> str:
    """Square, circle, cross or arrow, from the corners and edges of the bounding box."""
    size = filled.shape[0]
    if filled.mean() > 0.97:
        return "square"
    quarter_turn = (filled == np.rot90(filled)).all() if filled.shape[0] == filled.shape[1] else False
    if quarter_turn:
        return "circle" if filled[size // 4, size // 4] else "cross"
    return "arrow"


def direction_of(filled: np.ndarray) -> str:
    """The side with the arrow's tip, which is narrower than the other end."""
    rows, columns = filled.sum(axis=1), filled.sum(axis=0)
    if (filled == filled[:, ::-1]).all():  # symmetric arrows point up or down
        return "up" if rows[0] < rows[-1] else "down"
    return "left" if columns[0] < columns[-1] else "right"


def answer_from_pixels(question: str, pixels: np.ndarray) -> str:
    marks = find_marks(pixels)
    colours = [colour for colour, _ in marks.values()]
    where = {colour: quarter for quarter, (colour, _) in marks.items() if colours.count(colour) == 1}
    words = question.rstrip("?").split()
    if question.startswith("What colour"):
        return marks[" ".join(words[-2:])][0]
    if question.startswith("What shape"):
        return shape_of(marks[" ".join(words[-2:])][1])
    if question.startswith("How many"):
        return ("none", "one", "two", "three", "four")[len(marks)]
    if question.startswith("Where is"):
        return where[words[2]]
    if question.startswith("Where does"):
        (arrow,) = [filled for _, filled in marks.values() if shape_of(filled) == "arrow"]
        return direction_of(arrow)
    if question.startswith("Do both"):
        assert len(marks) == 2
        return "yes" if len(set(colours)) == 1 else "no"
    if question.startswith("Is "):
        sides = [where[words[i]].split()[1] for i in (1, 6)]
        assert len(set(sides)) == 2
        return sides[0]
    values = pixels.astype(float)
    if question.startswith("Which side"):
        return "left" if values[:, :32].sum() > values[:, 32:].sum() else "right"
    assert question.startswith("Which end")
    return "top" if values[:32].sum() > values[32:].sum() else "bottom"


def test_answers_are_in_the_stored_pixels(dataset):
    count = 0
    for question, answer, pixels in questions(dataset):
        assert pixels.shape == (64, 64, 3)
        assert answer_from_pixels(question, pixels) == answer, question
        count += 1
    assert count > 1000


def test_captions_tell_what_is_seen(dataset):
    orders = set()
    for record in read(dataset, "pretrain"):
        pixels = np.asarray(Image.open(dataset / "images" / record["image"]))
        marks = find_marks(pixels)
        human, gpt = record["conversations"]
        assert human["value"].startswith("<image>\n")
        sentences = gpt["value"].lower().rstrip(".").split(". ")
        expected = set()
        for i, quarter in enumerate(QUARTERS):
            row, column = divmod(i, 2)
            area = pixels[row * 32 : row * 32 + 32, column * 32 : column * 32 + 32]
            expected.add(f"{quarter} is {colour_name(area)}")
        for quarter, (colour, filled) in marks.items():
            pointing = f" pointing {direction_of(filled)}" if shape_of(filled) == "arrow" else ""
            name, place = f"a {colour} {shape_of(filled)}{pointing}", f"at the {quarter}"
            expected.add(f"{place} {name}" if f"{place} {name}" in sentences else f"{name} {place}")
        expected.add(("no marks", "one mark", "two marks", "three marks", "four marks")[len(marks)])
        halves = {"left": pixels[:, :32], "right": pixels[:, 32:], "top": pixels[:32], "bottom": pixels[32:]}
        light = {name: half.astype(float).mean() for name, half in halves.items()}
        for name, other in (("left", "right"), ("right", "left"), ("top", "bottom"), ("bottom", "top")):
            if light[name] - light[other] >= BRIGHTNESS_MARGIN:
                expected.add(f"{name} is brighter")
        assert set(sentences) == expected and len(sentences) == len(expected)
        orders.add(tuple(sentence[:8] for sentence in sentences))
    assert len(orders) > SMALL.pretrain * 0.9  # sentences are in random order


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((10, 10, 60), "dark blue"),
        ((250, 250, 245), "light grey"),
        ((0, 0, 0), "dark grey"),
        ((255, 0, 20), "light red"),
        ((120, 60, 0), "medium orange"),
        ((30, 120, 40), "medium green"),
    ],
)
def test_colour_names(rgb, name):
    assert colour_name(np.full((4, 4, 3), rgb, np.uint8)) == name


def test_answers_are_balanced(dataset):
    heldout = read(dataset, "heldout")
    assert Counter(record["type"] for record in heldout) == dict.fromkeys(ANSWERS, SMALL.heldout_per_type)
    for kind, answers in ANSWERS.items():
        counts = Counter(record["answer"] for record in heldout if record["type"] == kind)
        assert counts == dict.fromkeys(answers, SMALL.heldout_per_type // len(answers))
    trained = Counter(
        (tuple(q.split()[: 1 if q.startswith("Is") else 2]), answer) for q, answer, _ in questions(dataset)
    )
    for kind in {kind for kind, _ in trained}:
        counts = [count for (other, _), count in trained.items() if other == kind]
        assert max(counts) / sum(counts) < 1 / len(counts) + 0.12, kind


def test_photographs_are_in_one_part(dataset):
    train, heldout = (set(load_photographs(split)) for split in ("train", "heldout"))
    assert train.isdisjoint(heldout) and train | heldout == set(PHOTOGRAPHS)
    assert PHOTOGRAPHS["motorcycle_left"].split == PHOTOGRAPHS["motorcycle_right"].split
    for name, allowed in (("pretrain", train), ("finetune", train), ("heldout", heldout)):
        assert {record["source"] for record in read(dataset, name)} == allowed
    images = [{record["image"] for record in read(dataset, name)} for name in ("pretrain", "finetune", "heldout")]
    assert sum(map(len, images)) == len(set.union(*images)) == len(open_store(dataset / "images").names())


def test_same_bytes_every_time(dataset, tmp_path):
    write_dataset(tmp_path / "again", SMALL)
    files = sorted(path.relative_to(dataset) for path in dataset.rglob("*") if path.is_file())
    assert files == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    for file in files:
        assert (dataset / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_written_once_and_rewritten_for_other_settings(tmp_path):
    folder = tmp_path / "data"
    tiny = DatasetConfig(pretrain=2, finetune=3, heldout_per_type=6)
    assert write_dataset(folder, tiny)
    before = (folder / "finetune.json").stat().st_mtime_ns
    assert not write_dataset(folder, tiny)
    assert (folder / "finetune.json").stat().st_mtime_ns == before
    assert write_dataset(folder, dataclasses.replace(tiny, finetune=4))
    assert len(read(folder, "finetune")) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    other_seed = tmp_path / "other"
    write_dataset(other_seed, dataclasses.replace(tiny, finetune=4, seed=1))
    assert (other_seed / "finetune.json").read_bytes() != (folder / "finetune.json").read_bytes()


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="exists already"):
        write_dataset(tmp_path / "data", DatasetConfig(pretrain=1, finetune=1, heldout_per_type=6))
    assert (tmp_path / "data" / "mine.txt").read_text() == "x"


def test_missing_extra_is_explained(monkeypatch):
    monkeypatch.setitem(photographs.PHOTOGRAPHS, "x", Photograph("no_such_package", "x.png", "train"))
    with pytest.raises(UserError, match=r"no_such_package is not installed; run `pip install -e '.\[demo\]'`"):
        load_photographs("train")
    monkeypatch.setitem(photographs.PHOTOGRAPHS, "x", Photograph("skimage", "data/x.png", "train"))
    with pytest.raises(UserError, match=r"skimage has no data/x.png in this version"):
        load_photographs("train")


def test_sizes_must_be_positive():
    with pytest.raises(ValueError, match="finetune is 0"):
        DatasetConfig(finetune=0)


def test_labels_and_images_without_a_word(dataset, tmp_path):
    """`labels.json` is balanced over types and answers, and writing it leaves the rest of the data set unchanged."""
    folder = tmp_path / "data"
    assert write_dataset(folder, dataclasses.replace(SMALL, labels_per_type=8, unlabelled=3))
    labels = read(folder, "labels")
    assert Counter(record["type"] for record in labels) == dict.fromkeys(ANSWERS, 8)
    for kind, answers in ANSWERS.items():
        counts = Counter(record["answer"] for record in labels if record["type"] == kind)
        assert set(counts) == set(answers[:8]) and max(counts.values()) - min(counts.values()) <= 1
    photographs = {name: {record["source"] for record in read(folder, name)} for name in ("labels", "heldout")}
    assert not photographs["labels"] & photographs["heldout"]
    assert len(list((folder / "unlabelled").iterdir())) == 3
    for name in ("pretrain", "finetune", "heldout"):
        assert read(folder, name) == read(dataset, name)
    assert read(dataset, "labels") == [] and not list((dataset / "unlabelled").iterdir())
