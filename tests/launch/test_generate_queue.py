"""The generation launcher: files of questions, and conversations."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from launcher import load_script
from ross_jax.inference.model import load

launcher = load_script("generate")


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    return tmp_path


def run(capsys, *args) -> tuple[int, str, str]:
    code = launcher.main([str(arg) for arg in args])
    return code, *capsys.readouterr()


def ask_file(capsys, model_folder, folder, lines, *more) -> tuple[int, str, str]:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "in.jsonl").write_text("\n".join(texts))
    files = ("--input", folder / "in.jsonl", "--output", folder / "out.jsonl")
    return run(capsys, "--checkpoint", model_folder, "--max-new-tokens", 4, *files, *more)


def answers(folder) -> dict:
    records = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert len({record["id"] for record in records}) == len(records)
    return {record["id"]: record["answer"] for record in records}


GOOD = [
    {"id": "one", "image": "a.png", "prompt": "What is it?"},
    {"id": 2, "prompt": "And this?", "image": ["a.png", "b.png"], "history": [["Hello?", "Yes."]]},
    {"id": 3, "prompt": "Say.", "max_new_tokens": 2, "temperature": 1.0, "seed": 5},
]


def test_files_are_answered_and_continued(model_folder, folder, capsys):
    """Answers are those of `Model.ask`. A half-written line is cut off, and only missing answers are computed."""
    code, _, _ = ask_file(capsys, model_folder, folder, GOOD, "--rows", 2)
    model = load(model_folder)
    a, b = folder / "a.png", folder / "b.png"
    expected = {
        "one": model.ask(a, "What is it?", max_new_tokens=4),
        2: model.ask([a, b], "And this?", history=[("Hello?", "Yes.")], max_new_tokens=4),
        3: model.ask([], "Say.", max_new_tokens=2, temperature=1.0, seed=5),
    }
    assert code == 0 and answers(folder) == expected
    (folder / "out.jsonl").write_text('{"id": "one", "answer": "kept"}\n{"id": 2, "ans')
    code, output, _ = ask_file(capsys, model_folder, folder, GOOD)
    assert code == 0 and answers(folder) == expected | {"one": "kept"}
    assert output == "2 answered, 1 answered before, 0 broken\n"


def test_broken_records_are_named_and_counted(model_folder, folder, capsys):
    broken = {
        "{": "is no JSON",
        "[1]": "expected an object, found list",
        '{"prompt": "x"}': "has no 'id'",
        '{"id": "one", "prompt": "x"}': "id 'one': line 1 has it already",
        '{"id": 10, "prompt": "x", "image": "absent.png"}': "absent.png: cannot be read",
        '{"id": 11, "prompt": "x", "images": "a.png"}': "did you mean 'image'",
        '{"id": 12, "prompt": "x", "top_p": 2}': "top_p 2.0: must be at most 1",
        '{"id": 13, "prompt": "x", "history": [1]}': "history[0]: expected [question, answer]",
        '{"id": 14, "prompt": "<image>"}': "0 images",
    }
    code, output, error = ask_file(capsys, model_folder, folder, [GOOD[0], *broken, GOOD[2]])
    assert code == 1 and set(answers(folder)) == {"one", 3}
    assert output == f"2 answered, 0 answered before, {len(broken)} broken\n"
    for number, message in enumerate(broken.values(), 2):
        found = [line for line in error.splitlines() if f"in.jsonl, line {number}:" in line]
        assert len(found) == 1 and message in found[0], error


def test_files_that_do_not_fit(model_folder, folder, capsys):
    (folder / "out.jsonl").write_text("nothing\n")
    code, _, error = ask_file(capsys, model_folder, folder, GOOD)
    assert code == 1 and "out.jsonl, line 1: is no answer" in error
    for args, message in [
        (("--input", folder / "absent", "--output", folder / "o"), "absent: No such file"),
        (("--input", folder / "in.jsonl", "--output", folder / "in.jsonl"), "holds the requests"),
        (("--input", folder / "in.jsonl"), "--input and --output go together"),
        ((), "pass one of --prompt, --interactive and --input"),
        (("--prompt", "x", "--mesh", "dta=1"), "no axis 'dta'"),
        (("--prompt", "x", "--mesh", "data"), "expected AXIS=SIZE"),
    ]:
        code, _, error = run(capsys, "--checkpoint", model_folder, *args)
        assert code == 1 and error.startswith("error: ") and error.count("\n") == 1 and message in error, error


def test_conversation(model_folder, folder, capsys, monkeypatch):
    """Mistakes are one line each, and the conversation goes on."""
    a, saved = folder / "a.png", folder / "saved.json"
    lines = [
        "Forgotten?",
        "/reset",
        f"/image {folder / 'absent.png'}",
        f"/image {a}",
        "/imgae x",
        "What is it?",
        "Why?",
        f"/save {folder / 'absent' / 'x'}",
        f"/save {saved}",
        "/quit",
        "Too late?",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    code, output, error = run(capsys, "--checkpoint", model_folder, "--interactive", "--max-new-tokens", 4)
    model = load(model_folder)
    first = model.ask(a, "What is it?", max_new_tokens=4)
    second = model.ask(a, "Why?", history=[("<image>\nWhat is it?", first)], max_new_tokens=4)
    forgotten = model.ask([], "Forgotten?", max_new_tokens=4)
    assert code == 0 and output == f"{forgotten}\n{first}\n{second}\n"
    mistakes = [line for line in error.splitlines() if line.startswith("error: ")]
    assert [part in line for part, line in zip(("absent.png", "/imgae", "absent/x"), mistakes, strict=True)] == [
        True
    ] * 3
    record = json.loads(saved.read_text())
    assert record["image"] == [str(a)] and record["history"] == [["<image>\nWhat is it?", first], ["Why?", second]]


def test_sampling_options(model_folder, capsys):
    args = ("--temperature", 2.0, "--top-k", 50, "--top-p", 0.9, "--min-p", 0.01, "--repetition-penalty", 1.1)
    common = ("--checkpoint", model_folder, "--max-new-tokens", 6, "--prompt", "Say.")
    code, output, _ = run(capsys, *common, *args, "--seed", 3, "--mesh", "data=1,fsdp=-1")
    drawing = {"temperature": 2.0, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1, "seed": 3}
    answer = load(model_folder).ask([], "Say.", max_new_tokens=6, **drawing)
    assert code == 0 and output == answer + "\n"
    assert len(answer) > 1
    code, stopped, _ = run(capsys, *common, *args, "--seed", 3, "--stop", answer[1:])
    assert code == 0 and stopped == answer[0] + "\n"
