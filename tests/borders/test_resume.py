"""Runs that are continued."""

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from launcher import command, environment, step_lines, train


def write_data(path: Path, answer: str) -> None:
    turns = [{"from": "human", "value": "<image>\nIs it red?"}, {"from": "gpt", "value": answer}]
    path.write_text(json.dumps([{"id": i, "image": "0.png", "conversations": turns} for i in range(24)]))


@pytest.fixture(scope="module")
def stopped(recipe, tmp_path_factory) -> tuple[Path, str, str]:
    """A run that a signal stopped at one of its first steps: its directory and its flags."""
    folder = tmp_path_factory.mktemp("stopped")
    write_data(folder / "data.json", "yes")
    source = {"path": str(folder / "data.json"), "images": (str(recipe.parent),)}
    flags = (f"--config.data.sources=({source},)", "--config.data.epochs=4")
    line = command(recipe, folder / "run", *flags)
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment())
    while process.poll() is None and not step_lines(folder / "run"):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1]
    if process.returncode or not 0 < len(step_lines(folder / "run")) < 24:
        pytest.fail(f"the first run did not stop as it should: {said[-1000:]}")
    return folder / "run", *flags


@pytest.mark.slow
def test_answers_were_corrected_in_between(stopped, recipe):
    """A user stops a run, corrects its answers (as many tokens as before), and starts the same command again."""
    write_data(stopped[0].parent / "data.json", "nah")
    done = train(recipe, *stopped)
    said = done.stderr.replace(str(stopped[0]), "")
    assert re.search(r"(?i)\bdata\b.*(chang|differ|other)|(chang|differ|other).*\bdata\b", said), said
