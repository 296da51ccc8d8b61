"""Readers of benchmark files: each published format, and one line for each kind of broken record."""

import base64
import io
import json

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from ross_jax.config import UserError
from ross_jax.evaluation import prompts
from ross_jax.evaluation.benchmarks import BENCHMARKS, find_benchmark, find_files, load_questions
from ross_jax.evaluation.questions import read_questions


def png(value: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def text(value: int = 0) -> str:
    return base64.b64encode(png(value)).decode()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table(path, *rows):
    quoted = ["\t".join('"' + str(cell).replace('"', '""') + '"' for cell in row) for row in rows]
    path.write_text("\n".join(quoted) + "\n")
    return path


def test_vlmevalkit_table(tmp_path):
    """Base64, an image of another row, several images, missing options, quotes, and a row without an image."""
    path = table(
        tmp_path / "AI2D_TEST.tsv",
        ("index", "question", "hint", "A", "B", "C", "answer", "category", "image"),
        (0, 'What is "it"?\nSay.', "", "cat", "None", "5", "C", "x", text(1)),
        (1, "And?", "Look.", "cat", "dog", "", "A", "x", "0"),
        (2, "Both?", "", "a", "b", "", "B", "y", str([text(1), text(2)])),
        (3, "None?", "", "a", "b", "", "B", "y", ""),
    )
    found = read_questions([path])
    first, second, third = found.questions
    assert (found.skipped, found.broken) == (1, [])
    assert first.choices == {"A": "cat", "C": "5"} and first.answers == ("C",) and first.fields["category"] == "x"
    assert second.images[0].read() == png(1) and second.hint == "Look."
    assert [image.read() for image in third.images] == [png(1), png(2)]
    expected = 'What is "it"?\nSay.\nA. cat\nC. 5\nAnswer with the option\'s letter from the given choices directly.'
    assert prompts.choice(first) == expected
    assert prompts.choice(second).startswith("Look.\nAnd?\nA. cat\nB. dog\n")


def test_chinese_prompts(tmp_path):
    path = table(
        tmp_path / "x.tsv", ("index", "question", "A", "B", "answer", "image"), (0, "What?", "猫", "b", "A", text())
    )
    assert prompts.choice(read_questions([path]).questions[0]).endswith("\nB. b\n请直接回答选项字母。")
    path = table(tmp_path / "y.tsv", ("index", "question", "answer", "image"), (0, "什么?", "A", text()))
    assert prompts.choice(read_questions([path]).questions[0]) == "什么?\n请直接回答问题。"


def test_pope_files(tmp_path):
    """JSON lines in files named .json, one for each split; indices repeat among them."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png(3))
    row = {"question_id": 1, "image": "a.png", "text": "Is there a dog?", "label": "yes"}
    for split in ("random", "popular"):
        write(tmp_path / f"coco_pope_{split}.json", [row, row | {"question_id": 2, "label": "no"}])
    found = read_questions(find_files("pope", tmp_path)).questions
    assert [question.fields["category"] for question in found] == ["popular"] * 2 + ["random"] * 2
    assert [question.answers for question in found] == [("yes",), ("no",)] * 2
    assert found[0].images[0].read() == png(3) and prompts.bare(found[0]) == "Is there a dog?"


def test_mmvp_folder(tmp_path):
    folder = tmp_path / "MMVP"
    (folder / "MMVP Images").mkdir(parents=True)
    for number in (1, 2):
        (folder / "MMVP Images" / f"{number}.jpg").write_bytes(png(number))
    rows = [f"{number},Is it open?,(a) Open (b) Closed,({letter})\n" for number, letter in ((1, "a"), (2, "b"))]
    (folder / "Questions.csv").write_text("lndex,Question,Options,Correct Answer\n" + "".join(rows))
    first, second = read_questions(find_files("mmvp", tmp_path)).questions
    assert first.choices == {"A": "Open", "B": "Closed"} and (first.answers, second.answers) == (("A",), ("B",))
    assert first.fields["pair"] == second.fields["pair"] and second.images[0].read() == png(2)
    end = "Answer with the option's letter from the given choices directly."
    assert prompts.mmvp(first) == f"Is it open? Options:\nA. Open\nB. Closed\n{end}"


def test_parquet(tmp_path):
    rows = {
        "question_id": ["7"],
        "question": ["what is it?"],
        "answers": [["a", "b"]],
        "ocr_tokens": [["STOP", "12"]],
        "image": [{"bytes": png(5), "path": None}],
    }
    parquet.write_table(pyarrow.table(rows), tmp_path / "textvqa.parquet")
    question = read_questions([tmp_path / "textvqa.parquet"]).questions[0]
    assert question.answers == ("a", "b") and question.images[0].read() == png(5)
    assert prompts.with_ocr(question) == (
        "What is it?\nReference OCR token: STOP, 12\nAnswer the question using a single word or phrase."
    )


def test_json_layouts(tmp_path):
    """LLaVA's conversations, `{"data": [...]}` of DocVQA, `{index: record}` of GQA, and options as a list."""
    turns = [{"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt", "value": "two"}]
    own = tmp_path / "exact.json"
    own.write_text(json.dumps([{"id": "a", "image": "a.png", "conversations": turns, "type": "count"}]))
    question = read_questions([own]).questions[0]
    assert (question.question, question.answers, question.fields["type"]) == ("How many?", ("two",), "count")
    doc = tmp_path / "docvqa.json"
    doc.write_text(json.dumps({"data": [{"questionId": 5, "question": "Q?", "answers": ["x", "y"], "image": "b.png"}]}))
    assert read_questions([doc]).questions[0].answers == ("x", "y")
    gqa = tmp_path / "gqa.json"
    gqa.write_text(json.dumps({"07": {"question": "Q?", "answer": "yes", "imageId": "n1"}}))
    question = read_questions([gqa]).questions[0]
    assert question.index == "07" and question.images[0].name.endswith("image n1")
    listed = write(tmp_path / "seed.jsonl", [{"id": 1, "question": "Q?", "options": ["x", "y"], "answer": "B"}])
    assert read_questions([listed]).questions[0].choices == {"A": "x", "B": "y"}


def test_broken_records_are_named(tmp_path):
    path = tmp_path / "exact.jsonl"
    good = {"id": 1, "question": "Q?", "answer": "x"}
    lines = [json.dumps(good), "{", json.dumps([1]), json.dumps({"id": 2, "question": "Q?"})]
    lines += [json.dumps({"id": 3, "answer": "x"}), json.dumps(good), json.dumps({"question": "Q?", "answer": "x"})]
    path.write_text("\n".join(lines))
    found = read_questions([path])
    assert [question.index for question in found.questions] == ["1", "6"]
    assert [broken.place.removeprefix(f"{path}, ") for broken in found.broken] == [f"line {i}" for i in range(2, 7)]
    reasons = ["corrupt JSON", "expected an object", "no answer", "no question", "has come before"]
    assert all(reason in broken.reason for reason, broken in zip(reasons, found.broken, strict=True))


def test_indices_that_a_benchmark_cannot_use(tmp_path):
    rows = [{"id": "x", "question": "Q?", "A": "1", "B": "2", "answer": "A"}]
    with pytest.raises(UserError, match="question x: MMBench EN needs indices that are numbers"):
        load_questions("mmbench_en", [write(tmp_path / "a.jsonl", rows)])
    found = load_questions("mmbench_en", [write(tmp_path / "a.jsonl", [*rows, rows[0] | {"id": 5}])])
    assert [question.index for question in found.questions] == ["5"] and len(found.broken) == 1


def test_images_that_cannot_be_read(tmp_path):
    rows = [("index", "question", "answer", "image"), (0, "Q?", "x", "?" * 100), (1, "Q?", "x", "../a.png")]
    questions = read_questions([table(tmp_path / "POPE.tsv", *rows, (2, "Q?", "x", "b.png"))]).questions
    for question, reason in zip(questions, ("no base64", "inside the folder", "not found in"), strict=True):
        with pytest.raises(UserError, match=reason):
            question.images[0].read()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.tsv", b"index\tquestion\n\xff\t1\n", "no UTF-8 table"),
        ("a.json", b"[1", "corrupt JSON"),
        ("a.json", b"5", "expected a list of questions"),
        ("a.jsonl", b"", "no question in it"),
        ("a.jsonl", b'{"id": 1}', "no question in it; the first of 1 broken records"),
        ("a.tsv", b"\x1f\x8b123", "compressed with gzip"),
        ("a.parquet", b"PAR1", "no Parquet file"),
        ("a.xlsx", b"", "expected a file that ends in"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=reason):
        read_questions([tmp_path / name])


def test_names_and_files(tmp_path):
    with pytest.raises(UserError, match=r"benchmark 'pop': unknown \(did you mean 'pope'\?\)"):
        find_benchmark("pop")
    with pytest.raises(UserError, match=r"no file of pope; expected POPE\.tsv"):
        find_files("pope", tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        find_files("pope", tmp_path / "x")
    for benchmark in BENCHMARKS.values():
        (tmp_path / f"{benchmark.files[0]}.tsv").touch()
    assert all(find_files(name, tmp_path) for name in BENCHMARKS)
