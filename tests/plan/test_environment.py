"""What planning sets in a process: that its program stays the same, and what is not loaded."""

import os
import subprocess
import sys

import pytest

from launcher import REPOSITORY, needs_cuda, needs_libtpu
from ross_jax.plan import environment


def run(code: str, **variables: str) -> str:
    """What a process prints that starts as the planning launchers do."""
    code = f"from ross_jax.plan.environment import prepare, without_gpus\nprepare()\n{code}"
    environ = os.environ | {"PYTHONPATH": str(REPOSITORY)} | variables
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


COMPILED = """
import hashlib, pathlib, tempfile
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from ross_jax.models.attention import attention
from ross_jax.plan.targets import open_target
from ross_jax.sharding import MeshConfig, make_mesh

target = open_target("v5e:2x2")
mesh = make_mesh(MeshConfig(1, 4, 1), target.devices)
x = jax.ShapeDtypeStruct((4, 512, 2, 128), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
    step = jax.jit(jax.grad(lambda x: attention(x, jax.nn.relu(x), x).sum()))
    compiled = step.lower(x).compile(compiler_options={"xla_dump_to": folder})
    text = next(pathlib.Path(folder).glob("*after_codegen.txt")).read_text()
print(hashlib.sha256(text.encode()).hexdigest(), compiled.memory_analysis())
"""


@needs_libtpu
def test_the_program_is_the_same():
    """Its text, with the cycles that the compiler estimates, and its memory."""
    ours, usual = (f"import os\nos.environ['LIBTPU_INIT_ARGS'] {change}\n{COMPILED}" for change in ("+= ''", "= ''"))
    assert run(ours) == run(usual)


def test_the_user_has_the_last_word(monkeypatch):
    variables = {"LIBTPU_INIT_ARGS": "--xla_tpu_impure_linker_mode=false", "TPU_ACCELERATOR_TYPE": "v4-8"}
    monkeypatch.setattr(os, "environ", variables)
    environment.prepare()
    assert variables["LIBTPU_INIT_ARGS"].endswith(" --xla_tpu_impure_linker_mode=false")
    assert variables["TPU_ACCELERATOR_TYPE"] == "v4-8"
    assert variables["JAX_PLATFORMS"] == "cpu"


@needs_cuda
@pytest.mark.parametrize("first", ["", "without_gpus()"])
def test_the_cuda_plugin(first):
    """It is loaded with the first backend, but for plans of TPUs."""
    loaded = run(f"{first}\nimport jax\njax.devices()\nprint('xla_cuda_plugin' in open('/proc/self/maps').read())")
    assert loaded.strip() == str(not first)
