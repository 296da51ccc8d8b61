"""Checkpoints on disk: complete or absent, restored as requested, with errors that list all problems."""

import contextlib
import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ross_jax import checkpoints
from ross_jax.checkpoints import StreamedLeaf
from ross_jax.config import UserError
from ross_jax.directories import CheckpointError, DamagedError
from ross_jax.run_checkpoints import RunCheckpoints


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Saving and restoring.

TREE = {
    "a": {"kernel": np.arange(24, dtype=np.float32).reshape(4, 6), "scale": np.float32(3)},
    "b": np.arange(16, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(8, 2),
    "c": np.arange(3, dtype=np.float16),
}


def streamed(array: np.ndarray) -> StreamedLeaf:
    """A leaf that is streamed row by row if it has rows."""
    parts = [(i, row) for i, row in enumerate(array)] if array.ndim > 1 else [(None, array)]
    return StreamedLeaf(array.shape, array.dtype, lambda: iter(parts))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "params"
    checkpoints.save_streamed(folder, jax.tree.map(streamed, TREE))
    return folder


def test_save_streamed(saved):
    shapes = checkpoints.abstract(saved)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), TREE)
    restored = checkpoints.restore(saved, shapes)
    assert jax.tree.structure(restored) == jax.tree.structure(TREE)
    for found, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(TREE), strict=True):
        assert isinstance(found, np.ndarray) and found.dtype == expected.dtype and found.tobytes() == expected.tobytes()


def test_some_leaves_cast(saved):
    tree = {"b": jax.ShapeDtypeStruct((8, 2), jnp.float32), "a": {"kernel": jax.ShapeDtypeStruct((4, 6), jnp.bfloat16)}}
    restored = checkpoints.restore(saved, tree)
    assert set(restored) == {"a", "b"} and set(restored["a"]) == {"kernel"}
    assert (restored["b"].dtype, restored["a"]["kernel"].dtype) == (np.float32, ml_dtypes.bfloat16)
    np.testing.assert_array_equal(restored["b"], TREE["b"].astype(np.float32))


