"""`launch/convert.py`: its output and exit status; a converted folder is complete or absent."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from convert.foreign import (
    CLIP,
    GOLDEN,
    LLAMA,
    ROSS,
    assert_same,
    component,
    component_state,
    edit_json,
    edit_tensors,
    full,
    import_model,
    import_tree,
    save,
    state_of,
)
from launcher import load_script
from older import without_digests
from ross_jax.checkpoints import MANIFEST
from ross_jax.config import UserError
from ross_jax.convert.exporting import export

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "launch" / "convert.py"


def run(*arguments: str | Path, before: str = "", **options) -> subprocess.CompletedProcess:
    """Runs the script in a process of its own, after the statements `before`."""
    prelude = f"import runpy, sys; sys.argv[0] = {str(SCRIPT)!r}; {before}\n"
    command = [sys.executable, "-c", f"{prelude}runpy.run_path({str(SCRIPT)!r}, run_name='__main__')", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=120, **options)


@pytest.fixture
def main(monkeypatch, capsys):
    """Function: arguments -> (exit status, stdout, stderr) of the script's `main` in this process."""
    module = load_script("convert")

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        try:
            status = module.main([str(argument) for argument in arguments])
        except SystemExit as error:  # raised by argparse
            status = error.code
        return status, *capsys.readouterr()

    return call


def names(folder: Path) -> list[str]:
    """Files of a folder, but for digests and card, which exports have."""
    return sorted(path.name for path in folder.iterdir() if path.name not in ("SHA256SUMS", "README.md"))


def test_there_and_back(tmp_path):
    """The commands of the usage text import a golden and export the same bytes."""
    golden = GOLDEN / "siglip_qwen2" / "checkpoint"
    done = run("import", "--from", golden, "--output", tmp_path / "model")
    said = f"{tmp_path}/model: vision, projector, denoiser, autoencoder, language\n"
    assert (done.returncode, done.stdout) == (0, said) and done.stderr.count("\n") <= 5  # none, where it is quick
    done = run("export", "--from", tmp_path / "model", "--format", "ross", "--output", tmp_path / "out")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/out\n")
    assert names(tmp_path) == ["model", "out"] and names(tmp_path / "out") == names(golden)
    assert all((tmp_path / "out" / name).read_bytes() == (golden / name).read_bytes() for name in names(golden))


