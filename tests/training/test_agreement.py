"""Processes that meet compare what they know, and none of them hangs."""

import re
import socket
import subprocess
import sys
import time

import pytest

from ross_jax.training import agreement

PROGRAM = """
import os, sys, time
from pathlib import Path
from ross_jax.config import UserError
from ross_jax.training import agreement

process, processes, port, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
try:
    agreement.join("localhost:" + port, processes, process, {patience})
    {body}
    print("agreed", flush=True)
except UserError as error:
    print("error:", error, flush=True)
    agreement.leave(error)
"""


def meet(folder, body: str, processes: int = 3, started: int | None = None, patience: int = 100):
    """Runs PROGRAM in several processes, which must all end, and returns their exit statuses and outputs.

    Args:
      body: statements of PROGRAM.
      started: number of processes that are started, if not all.
      patience: seconds that the processes wait for one another to start.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", PROGRAM.format(body=body, patience=patience)]
    running = [
        subprocess.Popen(
            [*command, str(i), str(processes), port, str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(started or processes)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    return [process.returncode for process in running], said


def test_processes_meet(tmp_path):
    """Processes with equal facts and a shared folder agree, and wait at a barrier for a file of the first."""
    body = (
        "agreement.agree({'a': 1, **agreement.code_version()}, 100); agreement.check_shared(folder / 'run', 100); "
        "exec('if process == 0: time.sleep(3); (folder / \"made\").touch()'); agreement.barrier(); "
        "assert (folder / 'made').exists()"
    )
    codes, said = meet(tmp_path, body)
    assert codes == [0, 0, 0] and all("agreed" in text for text in said), said
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.slow
def test_differences_name_the_processes_on_all(tmp_path):
    codes, said = meet(tmp_path, "agreement.agree({'rate': 0.1 * (process == 1), 'same': 2}, 100)")
    host = socket.gethostname()
    for text in said:
        assert "error: the processes differ, and would train different runs:\n" in text
        assert f"  rate: 0.0 on processes 0 ({host}), 2 ({host}), 0.1 on process 1 ({host})\n" in text
        assert "same" not in text and "Traceback" not in text
    assert codes == [1, 1, 1]


@pytest.mark.slow
def test_a_failure_of_one_reaches_the_others(tmp_path):
    body = "exec('if process == 2: raise UserError(\"no such data\")'); agreement.agree({}, 100)"
    codes, said = meet(tmp_path, body)
    assert codes == [1, 1, 1]
    assert "error: no such data" in said[2]
    for text in said[:2]:
        assert f"error: process 2 on {socket.gethostname()}: no such data" in text


@pytest.mark.slow
def test_a_failure_of_the_first_reaches_those_that_wait_at_a_barrier(tmp_path):
    body = "exec('if process == 0: time.sleep(3); raise UserError(\"disk full\")'); agreement.barrier()"
    codes, said = meet(tmp_path, body)
    assert codes == [1, 1, 1]
    assert all(f"error: process 0 on {socket.gethostname()}: disk full" in text for text in said[1:])


@pytest.mark.slow
def test_whoever_reads_a_failure_first_the_others_read_it(tmp_path):
    """The main thread of process 0 is busy, and its heartbeat learns of the failure. Process 1 is late."""
    body = (
        "exec('from ross_jax.training import heartbeat; heartbeat.POLL = 6 * process + 0.5'); time.sleep(4); "
        "exec('if process == 2: raise UserError(\"no such data\")'); time.sleep(30)"
    )
    codes, said = meet(tmp_path, body)
    assert codes == [1, 1, 1], said
    for text in said[:2]:
        assert text.count(f"error: process 2 on {socket.gethostname()}: no such data") == 1


@pytest.mark.slow
def test_processes_end_while_they_give_signs_of_life(tmp_path):
    """Their threads are inside JAX's client most of the time, where the end of Python would crash them."""
    body = "exec('from ross_jax.training import heartbeat; heartbeat.POLL = 0.0'); time.sleep(4)"
    codes, said = meet(tmp_path, body)
    assert codes == [0, 0, 0] and all(text.strip() == "agreed" for text in said), said


@pytest.mark.slow
def test_a_directory_that_is_not_shared(tmp_path):
    codes, said = meet(tmp_path, "agreement.check_shared(folder / str(process // 2), 10)")
    host = socket.gethostname()
    expected = (
        f"error: --workdir: what process 0 ({host}) wrote to {tmp_path}/0 is not in {tmp_path}/1 of process 2 ({host})"
    )
    assert codes == [1, 1, 1] and all(expected in text for text in said), said
    assert list((tmp_path / "0").iterdir()) == [] and not (tmp_path / "1").exists()


@pytest.mark.slow
def test_one_that_says_nothing_is_named(tmp_path):
    body = "exec('if process == 1: time.sleep(40)'); agreement.agree({}, 10)"
    codes, said = meet(tmp_path, body)
    assert codes[0] == codes[2] == 75 and codes[1] != 0
    for text in (said[0], said[2]):
        assert "error: process 1 said nothing for 10 s while the run was starting" in text


@pytest.mark.slow
def test_one_that_never_starts(tmp_path):
    began = time.monotonic()
    codes, said = meet(tmp_path, "raise SystemExit('never comes here')", started=2, patience=20)
    assert time.monotonic() - began >= 20
    assert codes == [75, 75]
    for i, text in enumerate(said):
        assert re.search(rf"error: --distributed: process {i} of 3 on \S+ waited 20 s at localhost:\d+, and not", text)
        assert "stack trace" not in text


@pytest.mark.slow
def test_a_killed_coordinator_is_named(tmp_path):
    """JAX aborts the others at once, which then end with status 75 all the same."""
    body = "agreement.barrier(); exec('if process == 0: os.kill(os.getpid(), 9)'); time.sleep(60)"
    codes, said = meet(tmp_path, body)
    assert codes == [-9, 75, 75], said
    assert all(text.splitlines()[-1].startswith("error: lost process 0 (localhost:") for text in said[1:]), said


def test_alone_nothing_is_asked(tmp_path):
    agreement.agree({"a": 1}, 0)
    agreement.check_shared(tmp_path / "absent", 0)
    agreement.barrier()
    assert agreement.alone() and not (tmp_path / "absent").exists()


def test_every_source_file_is_in_the_code_version():
    names = agreement.code_version()
    assert "code of ross_jax/training/agreement.py" in names and "version of jax" in names