def test_onto_devices(saved):
    assert jax.device_count() == 8
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def wanted(array, *spec):
        return jax.ShapeDtypeStruct(array.shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    tree = {"a": {"kernel": wanted(TREE["a"]["kernel"], "x", "y"), "scale": wanted(TREE["a"]["scale"])}}
    tree |= {"b": wanted(TREE["b"], ("x", "y"), None)}
    restored = checkpoints.restore(saved, tree)
    for found, expected, leaf in zip(
        *map(jax.tree.leaves, (restored, {"a": TREE["a"], "b": TREE["b"]}, tree)), strict=True
    ):
        assert isinstance(found, jax.Array) and found.sharding == leaf.sharding and found.dtype == jnp.float32
        np.testing.assert_array_equal(found, expected.astype(np.float32))
    assert restored["a"]["kernel"].addressable_shards[0].data.shape == (1, 3)


def test_all_that_does_not_fit_is_named(saved):
    tree = {
        "a": {"kernel": jax.ShapeDtypeStruct((6, 4), jnp.float32), "bias": jax.ShapeDtypeStruct((6,), jnp.float32)},
        "c": jax.ShapeDtypeStruct((3,), jnp.float32),
        "d": jax.ShapeDtypeStruct((), jnp.float32),
    }
    with pytest.raises(CheckpointError) as caught:
        checkpoints.restore(saved, tree)
    assert str(caught.value).splitlines() == [
        f"{saved}: does not fit",
        "  ['a']['bias'] is not in the checkpoint",
        "  ['a']['kernel'] has shape (4, 6), expected (6, 4)",
        "  ['d'] is not in the checkpoint",
    ]


@pytest.mark.parametrize("what", ["absent", "empty", "file", "no metadata", "garbled metadata"])
def test_no_checkpoint_there(what, saved, tmp_path):
    folder = tmp_path / "params"
    if what == "empty":
        folder.mkdir()
    elif what == "file":
        folder.touch()
    elif what != "absent":
        shutil.copytree(saved, folder)
        (folder / "_METADATA").unlink() if what == "no metadata" else (folder / "_METADATA").write_text("{]")
    with pytest.raises(CheckpointError, match=rf"^{folder}(: no complete|/_METADATA: (cannot be read|damaged))"):
        checkpoints.abstract(folder)


@pytest.mark.parametrize("damage", ["removed", "truncated"])
def test_damaged_files(damage, saved, tmp_path):
    """Damaged array files raise a CheckpointError."""
    shutil.copytree(saved, tmp_path / "params")
    for file in (tmp_path / "params").rglob("d/*"):
        file.unlink() if damage == "removed" else os.truncate(file, file.stat().st_size // 2)
    tree = checkpoints.abstract(saved)
    with pytest.raises(DamagedError, match=rf"^{tmp_path}/params"):
        checkpoints.restore(tmp_path / "params", tree)


def test_every_flip_is_seen(tmp_path):
    """A flipped bit in a file that says something about the arrays is an error or without effect."""
    rng, folder = np.random.default_rng(0), tmp_path / "params"
    values = {"a": {"kernel": rng.normal(size=(4, 600))}, "b": rng.normal(size=2000).astype(np.float32)}
    checkpoints.save_streamed(folder, jax.tree.map(streamed, values))
    tree = checkpoints.abstract(folder)
    root = set(folder.glob("*")) | set(folder.glob("d/*")) | set(folder.glob("array_metadatas/*"))
    later = ("_CHECKPOINT_METADATA", "commit_success.txt")
    arrays = set()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in later):
        content = path.read_bytes()
        for bit in rng.integers(0, len(content) * 8, 10):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            try:
                restored = checkpoints.restore(folder, tree)
            except CheckpointError as error:
                assert isinstance(error, DamagedError) and str(error).startswith(str(folder))
                arrays.update(re.findall("array (\\S+) is damaged", str(error)))
            else:  # bytes that no array lies in
                assert path not in root
                jax.tree.map(np.testing.assert_array_equal, restored, values)
        path.write_bytes(content)
    assert arrays == {"a.kernel", "b"}


def test_stock_orbax_reads_it(saved):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(saved.resolve())
    jax.tree.map(np.testing.assert_array_equal, restored, TREE)


@pytest.mark.parametrize("name", ["a[1]", "a\\\\b", "[x"])
def test_paths_that_orbax_cannot_read(name, saved, tmp_path):
    """They are refused before anything is written."""
    with pytest.raises(CheckpointError, match="checkpoints cannot lie in a path with"):
        checkpoints.save_streamed(tmp_path / name / "params", jax.tree.map(streamed, TREE))
    with pytest.raises(CheckpointError, match="checkpoints cannot lie in a path with"):
        RunCheckpoints(tmp_path / name, 1)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    "error", [UserError("the source is gone"), OSError(28, "No space left on device"), KeyError("x")]
)
def test_a_leaf_that_fails(error, tmp_path, capfd):
    """A leaf that fails gives one error, prints nothing, leaves no files, and ends the reading of leaves."""
    read = []

    def good(name):
        def parts():
            read.append(name)
            yield from enumerate(np.zeros((3, 2), np.float32))

        return StreamedLeaf((3, 2), np.dtype(np.float32), parts)

    def bad():
        read.append("bad")
        yield 0, np.zeros(2, np.float32)
        raise error

    leaves = {f"leaf{i}": good(i) for i in range(20)} | {"leaf03": StreamedLeaf((3, 2), np.dtype(np.float32), bad)}
    with pytest.raises(UserError, match=r"the source is gone|params: cannot be written \(") as caught:
        checkpoints.save_streamed(tmp_path / "params", leaves)
    if type(error) is UserError:
        assert caught.value is error
    assert names(tmp_path) == []
    assert read[-1] == "bad"
    assert capfd.readouterr() == ("", "")