def test_flags(main, tmp_path):
    checkpoint = full(tmp_path, ROSS | {"mm_vision_tower": "/nowhere/clip"})
    tower, parts = tmp_path / "towers" / "clip", ["--from", component(tmp_path / "llm", LLAMA)]
    assert main("import", "--from", checkpoint, "--output", tmp_path / "a")[0] == 1
    flag = ["--vision-tower", tower]
    assert main("import", "--from", checkpoint, *flag, "--output", tmp_path / "a")[0] == 0
    assert main("import", *parts, "--from", tower, "--output", tmp_path / "b")[:2] == (
        0,
        f"{tmp_path}/b: language, vision\n",
    )
    options = ["--format", "components", "--dtype", "bfloat16"]
    assert main("export", "--from", tmp_path / "b", *options, "--output", tmp_path / "c")[0] == 0
    assert names(tmp_path / "c") == ["llm", "vision_tower"]
    assert {array.dtype.name for array in state_of(tmp_path / "c" / "llm").values()} == {"bfloat16"}
    assert main("import", *parts, "--teacher", tower, "--output", tmp_path / "d")[:2] == (
        0,
        f"{tmp_path}/d: language, teacher\n",
    )
    without = ["--without", "language", "--format", "components"]
    assert main("export", "--from", tmp_path / "d", *without, "--output", tmp_path / "e")[0] == 0
    assert names(tmp_path / "e") == ["teacher"]
    assert main("import", "--teacher", tmp_path / "e" / "teacher", "--output", tmp_path / "f")[:2] == (
        0,
        f"{tmp_path}/f: teacher\n",
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required: command"),
        (["convert"], "invalid choice: 'convert'"),
        (["import", "--output", "x"], "required: --from or --teacher"),
        (["import", "--from", "x"], "required: --output"),
        (["export", "--from", "x", "--output", "y"], "required: --format"),
        (["export", "--from", "x", "--output", "y", "--format", "ross", "--without"], "expected at least one argument"),
        (["export", "--from", "x", "--output", "y", "--format", "onnx"], "invalid choice: 'onnx'"),
        (["export", "--from", "x", "--output", "y", "--format", "ross", "--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_usage_errors(arguments, message, main):
    status, out, err = main(*arguments)
    assert (status, out) == (2, "") and message in err


def test_errors_have_no_traceback(tmp_path):
    checkpoint = full(tmp_path)
    edit_tensors(checkpoint / "model.safetensors", **{"model.norm.weight": np.full(8, np.nan, np.float32)})
    done = run("import", "--from", checkpoint, "--output", tmp_path / "out")
    assert (done.returncode, done.stdout) == (1, "")
    error, problem = done.stderr.splitlines()[-2:]
    assert error == f"error: {checkpoint}: 1 problem(s)"
    assert problem == f"  {checkpoint}/model.safetensors: model.norm.weight holds values that are not finite"
    assert names(tmp_path) == ["model", "towers"]


def test_outputs_that_cannot_be(main, tmp_path):
    original = component(tmp_path / "llm", LLAMA)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").touch()
    model = import_model(tmp_path / "model", original)
    for command in (["import", "--from", original], ["export", "--from", model, "--format", "components"]):
        for output, message in [
            ("taken", "exists already; choose another output or remove it first"),
            ("taken/x", "exists already; choose another output or remove it first"),
            ("taken/x/y", "cannot be written"),
        ]:
            status, out, err = main(*command, "--output", tmp_path / output)
            assert (status, out) == (1, "") and err.startswith(f"error: {tmp_path / output}: {message}")
    assert names(tmp_path) == ["llm", "model", "taken"] and names(tmp_path / "taken") == ["x"]


def test_models_that_cannot_be_exported(main, tmp_path):
    command = ["export", "--format", "components", "--output", tmp_path / "out", "--from"]
    assert f"error: {tmp_path}/nowhere: no such directory" in main(*command, tmp_path / "nowhere")[2]
    original = component(tmp_path / "llm", LLAMA)
    assert f"{original}: no ross_jax.json in it, so it is no ross_jax model" in main(*command, original)[2]
    model = import_model(tmp_path / "model", original)
    (model / MANIFEST).write_text("{}")
    assert f"{model}/ross_jax.json: damaged: its SHA-256 is not the one in" in main(*command, model)[2]
    without_digests(import_model(tmp_path / "older", original)).rename(tmp_path / "changed")
    model = tmp_path / "changed"
    manifest = json.loads((model / MANIFEST).read_text())
    for change, message in [
        ({"format": 7}, "format 7, this version reads 1"),
        ({"config": None}, "ross_jax.json: config is None, expected an object"),
        ({"foreign": []}, "ross_jax.json: foreign is [], expected an object"),
        ({"foreign": {"language": {"prefix": 1}}}, "foreign.language.prefix is 1, expected a string"),
        ({"foreign": {"language": {"keys": {"x": "F31"}}}}, "foreign.language.keys.x 'F31' is not supported"),
        (
            {"config": {"language": manifest["config"]["language"] | {"depth": 1}}},
            "config.language.depth: no such field",
        ),
        (
            {"config": {"language": manifest["config"]["language"] | {"hidden_size": 6, "num_layers": 2}}},
            "config and parameters differ: language/embedding, language/final_norm/scale",
        ),
    ]:
        (model / MANIFEST).write_text(json.dumps(manifest | change))
        status, _, err = main(*command, model)
        assert status == 1 and f"error: {model}" in err and message in err
    (model / MANIFEST).write_text(json.dumps(manifest))
    (model / "files" / "language" / "config.json").unlink()
    assert "files/language/config.json: no such file" in main(*command, model)[2]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kept", [10, 60])
def test_damaged_parameters(kept, main, tmp_path):
    model = import_model(tmp_path / "model", component(tmp_path / "llm", LLAMA))
    for file in (model / "params").rglob("d/*"):
        os.truncate(file, kept)
    status, _, err = main("export", "--from", model, "--format", "components", "--output", tmp_path / "out")
    assert status == 1 and err.count("\n") == 1 and err.startswith(f"error: {model}/params/")
    assert "damaged: its SHA-256 is not the one" in err
    assert names(tmp_path) == ["llm", "model"]


# A limit on the size of files imitates a full disk.

LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))"


@pytest.mark.parametrize("what", ["parameters", "unused", "manifest", "export"])
def test_a_full_disk(what, tmp_path):
    """A write of Orbax, the safetensors writer or Python that fails gives one line of error and leaves no file."""
    state = component_state(CLIP)
    if what == "unused":
        state["text_model.embeddings.token_embedding.weight"] = np.ones((1000, 100), np.float32)
    original = save(tmp_path / "original", state, CLIP)
    if what == "manifest":
        edit_json(original / "config.json", comment="x" * 300_000)
    command = ["import", "--from", original]
    if what == "export":
        command = ["export", "--format", "components", "--from", import_model(tmp_path / "model", original)]
    before = names(tmp_path)
    limit = {"parameters": 1000, "unused": 200_000, "manifest": 200_000, "export": 1000}[what]
    done = run(*command, "--output", tmp_path / "out", before=LIMIT.format(limit))
    assert (done.returncode, done.stdout) == (1, "")
    errors = [line for line in done.stderr.splitlines() if not line.startswith("writing ")]
    assert len(errors) == 1 and errors[0].startswith(f"error: {tmp_path}/") and "File too large" in errors[0]
    assert names(tmp_path) == before


# Conversions that are killed or run concurrently. Delays make them last. Each one is a fork of a process that does not
# use JAX.

SLOWED = """
import json, os, shutil, signal, sys, time
from pathlib import Path
import convert
from ross_jax import checkpoints
from ross_jax.convert import importing
from ross_jax.convert.safetensors_writer import SafetensorsWriter

def slowed(function, seconds):
    def call(*args, **kwargs):
        time.sleep(seconds)
        result = function(*args, **kwargs)
        time.sleep(seconds)
        return result
    return call

importing.is_finite = slowed(importing.is_finite, 0.01)  # called for every tensor
SafetensorsWriter.write = slowed(SafetensorsWriter.write, 0.01)
SafetensorsWriter.close = slowed(SafetensorsWriter.close, 0.1)
checkpoints.write_manifest = slowed(checkpoints.write_manifest, 0.1)
shutil.copyfile = slowed(shutil.copyfile, 0.05)

def start(command, output):
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os._exit(convert.main([*command, "--output", str(output)]))
    return pid

def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""

KILLED = (
    SLOWED
    + """
folder, command = Path(sys.argv[1]), sys.argv[2:]
begin = time.monotonic()
assert wait(start(command, folder / "whole")) == 0
duration = time.monotonic() - begin
for i in range(6):
    pid = start(command, folder / "out")
    time.sleep(duration * (0.2 + 0.15 * i))
    os.kill(pid, signal.SIGKILL)
    wait(pid)
    for name, kept in ((".out.incomplete", f"left{i}"), ("out", f"out{i}")):
        if (folder / name).exists():
            shutil.copytree(folder / name, folder / kept)
    shutil.rmtree(folder / "out", ignore_errors=True)
    status = wait(start(command, folder / "out"))
    print(i, status, sorted(os.listdir(folder)))
    os.rename(folder / "out", folder / f"next{i}")
"""
)


def killed(folder: Path, *command: str | Path) -> list[Path]:
    """Kills a conversion at six moments, and returns all complete outputs, of killed and of repeated conversions."""
    folder.mkdir()
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{SCRIPT.parent}"}
    arguments = [sys.executable, "-c", KILLED, str(folder), *map(str, command)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith(str(folder))]
    assert len(lines) == 6
    for i, line in enumerate(lines):
        assert line.startswith(f"{i} 0 ") and ".out" not in line  # the next run succeeds and removes leftovers
    assert len(list(folder.glob("left*"))) >= 2  # some were killed in the middle
    return [folder / "whole", *folder.glob("next*"), *folder.glob("out*")]


@pytest.mark.slow
def test_killed_imports(tmp_path):
    original = component(tmp_path / "original", CLIP)
    complete = killed(tmp_path / "killed", "import", "--from", original)
    # A leftover folder with a manifest is complete: its run was killed just before the last renaming.
    left = list((tmp_path / "killed").glob("left*"))
    for i, model in enumerate([*complete, *(folder for folder in left if (folder / MANIFEST).exists())]):
        export(model, tmp_path / f"export{i}", "components")
        assert_same(state_of(tmp_path / f"export{i}/vision_tower"), state_of(original))
    for folder in left:
        if not (folder / MANIFEST).exists():
            with pytest.raises(UserError, match="no ross_jax model"):
                export(folder, tmp_path / "out", "components")


@pytest.mark.slow
def test_killed_exports(tmp_path):
    original = component(tmp_path / "original", CLIP)
    model = import_model(tmp_path / "model", original)
    complete = killed(tmp_path / "killed", "export", "--format", "components", "--from", model)
    for folder in complete:
        assert names(folder) == ["vision_tower"] and names(folder / "vision_tower") == names(original)
        assert all(
            (folder / "vision_tower" / name).read_bytes() == (original / name).read_bytes() for name in names(original)
        )
    for left in (tmp_path / "killed").glob("left*"):
        try:
            found = import_tree(left / "vision_tower")
        except UserError:
            continue
        assert_same(found, import_tree(original))


TWO = (
    SLOWED
    + """
folder, command = Path(sys.argv[1]), sys.argv[2:]
release, write_manifest = folder.with_name("release"), checkpoints.write_manifest

def released(*args):
    while not release.exists():
        time.sleep(0.01)
    write_manifest(*args)

checkpoints.write_manifest = released
first = start(command, folder / "out")
while not (folder / ".out.incomplete").exists():
    time.sleep(0.01)
status = convert.main([*command, "--output", str(folder / "out")])
release.touch()
print(status, wait(first), sorted(os.listdir(folder)))
"""
)


def test_two_at_once(tmp_path):
    """A second conversion to the same output gives up while the first holds the lock."""
    original = component(tmp_path / "llm", LLAMA)
    (tmp_path / "both").mkdir()
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{SCRIPT.parent}"}
    command = [sys.executable, "-c", TWO, tmp_path / "both", "import", "--from", original]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=120)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {tmp_path}/both/out: another process is writing it (process ")
    assert done.stdout.splitlines()[-1] == "1 0 ['out']"
    export(tmp_path / "both" / "out", tmp_path / "again", "components")
    assert_same(state_of(tmp_path / "again" / "llm"), state_of(original))


def test_an_interrupt_ends_it_at_once(tmp_path):
    """Ctrl-C ends the process although a thread of Orbax is busy."""
    original = component(tmp_path / "llm", LLAMA)
    interrupt = "lambda _: (os.kill(os.getpid(), signal.SIGINT), time.sleep(100))"
    slow = f"import os, signal, time; from ross_jax.convert import importing; importing.is_finite = {interrupt}"
    begin = time.monotonic()
    done = run("import", "--from", original, "--output", tmp_path / "out", before=slow)
    assert time.monotonic() - begin < 100
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted; nothing was converted\n")
    assert not (tmp_path / "out").exists()
