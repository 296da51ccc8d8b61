"""Cluster launchers, with stand-ins for ssh, gcloud, xpk, kubectl and Python that record their arguments."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

from launcher import REPOSITORY

CLUSTER = REPOSITORY / "launch" / "cluster"
# Arguments that one of several shells might change.
FLAGS = ["--workdir=/shared/a b", "--config.init=('x', \"y\")", "--note=$HOME $(HOME) #: `id` \\n * {}", "--empty="]
GKE = {
    "NAME": "ross-7b",
    "IMAGE": "registry/ross_jax:1",
    "CLAIM": "shared",
    "ACCELERATOR": "tpu-v5-lite-podslice",
    "TOPOLOGY": "4x8",
    "HOSTS": "8",
    "CHIPS": "4",
    "SLICES": "2",
}


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def recorder(path: Path) -> Path:
    """Writes a command that appends its arguments, as a JSON list, to PATH.json."""
    code = f"import json, sys; open({str(path) + '.json'!r}, 'a').write(json.dumps(sys.argv[1:]) + chr(10))"
    return write_script(path, f'#!/bin/sh\nexec {sys.executable} -c {shlex.quote(code)} "$@"\n')


def recorded(path: Path) -> list[list[str]]:
    return [json.loads(line) for line in Path(f"{path}.json").read_text().splitlines()]


def run(script: str, *arguments: str, path: Path | None = None, **environ: str) -> subprocess.CompletedProcess:
    """Runs a launcher until it exits, with the stand-ins in the folder `path`."""
    found = f"{path}:{os.environ['PATH']}" if path else os.environ["PATH"]
    command = ["bash", str(CLUSTER / script), *arguments]
    environ = os.environ | {"PATH": found} | environ
    return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=120, check=False)


def run_remote(command: str, home: Path, folder: str) -> list[str]:
    """Runs a host's command, and returns Python's arguments there. The repository is `folder` inside `home`."""
    python = recorder(home / folder / ".venv" / "bin" / "python")
    subprocess.run(["bash", "-c", command], cwd=home, check=True, timeout=60)
    (arguments,) = recorded(python)
    return arguments


def test_shell_scripts_pass_shellcheck():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "the `test` extra is not installed: run launch/setup.sh"
    scripts = [*REPOSITORY.glob("launch/**/*.sh"), *REPOSITORY.glob("launch/**/*.sbatch"), REPOSITORY / ".ci" / "run"]
    assert len(scripts) >= 10
    done = subprocess.run([shellcheck, *map(str, scripts)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_multi_gpu_is_one_process_that_needs_gpus(tmp_path):
    python = write_script(tmp_path / "python", '#!/bin/sh\necho "$JAX_PLATFORMS $PWD $$"; printf "%s\\n" "$@"\n')
    environ = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    command = ["bash", str(CLUSTER / "multi_gpu.sh"), *FLAGS]
    started = subprocess.Popen(command, env=environ | {"PYTHON": str(python)}, stdout=subprocess.PIPE, text=True)
    first, *arguments = started.communicate(timeout=60)[0].splitlines()
    assert first == f"cuda {REPOSITORY} {started.pid}"  # bash is replaced by Python, so that signals reach it
    assert arguments == ["launch/train.py", *FLAGS]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("slice", ["tpu-vm", "ssh", "name", "--worker=all"]),
        ("slices", ["queued-resources", "ssh", "name", "--worker=all", "--node=all"]),
    ],
)
def test_tpu_pod(kind, expected, tmp_path):
    gcloud = recorder(tmp_path / "bin" / "gcloud")
    done = run("tpu_pod.sh", kind, "name", "us-east5-a", "--", *FLAGS, path=tmp_path / "bin")
    assert done.returncode == 0, done.stderr
    ((*asked, remote),) = recorded(gcloud)
    assert asked == ["compute", "tpus", *expected, "--zone=us-east5-a"]
    arguments = run_remote(remote.removeprefix("--command="), tmp_path, "ross_jax")
    assert arguments == ["launch/train.py", "--distributed", *FLAGS]


@pytest.mark.parametrize("arguments", [[], ["slice", "name", "zone"], ["slice", "name", "zone", "--x=1", "--y=2"]])
def test_tpu_pod_usage(arguments):
    done = run("tpu_pod.sh", *arguments)
    assert done.returncode == 2 and "bash launch/cluster/tpu_pod.sh slice NAME ZONE -- TRAIN_FLAG" in done.stderr


def test_a_slice_is_made_and_installed(tmp_path):
    """`create` and `setup` ask gcloud; what `setup` does on a host is checked there, with stand-ins for uv and pip."""
    gcloud = recorder(tmp_path / "bin" / "gcloud")
    assert run("tpu_pod.sh", "create", "mine", "z", "v6e-16", path=tmp_path / "bin").returncode == 0
    made = ["compute", "tpus", "queued-resources", "create", "mine", "--node-id=mine", "--zone=z"]
    assert recorded(gcloud) == [[*made, "--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e"]]
    settings = {"REPO": "https://host/a repo.git", "BUCKET": "my-bucket", "DIR": "my code"}
    assert run("tpu_pod.sh", "setup", "mine", "z", path=tmp_path / "bin", **settings).returncode == 0
    *asked, remote = recorded(gcloud)[1]
    assert asked == ["compute", "tpus", "tpu-vm", "ssh", "mine", "--worker=all", "--zone=z"]
    home, tools = tmp_path / "home", tmp_path / "home" / ".local" / "bin"
    git, fuse = recorder(tools / "git"), recorder(tools / "gcsfuse")
    write_script(tools / "uv", '#!/bin/sh\n[ "$2" = find ] && echo /opt/python3.12\nexit 0\n')
    write_script(home / "my code" / "launch" / "setup.sh", 'echo "$PYTHON $PWD $*" >$HOME/installed\n')
    command = ["bash", "-c", remote.removeprefix("--command=")]
    found = os.environ | {"HOME": str(home), "PATH": f"{tools}:/usr/bin:/bin"}
    subprocess.run(command, cwd=home, env=found, check=True, timeout=60)
    assert (home / "installed").read_text() == f"/opt/python3.12 {home}/my code tpu gcs\n"
    assert not Path(f"{git}.json").exists()  # the repository is there
    assert recorded(fuse) == [["--implicit-dirs", "my-bucket", f"{home}/shared"]]


def test_a_detached_run(tmp_path):
    """The run outlives the shell that started it, and writes its log."""
    gcloud = recorder(tmp_path / "bin" / "gcloud")
    done = run("tpu_pod.sh", "slice", "mine", "z", "--", *FLAGS, path=tmp_path / "bin", DETACH="1")
    assert done.returncode == 0, done.stderr
    remote = recorded(gcloud)[0][-1].removeprefix("--command=")
    python = tmp_path / "ross_jax" / ".venv" / "bin" / "python"
    write_script(python, '#!/bin/sh\nsleep 1\nprintf "%s\\n" "$@"\n')
    subprocess.run(["bash", "-c", remote], cwd=tmp_path, check=True, timeout=60, capture_output=True)
    log, deadline = tmp_path / "ross_jax" / "train.log", time.monotonic() + 60
    while len(log.read_text().splitlines()) < 2 + len(FLAGS) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert log.read_text().splitlines() == ["launch/train.py", "--distributed", *FLAGS]


def test_dry_runs_start_nothing(tmp_path):
    """Each script prints what it would start. Nothing of its cluster is on the path."""
    hosts = tmp_path / "hosts"
    hosts.write_text("one\nuser@two\n")
    settings = {"CLUSTER": "c", "ZONE": "z", "TPU_TYPE": "t", "IMAGE": "i", "STORAGE": "s"}
    for script, arguments, environ, expected in (
        ("multi_gpu.sh", [], {"PYTHON": "python"}, r"^python launch/train\.py --workdir=w$"),
        ("slurm.sbatch", [], {}, r"^srun .*train\.py --distributed --workdir=w$"),
        ("ssh_hosts.sh", [str(hosts), "--"], {}, r"(?s)^one: .*--process=0 .*\nuser@two: .*=one:8476 .*--process=1"),
        ("tpu_pod.sh", ["slice", "mine", "z", "--"], {}, r"^gcloud compute tpus tpu-vm ssh mine .*--workdir=w"),
        ("gke.sh", [], GKE, r"(?s)kind: JobSet.* persistentVolumeClaim: {claimName: shared}"),
        ("gke.sh", [], GKE | {"CLAIM": ""}, r"(?s)kind: JobSet.* - name: shared\n +emptyDir: {}"),
        ("xpk.sh", ["mine"], settings, r"^xpk workload create .*--workload=mine .*--storage=s --max"),
        ("xpk.sh", ["mine"], settings | {"STORAGE": ""}, r"^xpk workload create .*--docker-image=i --max"),
    ):
        done = run(script, *arguments, "--workdir=w", DRY_RUN="1", **environ)
        assert done.returncode == 0 and re.search(expected, done.stdout), (script, done.stdout, done.stderr)


def test_xpk(tmp_path):
    xpk = recorder(tmp_path / "bin" / "xpk")
    settings = {"CLUSTER": "c", "ZONE": "z", "TPU_TYPE": "v5litepod-32", "SLICES": "2", "IMAGE": "i", "STORAGE": "s"}
    done = run("xpk.sh", "ross-7b", *FLAGS, path=tmp_path / "bin", **settings)
    assert done.returncode == 0, done.stderr
    ((*asked, remote),) = recorded(xpk)
    assert asked[:2] == ["workload", "create"]
    wanted = {"--workload=ross-7b", "--cluster=c", "--zone=z", "--tpu-type=v5litepod-32", "--num-slices=2"}
    wanted |= {"--docker-image=i", "--storage=s", "--restart-on-exit-codes=75"}
    assert wanted <= set(asked)
    arguments = run_remote(remote.removeprefix("--command="), tmp_path, ".")
    assert arguments[:2] == ["launch/train.py", "--distributed"] and arguments[-len(FLAGS) :] == FLAGS


@pytest.fixture(scope="module")
def manifest():
    done = run("gke.sh", *FLAGS, KUBECTL="cat", **GKE)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def as_api(manifest: dict) -> dict:
    """A manifest as the JobSet API's models read it. The models raise for a wrong type or a missing field."""
    return JobsetV1alpha2JobSet.from_dict(manifest).to_dict()