@contextlib.contextmanager
def largest_file(size: int):
    """Limits files to `size` bytes, like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_raised_and_not_printed(background, tmp_path, capfd, caplog):
    """Many writes that fail at once raise one error and print nothing, and error reporting is restored."""
    rng = np.random.default_rng(0)
    tree = {str(i): jnp.asarray(rng.normal(size=(100, 100)).astype(np.float32)) for i in range(40)}
    state = SimpleNamespace(params=tree, opt_state={"moments": tree}, step=jnp.zeros(()), frozen={})
    logger = logging.getLogger("absl")
    reported = []
    hook, filters = sys.unraisablehook, list(logger.filters)
    saver = RunCheckpoints(tmp_path / "run", 2)
    try:
        sys.unraisablehook = reported.append
        with largest_file(2**18), pytest.raises(CheckpointError, match=r"cannot be written \(File too large\)"):
            if background:
                saver.save(1, state)
                saver.wait()
            else:
                saver.save_frozen(tree)
        assert sys.unraisablehook == reported.append and logger.filters == filters and reported == []
    finally:
        sys.unraisablehook = hook
    assert capfd.readouterr() == ("", "") and not caplog.records
    saver.save(1, state)
    saver.wait()
    assert saver.latest() == 1


MEMORY = """
import sys
from pathlib import Path
import jax
import numpy as np
from ross_jax import checkpoints
from ross_jax.process import peak_memory
def parts():
    for i in range(30):
        yield i, np.full((5_000_000,), i, np.float32)
leaf = checkpoints.StreamedLeaf((30, 5_000_000), np.dtype(np.float32), parts)
small = checkpoints.StreamedLeaf((1,), np.dtype(np.float32), lambda: iter([(None, np.zeros(1, np.float32))]))
checkpoints.save_streamed(Path(sys.argv[1]) / "small", {"a": small})
before = peak_memory()
checkpoints.save_streamed(Path(sys.argv[1]) / "large", {"a": leaf})
print((peak_memory() - before) / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded_by_the_parts(tmp_path):
    """Saving 600 MB in parts of 20 MB takes less than 250 MB of memory."""
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert 15 < float(done.stdout) < 250
    last = jax.ShapeDtypeStruct((30, 5_000_000), jnp.float32)
    assert checkpoints.abstract(tmp_path / "large")["a"].shape == last.shape
    shutil.rmtree(tmp_path / "large")


# The manifest.


def test_manifest(tmp_path):
    checkpoints.write_manifest(tmp_path, {"config": {"a": [1, None]}})
    assert checkpoints.read_manifest(tmp_path) == {"format": 2, "config": {"a": [1, None]}}
    (tmp_path / "SHA256SUMS").unlink()
    with pytest.raises(DamagedError, match="SHA256SUMS: is missing"):
        checkpoints.read_manifest(tmp_path)


def test_manifest_without_digests(tmp_path, caplog):
    """Older ones are read, with a warning."""
    (tmp_path / checkpoints.MANIFEST).write_text('{"format": 1, "config": {}}')
    assert checkpoints.read_manifest(tmp_path) == {"format": 1, "config": {}}
    assert "written without checksums" in caplog.text


@pytest.mark.parametrize(
    "content, message",
    [
        (None, r"no ross_jax\.json in it, so it is no ross_jax model; `launch/convert\.py import` makes one"),
        (b"{", r"ross_jax\.json: not valid JSON \("),
        (b"\xff", r"ross_jax\.json: not valid JSON"),
        (b"[" * 100_000, r"ross_jax\.json: not valid JSON"),
        (b"[]", "ross_jax.json: format None, this version reads 1"),
        (b"{}", "ross_jax.json: format None, this version reads 1"),
        (json.dumps({"format": 3}).encode(), "ross_jax.json: format 3, this version reads 1 and 2"),
    ],
)
def test_manifests_that_are_none(content, message, tmp_path):
    if content is not None:
        (tmp_path / checkpoints.MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}.*{message}"):
        checkpoints.read_manifest(tmp_path)


def test_manifests_that_cannot_be_read(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such directory"):
        checkpoints.read_manifest(tmp_path / "nowhere")
    (tmp_path / checkpoints.MANIFEST).mkdir()
    with pytest.raises(CheckpointError, match=r"ross_jax\.json: cannot be read \(Is a directory\)"):
        checkpoints.read_manifest(tmp_path)
