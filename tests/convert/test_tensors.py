"""Weight files: written like the safetensors library's, found, read in bounded memory, refused when damaged."""

import itertools
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ross_jax.convert.dtypes import DTYPES, TAGS
from ross_jax.convert.safetensors_writer import SafetensorsWriter
from ross_jax.convert.tensors import TensorError, TensorFiles, find_weights, open_tensors

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4\n"


@st.composite
def arrays(draw) -> np.ndarray:
    """Draws arrays of any dtype, bits and small shape."""
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    size = math.prod(shape)
    if dtype == np.bool_:
        return draw(hnp.arrays(np.bool_, shape))
    bits = draw(st.binary(min_size=size * dtype.itemsize, max_size=size * dtype.itemsize))
    return np.frombuffer(bits, np.uint8).view(dtype).reshape(shape)


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__")
STATES = st.dictionaries(NAMES, arrays(), max_size=6)


def write(folder: Path, state: dict[str, np.ndarray], stem: str = "model", **options) -> None:
    infos = {key: (TAGS[array.dtype], array.shape) for key, array in state.items()}
    with SafetensorsWriter(folder, stem, infos, **options) as writer:
        for key in reversed(state):
            writer.write(key, state[key])


def library_bytes(state: dict[str, np.ndarray]) -> bytes:
    return safetensors.numpy.save(state, {"format": "pt"})


def assert_holds(files: TensorFiles, state: dict[str, np.ndarray]) -> None:
    assert set(files) == set(state) and len(files) == len(state)
    for key, array in state.items():
        assert (files[key].dtype, files[key].shape) == (array.dtype, array.shape)
        read = files.read(key)
        assert (read.dtype, read.shape, read.tobytes()) == (array.dtype, array.shape, array.tobytes())
        assert read.flags.c_contiguous


# Writing.


@settings(max_examples=60, deadline=None)
@given(STATES)
@example({})
@example({'"\\\x7f\x01\u2028\U0001f600': np.zeros((), np.float32), "z": np.zeros((0, 3), np.int64)})
@example({tag: np.zeros(3, dtype) for tag, dtype in DTYPES.items()})
def test_files_are_those_of_the_library(state):
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), state)
        assert (Path(name) / "model.safetensors").read_bytes() == library_bytes(state)
        assert [path.name for path in Path(name).iterdir()] == ["model.safetensors"]
        with open_tensors(Path(name)) as files:
            assert_holds(files, state)


@settings(max_examples=40, deadline=None)
@given(STATES, st.integers(1, 200))
def test_sharding(state, max_shard_bytes):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, state, stem="diffusion_pytorch_model", max_shard_bytes=max_shard_bytes)
        shards = sorted(folder.glob("*.safetensors"))
        with open_tensors(folder) as files:
            assert_holds(files, state)
            groups = [[key for key in state if files[key].file == shard] for shard in shards]
        for shard, group in zip(shards, groups, strict=True):
            assert shard.read_bytes() == library_bytes({key: state[key] for key in group})
            assert group or not state
            assert len(group) <= 1 or sum(state[key].nbytes for key in group) <= max_shard_bytes
        for group, following in itertools.pairwise(groups):
            assert sum(state[key].nbytes for key in [*group, following[0]]) > max_shard_bytes
        assert [key for group in groups for key in group] == list(state)
        index = folder / "diffusion_pytorch_model.safetensors.index.json"
        count = len(shards)
        if count == 1:
            assert shards[0].name == "diffusion_pytorch_model.safetensors" and not index.exists()
            return
        names = [f"diffusion_pytorch_model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        assert [shard.name for shard in shards] == names
        assert json.loads(index.read_text()) == {
            "metadata": {"total_size": sum(array.nbytes for array in state.values())},
            "weight_map": {key: name for name, group in zip(names, groups, strict=True) for key in group},
        }


def test_tensors_must_be_as_declared(tmp_path):
    writer = SafetensorsWriter(tmp_path, "model", {"a": ("F32", (2,)), "b": ("BF16", ())})
    for array in (np.zeros(2), np.zeros(2, ">f4"), np.zeros((2, 1), np.float32)):
        with pytest.raises(TensorError, match=r"'a' is declared as F32 \[2\], but"):
            writer.write("a", array)
    with pytest.raises(TensorError, match="'c' was not declared"):
        writer.write("c", np.zeros(2))
    writer.write("a", np.ones(2, np.float32))
    with pytest.raises(TensorError, match="'a' was written before"):
        writer.write("a", np.ones(2, np.float32))
    writer.write("b", np.asarray(3, ml_dtypes.bfloat16))
    writer.close()
    writer.close()
    with pytest.raises(TensorError, match="after the files were closed"):
        writer.write("a", np.ones(2, np.float32))
    with open_tensors(tmp_path) as files:
        assert files.read("a").tolist() == [1, 1] and files.read("b") == 3


def test_incomplete_files_never_get_their_name(tmp_path):
    writer = SafetensorsWriter(tmp_path, "model", {key: ("F32", (2,)) for key in "abc"}, max_shard_bytes=8)
    writer.write("b", np.zeros(2, np.float32))
    assert {path.suffix for path in tmp_path.iterdir()} == {".partial"}
    with pytest.raises(TensorError) as caught:
        writer.close()
    assert [problem.split("tensor ")[1][:3] for problem in caught.value.problems] == ["'a'", "'c'"]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TensorError, match="discarded"):
        writer.close()