def lost(written, parsed, path="") -> list[str]:
    """Paths whose value in `parsed` is missing or differs from `written`."""
    if isinstance(written, dict) and isinstance(parsed, dict):
        return [each for key in written for each in lost(written[key], parsed.get(key), f"{path}.{key}")]
    if isinstance(written, list) and isinstance(parsed, list) and len(written) == len(parsed):
        pairs = enumerate(zip(written, parsed, strict=True))
        return [each for i, pair in pairs for each in lost(*pair, f"{path}[{i}]")]
    return [] if written == parsed else [path]


def test_the_manifest_is_a_job_set(manifest):
    assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and manifest["kind"] == "JobSet"
    assert lost(manifest, as_api(manifest)) == []


def test_a_wrong_manifest_is_noticed(manifest):
    unknown = json.loads(json.dumps(manifest))
    unknown["spec"]["replicatedJobs"][0]["template"]["spec"]["backOffLimit"] = 0
    assert lost(unknown, as_api(unknown)) == [".spec.replicatedJobs[0].template.spec.backOffLimit"]
    wrong = json.loads(json.dumps(manifest))
    wrong["spec"]["replicatedJobs"][0]["replicas"] = "2"
    with pytest.raises(ValueError, match="replicas"):
        as_api(wrong)


def test_the_manifest_has_a_pod_for_every_host_and_hands_the_flags_on(manifest, tmp_path):
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert job["replicas"] == 2 and spec["parallelism"] == spec["completions"] == 8
    (container,) = spec["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    shell, option, script = container["command"]
    assert (shell, option) == ("bash", "-c")
    arguments = run_remote(script, tmp_path, ".")
    assert arguments[:2] == ["launch/train.py", "--distributed"] and arguments[-len(FLAGS) :] == FLAGS


@pytest.mark.parametrize("name", sorted(GKE.keys() - {"SLICES", "CLAIM"}))
def test_a_manifest_without_a_setting_is_refused(name):
    done = run("gke.sh", KUBECTL="cat", **{key: value for key, value in GKE.items() if key != name})
    assert done.returncode != 0 and done.stderr.startswith(f"error: {name} is not set") and not done.stdout


SSH = f"""#!{sys.executable}
import json, os, sys
*options, host, command = sys.argv[1:]
assert options == ["-o", "BatchMode=yes", "-o", "ServerAliveInterval=30"], options
os.environ["HOST"] = host
os.execvp("sh", ["sh", "-c", command])  # as sshd does
"""
WORKER = f"""#!{sys.executable}
import json, os, signal, sys, time
from pathlib import Path
process = next(flag.partition("=")[2] for flag in sys.argv if flag.startswith("--process="))
folder = Path(os.environ["RECORDS"])
(folder / process).write_text(json.dumps([os.environ["HOST"], os.getcwd(), *sys.argv[1:]]))
print("hello", flush=True)
if os.environ["MODE"] == "fail":
    sys.exit(3 if process == "1" else 0)
signal.signal(signal.SIGTERM, lambda *_: ((folder / (process + ".saved")).touch(), sys.exit(0)))
time.sleep(100)
"""


@pytest.fixture
def hosts(tmp_path):
    """Function: mode -> process of ssh_hosts.sh with three hosts, all of which are this machine."""
    write_script(tmp_path / "bin" / "ssh", SSH)
    (tmp_path / "hosts").write_text("# ours\nme@alpha\n\nbeta  # slow\ngamma\n")
    python = write_script(tmp_path / "python", WORKER)
    (tmp_path / "records").mkdir()
    started = []

    def start(mode: str) -> subprocess.Popen:
        environ = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "PYTHON": str(python),
            "RECORDS": str(tmp_path / "records"),
            "MODE": mode,
            "PORT": "1234",
        }
        command = ["bash", str(CLUSTER / "ssh_hosts.sh"), str(tmp_path / "hosts"), "--", *FLAGS]
        options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(subprocess.Popen(command, env=os.environ | environ, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def test_ssh_hosts_start_one_process_each(hosts, tmp_path):
    process = hosts("fail")
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 3  # status of the host that failed
    assert sorted(said.splitlines()) == ["[beta] hello", "[gamma] hello", "[me@alpha] hello"]
    for number, host in enumerate(["me@alpha", "beta", "gamma"]):
        at, folder, *arguments = json.loads((tmp_path / "records" / str(number)).read_text())
        assert (at, folder) == (host, str(REPOSITORY))
        cluster = ["--distributed", "--coordinator=alpha:1234", "--processes=3", f"--process={number}"]
        assert arguments == ["launch/train.py", *cluster, *FLAGS]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_end_of_ssh_hosts_lets_every_host_save(hosts, tmp_path, number):
    """A signal to the launcher, or its death, makes each host save."""
    process, records = hosts("wait"), tmp_path / "records"
    while sum(path.stat().st_size > 0 for path in records.iterdir()) < 3:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    time.sleep(0.5)  # until signal handlers are set
    process.send_signal(number)
    process.wait(60)
    deadline = time.monotonic() + 30
    while len(list(records.glob("*.saved"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(list(records.glob("*.saved"))) == 3
    assert process.returncode == (-number if number == signal.SIGKILL else 0)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [([], 2, "usage: bash launch/cluster/ssh_hosts.sh HOSTFILE"), (["EMPTY", "--", "--x"], 1, "names no host")],
)
def test_ssh_hosts_usage(arguments, status, said, tmp_path):
    (tmp_path / "empty").write_text("# nobody\n")
    done = run("ssh_hosts.sh", *(str(tmp_path / "empty") if a == "EMPTY" else a for a in arguments))
    assert done.returncode == status and said in done.stderr


def test_slurm_starts_a_task_each_from_where_it_was_submitted(tmp_path):
    srun = recorder(tmp_path / "bin" / "srun")
    done = run("slurm.sbatch", *FLAGS, path=tmp_path / "bin", SLURM_SUBMIT_DIR=str(REPOSITORY), PYTHON="/py")
    assert done.returncode == 0, done.stderr
    assert recorded(srun) == [["--kill-on-bad-exit=1", "/py", "launch/train.py", "--distributed", *FLAGS]]


def test_slurm_is_for_sbatch():
    environ = {name: value for name, value in os.environ.items() if name != "SLURM_SUBMIT_DIR"}
    command = ["bash", str(CLUSTER / "slurm.sbatch")]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "SLURM_SUBMIT_DIR: is set by sbatch" in done.stderr
