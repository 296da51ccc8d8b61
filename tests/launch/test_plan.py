"""The planning launcher: its output, files and errors."""

import json
import os
import re
import subprocess
import sys

import pytest

from launcher import REPOSITORY, needs_libtpu


def run_plan(recipe, *arguments: str, topology: str = "v5e:2x2"):
    given = [f"--config={recipe}", f"--topology={topology}", *arguments]
    script = str(REPOSITORY / "launch" / "plan.py")
    # The launcher must use no accelerator, whatever the environment says.
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cuda"}
    return subprocess.run([sys.executable, script, *given], capture_output=True, text=True, env=environment)


@pytest.mark.slow
@needs_libtpu
def test_a_plan(recipe, tmp_path):
    written = [f"--json={tmp_path / 'plan.json'}", f"--png={tmp_path / 'plan.png'}", f"--dump-hlo={tmp_path / 'hlo'}"]
    done = run_plan(recipe, "--epoch=1000", "--config.step.dtype=bfloat16", *written)
    assert done.returncode == 0, done.stderr
    assert re.search(
        rf"{recipe} on v5e:2x2: 4 devices\n  data=1 fsdp=4 tensor=1, remat none, 4 rows\n  fits, ", done.stdout
    )
    for line in ("one step, estimated", "hours per epoch", "An estimate", "largest arrays", "assumed", "compiled in"):
        assert line in done.stdout
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert figures["fits"] and figures["needed"] < figures["capacity"] == int(15.75 * 2**30)
    assert f"{figures['mfu']:.1%}" in done.stdout
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    [dumped] = (tmp_path / "hlo").iterdir()
    assert dumped.read_text().startswith("HloModule jit_train_step")


@pytest.mark.slow
@needs_libtpu
def test_generation(recipe):
    done = run_plan(recipe, "--objective=generate", "--prompt=64", "--new_tokens=4")
    assert done.returncode == 0, done.stderr
    for line in ("one generation, estimated", "prefill", "decode", "new tokens/s"):
        assert line in done.stdout


FULL = "encoder=siglip,llm=qwen2_7b,stage=finetune"


@pytest.mark.slow
@needs_libtpu
def test_full_size(tmp_path):
    """The plan of a full-size recipe fits and compiles in little host memory; kernels are gathered in few pieces."""
    figures = tmp_path / "plan.json"
    arguments = ["--rows=128", "--config.step.remat=gate", f"--json={figures}"]
    done = run_plan(str(REPOSITORY / "configs" / f"ross.py:{FULL}"), *arguments, topology="v5e:8x8")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    plan = json.loads(figures.read_text())
    assert plan["fits"] and plan["mfu"] > 0.2
    assert plan["host_memory"] < 7e9
    assert sum(line["count"] for line in plan["collectives"] if line["kind"] == "collective-permute") < 1000


@pytest.mark.parametrize(
    ("topology", "arguments", "message"),
    [
        ("v9:2x2", [], r"error: --topology=v9:2x2: no chip 'v9'.*; known are v4, v5e"),
        ("v5e:2x2", ["--config.step.rematt=full"], "error: .*rematt"),
        ("v9:2x2", ["--json=s3://b/plan.json"], "error: s3://b/plan.json: s3:// is not supported"),
        pytest.param("v5e:2x2", ["--config.mesh.data=3"], "error: mesh data=3.*divide 4 devices", marks=needs_libtpu),
    ],
)
def test_errors(recipe, topology, arguments, message):
    done = run_plan(recipe, *arguments, topology=topology)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert re.match(message, last), done.stderr
    assert "Traceback" not in done.stderr