def test_an_exception_discards(tmp_path):
    with pytest.raises(RuntimeError), SafetensorsWriter(tmp_path, "model", {"a": ("F32", ())}) as writer:
        writer.write("a", np.zeros((), np.float32))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_weights_are_not_overwritten(tmp_path):
    write(tmp_path, {"a": np.zeros(1)})
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(TensorError, match=r"already holds model\.safetensors"):
        write(tmp_path, {"a": np.ones(1), "b": np.zeros(9)}, max_shard_bytes=8)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"model.safetensors": before}
    write(tmp_path, {"a": np.ones(1)}, stem="diffusion_pytorch_model")


def test_names_that_safetensors_cannot_hold(tmp_path):
    with pytest.raises(TensorError, match="2 problems") as caught:
        SafetensorsWriter(tmp_path, "model", {"__metadata__": ("I8", ()), "a": ("I8", ()), "\ud800": ("I8", ())})
    for problem, name in zip(caught.value.problems, ["'__metadata__'", r"'\ud800'"], strict=True):
        assert name in problem


def test_disk_errors_are_readable(tmp_path, monkeypatch):
    writer = SafetensorsWriter(tmp_path, "model", {"a": ("F32", ())})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(TensorError, match="No space left"):
        writer.write("a", np.zeros((), np.float32))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(TensorError, match=r"file"):
        SafetensorsWriter(tmp_path / "file", "model", {})


# Memory.

