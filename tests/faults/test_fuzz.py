"""Every parser of user input takes 2,000 damaged inputs: it reads them or raises UserError, within time and memory.

`--minutes N` tries other inputs for N minutes. The README of the tests tells how to try one input again.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from faults.fuzzing import Task

TESTS = Path(__file__).parents[1]
SEED = 18
COUNTS = {"data": 900, "tokenizers": 100, "checkpoints": 700, "recipes": 300}
"""Group of `parsers.GROUPS` -> inputs."""
MOST_PROBLEMS = 20


def run(task: Task) -> tuple[int, list[str]]:
    """Number of inputs tried, and a text for each that a parser did not take as it must."""
    environment = os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    problems: list[str] = []
    number = task.first
    while len(problems) < MOST_PROBLEMS:
        command = [sys.executable, "-m", "faults.fuzzing", json.dumps(dataclasses.asdict(task))]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, check=False)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
        failed = [line for line in lines if "what" in line]
        problems += [f"{task.seed} {task.group} {x['problem']}, {x['parser']}: {x['what']}" for x in failed]
        began = [line for line in lines if "began" in line]
        number = began[-1]["began"] + 1 if began else number
        if not done.returncode:
            break
        if not began:
            pytest.fail(done.stderr[-3000:])
        how = signal.Signals(-done.returncode).name if done.returncode < 0 else f"status {done.returncode}"
        problems.append(f"{task.seed} {task.group} {number - 1}, {began[-1]['parser']}: ends the process ({how})")
        task = dataclasses.replace(task, first=number)
    return number, problems


@pytest.mark.slow
@pytest.mark.parametrize("group", COUNTS)
def test_damaged_input_gives_a_clear_error(group, request, reliability):
    minutes = request.config.getoption("minutes", default=None)
    seed = SEED if minutes is None else int(time.time())
    end = None if minutes is None else time.time() + 60 * minutes / len(COUNTS)
    tried, problems = run(Task(group, seed, 0, COUNTS[group], end))
    reliability(f"input of parsers: {group}", Counter(detected=tried - len(problems), wrong=len(problems)))
    assert not problems, f"{len(problems)} problems in {tried} inputs\n" + "\n\n".join(problems)
