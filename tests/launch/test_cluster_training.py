"""Runs of two processes with stand-ins for Slurm and ssh, with network namespaces as hosts, and with errors."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from launcher import REPOSITORY, SPREAD, command, environment, losses, step_lines, train
from ross_jax.checkpoints import latest_step

pytestmark = pytest.mark.slow

# Stand-in for srun: one node with two tasks, with Slurm's variables. A task that fails ends the other.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys, time
assert sys.argv[1] == "--kill-on-bad-exit=1"
step = {{"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "1"}}
tasks = [
    subprocess.Popen(sys.argv[2:], env=os.environ | step | {{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}})
    for i in range(2)
]
signal.signal(signal.SIGTERM, lambda *_: [task.send_signal(signal.SIGTERM) for task in tasks])
while None in (codes := [task.poll() for task in tasks]):
    if any(codes):
        [task.kill() for task in tasks]
    time.sleep(0.1)
sys.exit(max(map(abs, codes)))
"""
SSH = """#!/bin/sh
shift 5
exec sh -c "$*"
"""


def port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.fixture
def stand_ins(tmp_path):
    """A PATH on which srun and ssh start processes on this machine."""
    for name, text in (("srun", SRUN), ("ssh", SSH)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    (tmp_path / "hosts").write_text("localhost\nlocalhost\n")
    return f"{tmp_path / 'bin'}:{os.environ['PATH']}"


def launch(kind: str, stand_ins: str, recipe: Path, workdir: Path, *flags: str) -> subprocess.Popen:
    """Starts a run of two processes through a launcher. Its output goes to WORKDIR.log."""
    script = REPOSITORY / "launch" / "cluster" / {"slurm": "slurm.sbatch", "ssh": "ssh_hosts.sh"}[kind]
    first = [] if kind == "slurm" else [str(workdir.parent / "hosts"), "--"]
    environ = environment(devices=2) | {"PATH": stand_ins, "PYTHON": sys.executable, "PORT": str(port())}
    environ |= {"SLURM_JOB_ID": str(port()), "SLURM_SUBMIT_DIR": str(REPOSITORY)} if kind == "slurm" else {}
    arguments = ["bash", str(script), *first, f"--config={recipe}", f"--workdir={workdir}", *SPREAD, *flags]
    with workdir.with_suffix(".log").open("w") as log:
        return subprocess.Popen(arguments, stdout=log, stderr=subprocess.STDOUT, env=environ, start_new_session=True)


@contextlib.contextmanager
def cleared(process: subprocess.Popen):
    """Kills the launcher's session at the end."""
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("kind", ["slurm", "ssh"])
def test_a_signal_saves_and_the_same_command_goes_on(kind, stand_ins, recipe, alone, tmp_path):
    """A run that a signal stopped continues to the losses of an uninterrupted run of one process."""
    workdir = tmp_path / "run"
    with cleared(launch(kind, stand_ins, recipe, workdir, "--stopped_status=75")) as process:
        while len(step_lines(workdir)) < 3 and process.poll() is None:
            time.sleep(0.05)
        process.terminate()
        assert process.wait(200) == 75, workdir.with_suffix(".log").read_text()
    assert 0 < latest_step(workdir) < 12
    with cleared(launch(kind, stand_ins, recipe, workdir, "--stopped_status=75")) as process:
        assert process.wait(400) == 0, workdir.with_suffix(".log").read_text()
    np.testing.assert_allclose(losses(workdir), losses(alone(SPREAD)), rtol=1e-5)


def two(recipe, workdirs, flags, prefixes=((), ()), host="localhost", started=2):
    """Exit statuses and outputs of two processes, which must end by themselves."""
    cluster = ("--distributed", f"--coordinator={host}:{port()}", "--processes=2")
    processes = [
        subprocess.Popen(
            [*prefixes[i], *command(recipe, workdirs[i], *SPREAD, *cluster, f"--process={i}", *flags[i])],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(devices=2),
        )
        for i in range(started)
    ]
    try:
        said = [process.communicate(timeout=400)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said


def copy_data(folder: Path, recipe: Path, text: str) -> None:
    """Copies the recipe's data with its answers `aaa` replaced by `text`."""
    folder.mkdir()
    for name in ("data.json", "0.png"):
        shutil.copy(recipe.parent / name, folder)
    path = folder / "data.json"
    path.write_text(path.read_text().replace('"aaa"', f'"{text}"'))


def test_another_config_ends_both(recipe, tmp_path):
    rates = [[f"--config.optimizer.learning_rate={rate}"] for rate in (0.001, 0.002)]
    codes, said = two(recipe, [tmp_path / "run"] * 2, rates)
    assert codes == [1, 1]
    for text in said:
        assert re.search(r"config.optimizer.learning_rate: 0.001 on process 0 .*, 0.002 on process 1 ", text), text
        assert "Traceback" not in text and "stack trace" not in text
    assert not (tmp_path / "run").exists()


def test_a_workdir_of_each_ends_both(recipe, tmp_path):
    codes, said = two(recipe, [tmp_path / "here", tmp_path / "there"], [["--start_timeout=15"]] * 2)
    assert codes == [1, 1]
    for text in said:
        assert f"error: --workdir: what process 0 ({socket.gethostname()}) wrote to {tmp_path}/here is not in" in text
        assert "Traceback" not in text and "stack trace" not in text


def test_other_data_at_the_same_place_ends_both(recipe, tmp_path):
    """Processes that see different files at the same path end, each with an error."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("mount namespaces are not allowed here")
    for name, text in (("seen", "aaa"), ("other", "bbb")):
        copy_data(tmp_path / name, recipe, text)
    at = tmp_path / "seen"
    flag = f"--config.data.sources=({dict(path=str(at / 'data.json'), images=(str(at),))},)"
    mounted = ("unshare", "-m", "sh", "-c", f'mount --bind {tmp_path}/other {at} && exec "$@"', "sh")
    codes, said = two(recipe, [tmp_path / "run"] * 2, [[flag]] * 2, ((), mounted))
    assert codes == [1, 1]
    for text in said:
        assert re.search(r"  data: \w{12} on process 0 .*, \w{12} on process 1 ", text), text
        assert "Traceback" not in text and "stack trace" not in text


@pytest.fixture
def namespaces(tmp_path):
    """(command prefixes that run in each of two network namespaces, address of the first, command for their link)"""
    names = [f"ross{os.getpid()}{side}" for side in "ab"]
    ip = shutil.which("ip", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if ip is None or subprocess.run([ip, "netns", "add", names[0]], capture_output=True, check=False).returncode:
        pytest.skip("network namespaces are not allowed here")
    try:
        links = [f"r{os.getpid()}{side}" for side in "ab"]
        steps = [f"netns add {names[1]}", f"link add {links[0]} type veth peer name {links[1]}"]
        for i in range(2):
            inside = f"-n {names[i]}"
            steps += [f"link set {links[i]} netns {names[i]}", f"{inside} addr add 10.77.0.{i + 1}/24 dev {links[i]}"]
            steps += [f"{inside} link set {links[i]} up", f"{inside} link set lo up"]
        for step in steps:
            subprocess.run([ip, *step.split()], check=True, capture_output=True)
        # XLA's collectives on CPU resolve the host's name, so it needs an address.
        (tmp_path / "etc").write_text(f"127.0.0.1 localhost\n10.77.0.1 {names[0]}\n10.77.0.2 {names[1]}\n")
        own = f'mount --bind {tmp_path}/etc /etc/hosts && hostname $0 && exec "$@"'
        inside = [(ip, "netns", "exec", name, "unshare", "-u", "-m", "sh", "-c", own, name) for name in names]
        yield inside, "10.77.0.1", (ip, "-n", names[1], "link", "set", links[1])
    finally:
        for name in names:
            subprocess.run([ip, "netns", "del", name], capture_output=True, check=False)


def test_two_hosts_train_as_one(namespaces, recipe, alone, tmp_path):
    inside, host, _ = namespaces
    codes, said = two(recipe, [tmp_path / "run"] * 2, [[]] * 2, inside, host)
    assert codes == [0, 0], said
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(alone(SPREAD)), rtol=1e-5)


def test_a_host_that_cannot_be_reached(namespaces, recipe, tmp_path):
    inside, host, link = namespaces
    subprocess.run([*link, "down"], check=True)
    began = time.monotonic()
    codes, said = two(recipe, [tmp_path / "run"] * 2, [["--start_timeout=10"]] * 2, inside, host)
    assert codes == [75, 75] and time.monotonic() - began < 100
    for i, text in enumerate(said):
        assert f"error: --distributed: process {i} of 2" in text and f"waited 10 s at {host}:" in text
        assert "Traceback" not in text and "stack trace" not in text


def test_a_trace_and_the_compilation_cache(recipe, tmp_path):
    """The trace is written, and a second run of the same program compiles nothing."""
    flags = ("--profile=3:2", f"--compilation_cache={tmp_path / 'compiled'}", "--config.data.epochs=1")
    environ = environment() | {
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DEBUG_LOG_MODULES": "jax._src.compiler",
    }
    hits = []
    for name in ("first", "second"):
        arguments = command(recipe, tmp_path / name, *flags)
        done = subprocess.run(arguments, capture_output=True, text=True, env=environ, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        hits.append(re.findall(r"[Pp]ersistent compilation cache hit for '([^']*)'", done.stderr))
        assert len(list((tmp_path / name / "profile").rglob("*.xplane.pb"))) == 1
    assert "jit_train_step" not in hits[0] and "jit_train_step" in hits[1]


@pytest.mark.parametrize(
    ("flag", "said"),
    [("--profile=5", "--profile=5: expected START:COUNT"), ("--profile=99:1", "--profile=99:1: the run has 24 steps")],
)
def test_bad_profiles(flag, said, recipe, tmp_path):
    done = train(recipe, tmp_path / "run", flag)
    assert done.returncode == 1 and f"error: {said}" in done.stderr and "Traceback" not in done.stderr
