"""Two processes train as one process does, and a signal to one of them ends both."""

import json
import re
import shutil
import signal
import time

import numpy as np
import pytest
from PIL import Image

from launcher import SHORT, SPREAD, losses, parameters, step_lines, train, two_processes
from ross_jax.checkpoints import latest_step

pytestmark = pytest.mark.slow

ACROSS = (*SHORT, "--config.mesh.fsdp=1", "--config.mesh.tensor=4")  # both processes hold the same rows


def ends(processes, files) -> list[str]:
    """Waits for processes, which must exit with 0, and returns their outputs."""
    codes = [process.wait(300) for process in processes]
    texts = [file.seek(0) or file.read() for file in files]
    assert codes == [0, 0], "\n".join(texts)
    return texts


def agree(one, other):
    np.testing.assert_allclose(losses(one), losses(other), rtol=1e-5)
    expected = parameters(other)
    for path, leaf in parameters(one).items():
        np.testing.assert_allclose(leaf, expected[path], atol=1e-5, err_msg=path)


def test_two_processes_answer_benchmarks(recipe, tmp_path):
    """The model learns to answer with the letter a alone, which it does only if both processes hold the same tokens."""
    answers = ["a" * length for length in range(1, 300)]
    rows = [{"id": i, "image": "0.png", "question": "What" + "?" * i, "answer": answers} for i in range(8)]
    (tmp_path / "exact.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = f"--config.evaluation.benchmarks=(('exact', '{tmp_path / 'exact.jsonl'}'),)"
    images = f"--config.evaluation.benchmark_images=('{recipe.parent}',)"
    flags = (*SPREAD, "--config.loop.benchmark=12", "--config.optimizer.learning_rate=0.02", table, images)
    with two_processes(recipe, tmp_path / "run", *flags) as started:
        ends(*started)
    assert step_lines(tmp_path / "run")[-1]["benchmark/exact/accuracy"] == 100


@pytest.mark.parametrize("mesh", [SPREAD, ACROSS], ids=["spread", "across"])
def test_two_processes_are_as_one(mesh, recipe, alone, tmp_path):
    with two_processes(recipe, tmp_path / "run", *mesh) as started:
        ends(*started)
    assert len(losses(tmp_path / "run")) == 12
    agree(tmp_path / "run", alone(mesh))


@pytest.mark.parametrize("mesh", [SPREAD, ACROSS], ids=["spread", "across"])
def test_two_processes_evaluate_as_one(mesh, recipe, tmp_path):
    """Two processes evaluate three images, which do not fill their rows, as one process does."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    source = f"({ {'path': str(folder), 'kind': 'images'}!r},)"
    flags = (
        "--config.text.weight=0.0",
        "--config.freeze.trainable=('denoiser/.*',)",
        f"--config.data.sources={source}",
        f"--config.evaluation.sources={source}",
        "--config.evaluation.sampling.steps=3",
        "--config.loop.evaluate=2",
        *mesh,
    )
    done = train(recipe, tmp_path / "one", *flags, devices=4)
    assert done.returncode == 0, done.stderr
    with two_processes(recipe, tmp_path / "two", *flags) as started:
        ends(*started)
    one, two = ([line for line in step_lines(tmp_path / name) if "evaluation/psnr" in line] for name in ("one", "two"))
    assert [line["step"] for line in one] == [0, 2]
    for expected, found in zip(one, two, strict=True):
        assert found == pytest.approx(expected, rel=1e-3)


def test_two_working_directories(recipe, tmp_path):
    """Relative paths count from the directory of process 0, which alone speaks, in few lines."""
    (tmp_path / "other").mkdir()
    data = f"--config.data.sources=({dict(path='data.json', images=('.',))},)"
    flags = (data, "--config.text.tokenizer=tokenizer", "--config.loop.stop_after=12", *SPREAD[1:])
    folders = (recipe.parent, tmp_path / "other")
    with two_processes(recipe, tmp_path / "run", *flags, folders=folders) as started:
        text, silent = ends(*started)
    assert not silent and len(text.splitlines()) <= 28, text  # the banner, 12 steps and the end
    assert not re.search(r"Gloo|PyTorch|^[IWE]\d{4} |absl", text, re.MULTILINE), text
    with two_processes(recipe, tmp_path / "run", *flags[:2], *SPREAD[1:], folders=folders) as started:
        text, silent = ends(*started)
    assert not silent and re.search(r"continues from step 12 of 24\n", text) and "24 of 24 steps: finished" in text


def test_a_signal_to_one_ends_both(recipe, alone, tmp_path):
    """A signal to one process ends both at the same step with a checkpoint, from which one process continues."""
    workdir = tmp_path / "run"
    with two_processes(recipe, workdir, *SPREAD) as (processes, files):
        while len(step_lines(workdir)) < 3 and all(process.poll() is None for process in processes):
            time.sleep(0.05)
        processes[1].send_signal(signal.SIGTERM)
        texts = ends(processes, files)
    said = re.search(r": (\d+) of 12 steps: stopped by SIGTERM; the same command continues$", texts[0].strip())
    assert int(said[1]) == latest_step(workdir) < 12 and " steps" not in texts[1]
    finished = train(recipe, workdir, *SPREAD, devices=4)
    assert finished.returncode == 0, finished.stderr
    agree(workdir, alone(SPREAD))


@pytest.mark.parametrize(("lost", "number"), [(1, signal.SIGKILL), (0, signal.SIGSTOP)])
def test_a_lost_process_is_named(lost, number, recipe, tmp_path):
    """A process that is killed, or stands still, ends the other in time, with a status that asks for another try."""
    workdir = tmp_path / "run"
    flags = (*ACROSS, "--config.data.epochs=200", "--config.loop.save=2000", "--lost_host_timeout=20")
    with two_processes(recipe, workdir, *flags) as (processes, files):
        while len(step_lines(workdir)) < 3 and all(process.poll() is None for process in processes):
            time.sleep(0.05)
        processes[lost].send_signal(number)
        began = time.monotonic()
        assert processes[1 - lost].wait(60) == 75 and time.monotonic() - began < 30  # slow machines may be late
        said = files[1 - lost].seek(0) or files[1 - lost].read()
    assert re.match(rf"error: lost process {lost} \(\S+\)", said.splitlines()[-1]), said


def test_an_error_of_one_ends_both(recipe, tmp_path):
    """An error of process 0, which finds no data, ends process 1, which waits for it."""
    (tmp_path / "empty.json").write_text("[]")
    flag = f"--config.data.sources=({dict(path=str(tmp_path / 'empty.json'))},)"
    with two_processes(recipe, tmp_path / "run", flag) as (processes, files):
        codes = [process.wait(100) for process in processes]
        said = files[0].seek(0) or files[0].read()
    assert codes[0] == 1 and codes[1] != 0
    assert re.search(rf"^error: .*{tmp_path}/empty.json: is empty", said, re.MULTILINE) and "Traceback" not in said


def test_a_damaged_step(recipe, alone, tmp_path):
    """Both processes continue from the step before, though a single chunk is damaged, which one of them reads."""
    workdir = tmp_path / "run"
    shutil.copytree(alone(ACROSS), workdir)
    chunks = (path for path in (workdir / "steps" / "12" / "params").rglob("d/*"))
    largest = max(chunks, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with two_processes(recipe, workdir, *ACROSS) as (processes, files):
        text, silent = ends(processes, files)
    assert re.search(r"warning: step 12 is damaged, the run continues from step 10: .*array \S+ is damaged", text), text
    assert not silent
    agree(workdir, alone(ACROSS))