MEMORY = """
import sys
from pathlib import Path
from ross_jax.convert.safetensors_writer import SafetensorsWriter
from ross_jax.convert.tensors import open_tensors
from ross_jax.process import peak_memory
with open_tensors(Path(sys.argv[1])) as files:
    infos = {key: (info.tag, info.shape) for key, info in files.items()}
    with SafetensorsWriter(Path(sys.argv[2]), "model", infos) as writer:
        before = peak_memory()
        for key in files:
            array = files.read(key)
            writer.write(key, array)
            del array
        print((peak_memory() - before) / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_holds_one_tensor_at_a_time(tmp_path):
    size = 50_000_000
    header = {
        str(i): {"dtype": "BF16", "shape": [size // 2], "data_offsets": [i * size, (i + 1) * size]} for i in range(6)
    }
    file = raw_file(tmp_path / "model.safetensors", header, b"")
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size + 6 * size)  # sparse
    command = [sys.executable, "-c", MEMORY, str(file), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert 40 < float(done.stdout) < 110


# Finding the weights.


def save(file: Path, **state: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(state, file)


def save_index(file: Path, weight_map: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    "present, chosen",
    [
        (["model.safetensors", "pytorch_model.bin"], "model.safetensors"),
        (["diffusion_pytorch_model.safetensors", "pytorch_model.bin"], "diffusion_pytorch_model.safetensors"),
        (["pytorch_model.bin", "model.fp16.safetensors"], "pytorch_model.bin"),
        (["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"], "pytorch_model.bin.index.json"),
        (["model.safetensors.index.json", "pytorch_model.bin"], "model.safetensors.index.json"),
        (["model.fp16.safetensors", "diffusion_pytorch_model.fp16.bin"], "model.fp16.safetensors"),
        (
            ["model.safetensors.index.fp16.json", "model-00001-of-00001.fp16.safetensors"],
            "model.safetensors.index.fp16.json",
        ),
        (
            ["model.fp16.safetensors.index.json", "model.fp16-00001-of-00001.safetensors"],
            "model.fp16.safetensors.index.json",
        ),
        (["diffusion_pytorch_model.bin", "config.json"], "diffusion_pytorch_model.bin"),
        (["model.safetensors", "diffusion_pytorch_model.safetensors"], "model.safetensors"),
    ],
)
def test_choice(tmp_path, present, chosen):
    for name in present:
        (tmp_path / name).write_text("{}")
    assert find_weights(tmp_path) == tmp_path / chosen


@pytest.mark.parametrize(
    "present, message",
    [
        ([], r"no weights; looked for model\.safetensors, .*diffusion_pytorch_model\.bin.*it holds no weight file"),
        (["a.safetensors", "model-00001-of-00002.safetensors"], r"it holds a\.safetensors, model-00001-of-00002"),
        (["model.fp16.safetensors", "model.bf16.safetensors"], r"several variants.*model\.bf16.*model\.fp16"),
    ],
)
def test_no_choice(tmp_path, present, message):
    for name in present:
        (tmp_path / name).touch()
    with pytest.raises(TensorError, match=message) as caught:
        find_weights(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_missing_path(tmp_path):
    for path in (tmp_path / "gone", tmp_path / "gone" / "model.safetensors"):
        with pytest.raises(TensorError, match=r"gone.*does not exist"):
            open_tensors(path)


def test_index_beside_a_single_file(tmp_path):
    save(tmp_path / "model.safetensors", a=np.zeros(1))
    save_index(tmp_path / "model.safetensors.index.json", {"a": "model.safetensors"})
    with open_tensors(tmp_path) as files:
        assert list(files) == ["a"]
    save_index(tmp_path / "model.safetensors.index.json", {"a": "model-00001-of-00001.safetensors"})
    with pytest.raises(TensorError, match=r"holds both model\.safetensors and model\.safetensors\.index\.json"):
        open_tensors(tmp_path)


# Shards.


def test_all_problems_of_the_shards_are_in_one_error(tmp_path):
    save(tmp_path / "1.safetensors", a=np.zeros(1), b=np.zeros(1))
    save(tmp_path / "2.safetensors", b=np.zeros(1))
    (tmp_path / "3.safetensors").write_bytes(LFS_POINTER)
    weight_map = {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors", "d": "3.safetensors"}
    weight_map |= {"e": "4.safetensors", "f": "5.safetensors"}
    save_index(tmp_path / "model.safetensors.index.json", weight_map)
    with pytest.raises(TensorError) as caught:
        open_tensors(tmp_path)
    expected = [
        f"tensor 'b' is in {tmp_path}/1.safetensors and in {tmp_path}/2.safetensors",
        f"{tmp_path}/3.safetensors: a git-lfs pointer, not the weights; run `git lfs pull` in its repository",
        f"{tmp_path}/4.safetensors: missing",
        f"{tmp_path}/5.safetensors: missing",
        f"{tmp_path}/1.safetensors: lacks the tensor 'b' that the index assigns to it",
        f"{tmp_path}/2.safetensors: lacks the tensor 'c' that the index assigns to it",
    ]
    assert sorted(set(caught.value.problems) - set(expected)) == []
    assert set(expected) - set(caught.value.problems) <= {expected[4]}  # either file may count as lacking b
    assert all(problem in str(caught.value) for problem in caught.value.problems)


def test_tensors_that_the_index_omits_are_read(tmp_path):
    save(tmp_path / "1.safetensors", a=np.zeros(1), extra=np.ones(1))
    save_index(tmp_path / "model.safetensors.index.json", {"a": "1.safetensors"})
    with open_tensors(tmp_path) as files:
        assert files.read("extra") == 1


@pytest.mark.parametrize(
    "text, message",
    [
        (b"{", "no valid JSON"),
        (b"\xff", "no valid JSON"),
        (b"[" * 100_000, "no valid JSON"),
        (b"[]", "no weight_map"),
        (b'{"weight_map": {}}', "no weight_map"),
        (b'{"weight_map": {"a": 1}}', "1 is no file name"),
        (b'{"weight_map": {"a": "../b.safetensors"}}', "no file name in its folder"),
        (b'{"weight_map": {"a": "/etc/passwd"}}', "no file name in its folder"),
        (b'{"weight_map": {"a": ".."}}', "directory"),
        (LFS_POINTER, "git-lfs pointer"),
    ],
)
def test_corrupt_index(tmp_path, text, message):
    (tmp_path / "model.safetensors.index.json").write_bytes(text)
    with pytest.raises(TensorError, match=message) as caught:
        open_tensors(tmp_path)
    assert str(tmp_path) in str(caught.value)


# Damaged files. Errors of the safetensors library become one line that names the file.


def raw_file(file: Path, header: dict | bytes, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


def entry(begin: int, end: int, shape: object, dtype: str = "U8") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header, data, message",
    [
        (b"{]", b"", "invalid JSON in header"),
        ({"a": entry(0, 4, [4], "Q8")}, b"1234", "unknown variant `Q8`"),
        ({"a": entry(0, 4, [2], "F32")}, b"1234", "invalid shape, data type, or offset"),
        ({"a": entry(0, 4, [4]), "b": entry(0, 4, [4])}, b"1234", "invalid offset for tensor"),
        ({"a": entry(0, 8, [8])}, b"1234", "file not fully covered"),
        ({"a": entry(0, 4, [4])}, b"12345", "file not fully covered"),
    ],
)
def test_corrupt_safetensors(tmp_path, header, data, message):
    file = raw_file(tmp_path / "model.safetensors", header, data)
    with pytest.raises(TensorError) as caught:
        open_tensors(file)
    text = str(caught.value)
    assert text.startswith(f"{file}: truncated, or not a safetensors file (") and text.endswith("copy it again")
    assert message in text and "\n" not in text


def test_every_truncation_is_noticed(tmp_path):
    complete = safetensors.numpy.save({"a": np.zeros(3), "b": np.zeros((), np.int8)})
    file = tmp_path / "model.safetensors"
    for size in range(len(complete)):
        file.write_bytes(complete[:size])
        with pytest.raises(TensorError, match="truncated"):
            open_tensors(file)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 255))
def test_damage_never_escapes_as_another_error(position, byte):
    content = bytearray(safetensors.numpy.save({"a": np.zeros(2), "bc": np.zeros((1, 2), np.int8)}, {"m": "n"}))
    content[position % len(content)] = byte
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "model.safetensors"
        file.write_bytes(content)
        try:
            with open_tensors(file) as files:
                for key in files:
                    assert files.read(key).shape == files[key].shape
        except TensorError:
            pass


@pytest.mark.parametrize(
    "shape, dtype, size",
    [([3, 4], "F4", 6), ([2], "F8_E4M3", 2), ([1] * 65, "U8", 1), ([0, 2**62, 2**62], "U8", 0)],
    ids=["packed", "float8", "rank", "huge"],
)
def test_tensors_that_numpy_cannot_hold(tmp_path, shape, dtype, size):
    """Dtype and shape of a tensor that NumPy cannot hold are known, so that import can list it; reading it fails."""
    file = raw_file(tmp_path / "model.safetensors", {"a": entry(0, size, shape, dtype)}, bytes(size))
    with open_tensors(file) as files:
        assert (files["a"].tag, files["a"].shape) == (dtype, tuple(shape))
        with pytest.raises(TensorError, match=f"{file}: .*'a'"):
            files.read("a")


def test_other_files(tmp_path):
    for name, message in [("model.safetensors", "truncated"), ("model.gguf", "not a name of weights")]:
        (tmp_path / name).touch()
        with pytest.raises(TensorError, match=message):
            open_tensors(tmp_path / name)


def test_file_that_shrinks_while_open(tmp_path):
    save(tmp_path / "model.safetensors", a=np.zeros(100))
    with open_tensors(tmp_path) as files, (tmp_path / "model.safetensors").open("r+b") as handle:
        handle.truncate(200)
        with pytest.raises(TensorError, match=r"model\.safetensors: cannot read the tensor 'a' \("):
            files.read("a")
