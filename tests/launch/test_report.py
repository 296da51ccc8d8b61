"""The report of a run that was killed and continued."""

import base64
import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from launcher import REPOSITORY, command, environment, load_script, step_lines, train
from ross_jax.command_line import load_recipe
from ross_jax.config import to_dict
from ross_jax.training.goodput import ACTIVITIES, GOODPUT, read_lines
from ross_jax.training.metrics import Writer
from ross_jax.training.record import write_record


def write(folder, *starts):
    """Writes lines (start, time, step, seconds of steps) of a run that does nothing else."""
    rest = dict.fromkeys(ACTIVITIES, 0.0)
    lines = [
        {"start": start, "time": at, "step": step, **rest, "steps": seconds} for start, at, step, seconds in starts
    ]
    (folder / GOODPUT).write_text("".join(json.dumps(line) + "\n" for line in lines))


def report(folder, capsys):
    """Status, table as {text: (time, share)}, and what was written to stderr."""
    status = load_script("report").main([str(folder)])
    out, error = capsys.readouterr()
    rows = [line.rsplit(maxsplit=3 if line.split()[-2] in ("s", "min", "h") else 2) for line in out.splitlines()[1:]]
    return status, {text: (" ".join(value), share) for text, *value, share in rows}, out, error


def test_times_of_a_run_that_was_killed_twice(tmp_path, capsys):
    """The second start continued from step 20 of 30, and the third from step 10, a step of the first start."""
    first = [(0.0, 0.0, 0, 0.0), (0.0, 10.0, 10, 10.0), (0.0, 20.0, 20, 20.0), (0.0, 30.0, 30, 30.0)]
    second = [(40.0, 40.0, 20, 0.0), (40.0, 45.0, 25, 5.0)]
    third = [(50.0, 50.0, 10, 0.0), (50.0, 80.0, 40, 30.0)]
    write(tmp_path, *first, *second, *third)
    status, rows, out, error = report(tmp_path, capsys)
    assert status == 0 and not error
    assert out.splitlines()[0] == f"{tmp_path}: 40 steps, 3 starts, goodput 50.0%"
    assert rows["steps"] == ("40 s", "50.0%")
    assert rows["steps that were done again"] == ("25 s", "31.2%")
    assert rows["not running"] == ("15 s", "18.8%") and rows["total"] == ("1 min", "100.0%")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_bad_lines_are_named_and_left_out(tmp_path, capsys):
    write(tmp_path, (0.0, 0.0, 0, 0.0), (0.0, 10.0, 10, 10.0))
    bad = ['{"step": 1, "text_loss": 2.0}', "", "nonsense", '{"step": "x"}', "[" * 5000, "[]", '{"step": NaN}', '{"ste']
    (tmp_path / "metrics.jsonl").write_text("\n".join(bad))
    with (tmp_path / GOODPUT).open("ab") as file:
        file.write(b"\xff\n")
    status, rows, _, error = report(tmp_path, capsys)
    assert status == 0 and rows["steps"] == ("10 s", "100.0%")
    assert error.splitlines() == [
        f"warning: {tmp_path}/{GOODPUT}: line 3 is unreadable, and left out",
        f"warning: {tmp_path}/metrics.jsonl: line 3 and 4 more are unreadable, and left out",
    ]


def test_runs_side_by_side(tmp_path, capsys):
    """The page needs no other file, and has times, differing fields and pictures of each run."""
    config, folders = (
        load_recipe(str(REPOSITORY / "configs" / "bench.py")),
        [tmp_path / "a" / "run", tmp_path / "b" / "run"],
    )
    for number, folder in enumerate(folders):
        writer = Writer(folder, 0)
        for step in (10, 20):
            writer.write(step, {"text_loss": 2.0 / step, "reconstruction_loss": 0.5, "tokens_per_second": 100.0})
            writer.image("evaluation", step, np.full((4, 4, 3), 100 * number + step, np.uint8))
        writer.close()
        write(folder, (0.0, 0.0, 0, 0.0), (0.0, 10.0, 20, 8.0 + number))
        write_record(folder, {}, {"config": to_dict(dataclasses.replace(config, seed=number))})
    output = tmp_path / "out"
    assert load_script("report").main([*map(str, folders), "--output", str(output)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{output}/report.html"
    page = (output / "report.html").read_text()
    assert "<h1>a/run, b/run</h1>" in page and "<code>seed: 0 there, 1 now</code>" in page
    assert '<td>steps</td><td class="number">8 s</td><td class="number">9 s</td>' in page
    shown = [base64.b64decode(each) for each in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    assert shown[0] == (output / "report.png").read_bytes()
    pixels = [int(np.asarray(Image.open(io.BytesIO(each)))[0, 0, 0]) for each in shown[1:]]
    assert pixels == [10, 20, 110, 120] and not re.findall(r'(?:src|href)="(?!data:)', page)
    assert load_script("report").main([*map(str, folders)]) == 1
    assert "several runs: add --output DIR" in capsys.readouterr().err


def test_no_run(tmp_path, capsys):
    assert load_script("report").main([str(tmp_path)]) == 1
    assert (
        capsys.readouterr().err
        == f"error: {tmp_path}: has no {GOODPUT} with the times of a run; give the directory of a run\n"
    )


@pytest.mark.slow
def test_a_killed_run(recipe, tmp_path):
    """Times of a run that was killed after steps that it had not saved. A bad line in its metrics does not stop it."""
    workdir = tmp_path / "run"
    flags = ("--config.loop.save=3", "--config.data.epochs=2")
    began = time.time()
    process = subprocess.Popen(command(recipe, workdir, *flags), env=environment(), stderr=subprocess.DEVNULL)
    while max((line["step"] for line in read_lines(workdir / GOODPUT)[0]), default=0) < 7 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    metrics = workdir / "metrics.jsonl"
    metrics.write_text("nonsense\n" + metrics.read_text())
    done = train(recipe, workdir, *flags)
    assert done.returncode == 0 and "metrics.jsonl: line 1 is unreadable" in done.stderr, done.stderr
    last = step_lines(workdir)[-1]
    times = {name: value for name, value in last.items() if name.startswith("time/")}
    assert last["step"] == 12 and sum(times.values()) == pytest.approx(time.time() - began, rel=0.5)
    some = {f"time/{name}" for name in ("steps", "compile", "restore", "save", "begin", "redone", "down")}
    assert some <= {name for name, seconds in times.items() if seconds > 0}
    assert last["goodput"] == pytest.approx(times["time/steps"] / sum(times.values()), rel=0.01)
    told = subprocess.run(
        [sys.executable, REPOSITORY / "launch" / "report.py", workdir],
        capture_output=True,
        text=True,
        env=os.environ,
        check=True,
    )
    assert f"{workdir}: 12 steps, 2 starts, goodput" in told.stdout and (workdir / "report.png").is_file()
