"""Benchmark files of the demo: perfect answers are perfect in every format, and wrong ones in none."""

import json

import pytest
from PIL import Image

from ross_jax.demo.benchmarks import main, write_benchmarks
from ross_jax.demo.questions import ANSWERS
from ross_jax.evaluation.benchmarks import find_benchmark, find_files, load_questions, score
from ross_jax.evaluation.scores import Answered


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    (data / "images").mkdir()
    records = []
    for i in range(4):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(data / "images" / f"{i}.png")
        for kind, answers in ANSWERS.items():
            turns = [{"from": "human", "value": f"<image>\nWhat {kind}?"}, {"from": "gpt", "value": ""}]
            record = {"id": f"{kind}{i}", "image": f"{i}.png", "conversations": turns, "type": kind}
            records.append(record | {"answer": answers[i % len(answers)]})
    (data / "heldout.json").write_text(json.dumps(records))
    write_benchmarks(data, data / "benchmarks")
    return data / "benchmarks"


COUNTS = {"exact": 36, "ai2d": 20, "mmbench_en": 24, "hallusionbench": 4, "mmvp": 4, "pope": 4}


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_perfect_and_wrong_answers(folder, name, count):
    paths = [path for path in find_files(name, folder) if path.suffix != ".parquet"]
    found = load_questions(name, paths)
    assert len(found.questions) == count and not found.broken
    assert all(question.images[0].read() for question in found.questions)
    benchmark = find_benchmark(name)
    for right in (True, False):
        answers = [
            Answered(
                each.index,
                "",
                each.choices.get(each.answers[0], each.answers[0]) if right else "nothing",
                each.answers,
                each.choices,
                each.fields,
            )
            for each in found.questions
        ]
        assert score(benchmark, answers).scores[benchmark.metric] == (100 if right else 0)


def test_no_data_ends_in_one_line(tmp_path, capsys):
    assert main([str(tmp_path), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'heldout.json'}: ")


def test_the_same_questions_in_parquet(folder):
    lines, embedded = (load_questions("pope", [folder / name]) for name in ("coco_pope_random.json", "pope.parquet"))
    assert [(q.question, q.answers) for q in lines.questions] == [(q.question, q.answers) for q in embedded.questions]
    for ours, theirs in zip(lines.questions, embedded.questions, strict=True):
        assert ours.images[0].read() == theirs.images[0].read()
