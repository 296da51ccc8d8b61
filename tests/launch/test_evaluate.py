"""The evaluation launcher: predictions, their continuation, scores, and the public harness."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from launcher import REPOSITORY, environment, load_script, step_lines, train, write_recipe
from ross_jax.evaluation import vlmevalkit
from ross_jax.inference.model import load
from ross_jax.inference.prompts import Request

launcher = load_script("evaluate")
needs_harness = pytest.mark.skipif(
    not vlmevalkit.PYTHON.is_file(), reason="needs VLMEvalKit: bash launch/setup.sh --env harness"
)


def run(capsys, *args) -> tuple[int, str, str]:
    code = launcher.main([str(arg) for arg in args])
    return code, *capsys.readouterr()


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Nine questions about nine images, of which the fourth is broken, and a record without an answer."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(9):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append({"question_id": i, "image": f"{i}.png", "question": f"Is it {i}?", "answer": "yes"})
    (folder / "3.png").write_bytes(b"broken")
    rows.append({"question_id": 9, "question": "What?"})
    for name in ("pope", "exact"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def common(data, model_folder):
    return ("--checkpoint", model_folder, "--data", data, "--max-new-tokens", 4, "--rows", 4)


@pytest.fixture(scope="module")
def finished(common, tmp_path_factory):
    output = tmp_path_factory.mktemp("scores")
    assert launcher.main([str(arg) for arg in (*common, "--benchmark", "pope", "exact", "--output", output)]) == 0
    return output


def test_answers_are_those_of_the_model(finished, data, model_folder):
    header, *rows = lines(finished / "pope.jsonl")
    assert (header["questions"], header["max_new_tokens"], len(header["broken"])) == (9, 4, 1)
    assert [row["number"] for row in rows] == list(range(9)) and "no image that Pillow can read" in rows[3]["error"]
    requests = [Request(data / f"{i}.png", f"Is it {i}?", max_new_tokens=4) for i in range(9) if i != 3]
    assert [row["prediction"] for row in rows if "error" not in row] == load(model_folder).ask_many(requests, 4)
    assert rows[0]["prompt"] == "Is it 0?" and rows[0]["answers"] == ["yes"]


def test_results_count_what_is_broken(finished):
    found = json.loads((finished / "results.json").read_text())
    assert set(found) == {"pope", "exact"} and found["pope"]["answered"] == 8
    assert [broken["place"].split(", ")[-1] for broken in found["pope"]["broken"]] == ["line 10", "question 3"]
    text = (finished / "results.md").read_text()
    assert "| POPE | f1 |" in text and "88.3 | 86.2 |" in text and "Ross-7B (paper)" in text
    assert "8 answers scored; 2 broken, not scored." in text and "has no answer" in text


def test_interrupted_it_continues(common, finished, tmp_path, capsys, monkeypatch):
    """A file that was cut within a line is continued: the same bytes, and no question is asked twice."""
    whole = (finished / "pope.jsonl").read_bytes()
    places = [i for i, byte in enumerate(whole) if byte == 10]
    (tmp_path / "pope.jsonl").write_bytes(whole[: places[5] + 20])
    asked = []
    original = launcher.load

    def counting(*args, **settings):
        model = original(*args, **settings)
        ask = type(model).ask_many
        monkeypatch.setattr(type(model), "ask_many", lambda *a, **k: asked.extend(a[1]) or ask(*a, **k))
        return model

    monkeypatch.setattr(launcher, "load", counting)
    code, _, error = run(capsys, *common, "--benchmark", "pope", "--output", tmp_path)
    assert code == 0, error
    assert (tmp_path / "pope.jsonl").read_bytes() == whole
    assert [request.prompt for request in asked] == [f"Is it {i}?" for i in range(5, 9)]


def test_rescoring_needs_the_file_alone(finished, tmp_path, capsys):
    rows = lines(finished / "pope.jsonl")[1:]
    for row in rows:
        row["prediction"] = "Yes, it is."
    (tmp_path / "pope.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, output, _ = run(capsys, "--rescore", "--output", tmp_path)
    assert code == 0 and "| accuracy | 100.00 |" in output and "| accuracy_lmms | 0.00 |" in output


def test_two_processes_share_the_work(common, finished, tmp_path, capsys):
    for process in (1, 0):
        code, output, error = run(
            capsys, *common, "--benchmark", "pope", "--output", tmp_path, "--processes", 2, "--process", process
        )
        assert code == 0 and bool(output) == (process == 0), error
    here, there = (json.loads((folder / "results.json").read_text())["pope"] for folder in (tmp_path, finished))
    assert here["scores"] == there["scores"] and here["answered"] == 8


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "mesh"), [(1, ()), (8, ()), (4, ("--mesh", "data=2,tensor=2"))])
def test_the_number_of_devices_changes_nothing(devices, mesh, common, finished, tmp_path):
    script = str(REPOSITORY / "launch" / "evaluate.py")
    args = [sys.executable, script, *map(str, common), "--benchmark", "pope", "--output", str(tmp_path), *mesh]
    subprocess.run(args, check=True, env=environment(devices))
    assert (tmp_path / "pope.jsonl").read_bytes() == (finished / "pope.jsonl").read_bytes()


def test_mistakes_end_in_one_line(common, finished, tmp_path, capsys):
    for args, message in [
        ((*common, "--benchmark", "pop", "--output", tmp_path), "did you mean 'pope'"),
        ((*common, "--benchmark", "ai2d", "--output", tmp_path), "expected AI2D.tsv"),
        ((*common, "--benchmark", "pope=none.tsv", "--output", tmp_path), "none.tsv: no such file"),
        (("--output", tmp_path), "--checkpoint and --benchmark are needed"),
        (("--rescore", "--output", tmp_path), "no predictions"),
        ((*common, "--benchmark", "pope", "--output", tmp_path, "--process", 1), "must be less than"),
        ((*common, "--benchmark", "pope", "--output", tmp_path, "--mesh", "data=3"), "divide 8 devices"),
        ((*common, "--benchmark", "pope", "--output", finished, "--limit", 5), "holds other predictions: questions 9"),
    ]:
        code, output, error = run(capsys, *args)
        assert (code, output) == (1, "") and error.splitlines()[-1].startswith("error: ") and message in error, error
    (tmp_path / "pope.jsonl").write_text('{"index": 1}\n')
    code, _, error = run(capsys, "--rescore", "--output", tmp_path)
    assert code == 1 and "pope.jsonl, line 1: expected index, prediction and answers" in error


@needs_harness
def test_vlmevalkit_agrees(tmp_path, capsys):
    """Awkward answers get the same scores from VLMEvalKit's own code."""
    answers = ["A", "(B).", "A. because it is very small and", "the Black Dog", "", "None", "A or B", "007", "否", "Z"]
    choices = {"A": "cat", "B": "black dog", "C": "007"}
    rows = [
        {"index": i, "prediction": text, "answers": [letter], "choices": choices, "fields": {"category": letter}}
        for i, (text, letter) in enumerate((text, letter) for text in answers for letter in "ABC")
    ]
    yes_no = [
        {"index": i, "prediction": text, "answers": [truth], "fields": {"category": "random"}}
        for i, (text, truth) in enumerate((t, a) for t in ("Yes.", "no", "yes and no", "") for a in ("Yes", "no"))
    ]
    words = [
        {"index": i, "prediction": text, "answers": ["12%", "Two dogs", "12%"]}
        for i, text in enumerate(["12 %", "0.12", "12%", "the 2 dogs.", "two  dogs", "", "12 percent"])
    ]
    files = {"ai2d": rows, "seed": rows, "pope": yes_no, "docvqa": words, "textvqa": words, "chartqa": words}
    for name, content in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    code, _, error = run(capsys, "--rescore", "--output", tmp_path, "--scorer", "vlmeval")
    assert code == 0, error
    found = json.loads((tmp_path / "results.json").read_text())
    pairs = {"pope": ("f1", "Overall"), "docvqa": ("anls", "Overall"), "chartqa": ("accuracy", "Overall")}
    for name in files:
        ours, theirs = pairs.get(name, ("accuracy_vlmeval", "Overall"))
        assert found[name]["scores"][ours] == pytest.approx(found[name]["vlmeval"][theirs], abs=1e-9), name
    assert found["ai2d"]["scores"]["accuracy"] > found["ai2d"]["scores"]["accuracy_vlmeval"]


@pytest.mark.slow
def test_benchmarks_during_training(data, tmp_path):
    """Every six steps and after the last, on a mesh of four devices; the scores become metrics."""
    recipe = write_recipe(tmp_path)
    table = f"--config.evaluation.benchmarks=(('exact', '{data / 'exact.jsonl'}'),)"
    flags = ("--config.data.epochs=2", "--config.loop.benchmark=6", "--config.evaluation.benchmark_limit=5", table)
    done = train(recipe, tmp_path / "run", *flags, "--config.mesh.data=2", "--config.mesh.fsdp=2", devices=4)
    assert done.returncode == 0, done.stderr
    found = [line for line in step_lines(tmp_path / "run") if "benchmark/exact/accuracy" in line]
    assert [(line["step"], line["benchmark/exact/broken"]) for line in found] == [(6, 2), (12, 2)]
    done = train(recipe, tmp_path / "other", *flags[:2])
    assert done.returncode == 1 and "evaluation.benchmarks is empty" in done.stderr


def test_without_the_harness(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(vlmevalkit, "PYTHON", tmp_path / "python")
    code, _, error = run(capsys, "--rescore", "--output", finished, "--scorer", "vlmeval")
    assert code == 1 and "bash launch/setup.sh --env harness" in error
