"""Reading files of torch.save. Most files are built by hand, so that the tests do not need torch."""

import math
import os
import pickle
import struct
import tempfile
import warnings
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.torch_zip import (
    ORDERED_DICT,
    call,
    dict_of,
    floats,
    named,
    number,
    numbers,
    storage,
    string,
    tensor,
    torch_zip,
    tuple_of,
)
from ross_jax.convert import torch_pickle
from ross_jax.convert.tensors import TensorError, open_tensors


def refused(file: Path, message: str) -> TensorError:
    with pytest.raises(TensorError, match=message) as caught:
        open_tensors(file)
    assert all(str(file) in problem for problem in caught.value.problems)
    return caught.value


STORAGES = {
    "BoolStorage": np.bool_,
    "ByteStorage": np.uint8,
    "CharStorage": np.int8,
    "ShortStorage": np.int16,
    "IntStorage": np.int32,
    "LongStorage": np.int64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "ComplexFloatStorage": np.complex64,
}
UNTYPED = {
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
}


def test_every_storage_class(tmp_path):
    assert set(STORAGES) == set(torch_pickle.STORAGES)
    arrays = {name: np.arange(6).reshape(2, 3).astype(dtype) for name, dtype in STORAGES.items()}
    state = {name: tensor(storage(name, name, 6), (2, 3), (3, 1)) for name in arrays}
    file = torch_zip(tmp_path / "pytorch_model.bin", dict_of(state), {k: a.tobytes() for k, a in arrays.items()})
    with open_tensors(tmp_path) as files:
        assert list(files) == list(arrays)
        for name, array in arrays.items():
            assert (files[name].dtype, files[name].shape, files[name].file) == (array.dtype, array.shape, file)
            read = files.read(name)
            assert (read.dtype, read.tobytes()) == (array.dtype, array.tobytes())


def test_dtypes_beside_untyped_storages(tmp_path):
    arrays = {name: np.arange(1, 7).astype(dtype) for name, dtype in UNTYPED.items()}
    state = {}
    for name, array in arrays.items():
        untyped = storage("UntypedStorage", name, array.nbytes, module="torch.storage")
        state[name] = tensor(untyped, (2, 2), (2, 1), 2, named("torch", name), version="v3")
    torch_zip(tmp_path / "a.bin", dict_of(state), {k: a.tobytes() for k, a in arrays.items()})
    with open_tensors(tmp_path / "a.bin") as files:
        for name, array in arrays.items():
            assert files.read(name).dtype == array.dtype
            assert files.read(name).tobytes() == array[2:].tobytes()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_views_of_a_storage(data):
    """A tensor of any shape, strides and offset inside its storage equals NumPy's view."""
    stored = np.arange(60, dtype=np.float32)
    shape = data.draw(st.lists(st.integers(0, 4), max_size=3))
    room = 60
    strides = []
    for n in shape:
        step = data.draw(st.integers(0, (room - 1) // (n - 1) if n > 1 else 2**62))
        strides.append(step)
        room -= (n - 1) * step if n > 1 else 0
    offset = data.draw(st.integers(0, room - 1))
    steps = [4 * step if n > 1 else 0 for n, step in zip(shape, strides, strict=True)]
    expected = np.ndarray(shape, np.float32, stored.tobytes(), 4 * offset, steps)
    with tempfile.TemporaryDirectory() as name:
        file = torch_zip(
            Path(name) / "a.pt", dict_of({"x": floats(60, shape, strides, offset)}), {"0": stored.tobytes()}
        )
        with open_tensors(file) as files:
            read = files.read("x")
            assert read.shape == expected.shape and read.flags.c_contiguous
            np.testing.assert_array_equal(read, expected)


def test_stride_of_a_single_step_may_be_anything(tmp_path):
    state = dict_of({"x": floats(4, (1, 2), (2**70, 2)), "empty": floats(4, (0, 2), (2**70, 2**70))})
    torch_zip(tmp_path / "a.bin", state, {"0": np.arange(4, dtype=np.float32).tobytes()})
    with open_tensors(tmp_path / "a.bin") as files:
        assert files.read("x").tolist() == [[0, 2]]
        assert files.read("empty").shape == (0, 2)


def test_transposed_bfloat16(tmp_path):
    stored = np.arange(6).astype(ml_dtypes.bfloat16)
    state = {"x": tensor(storage("BFloat16Storage", "0", 6), (3, 2), (1, 3))}
    torch_zip(tmp_path / "a.bin", dict_of(state), {"0": stored.tobytes()})
    with open_tensors(tmp_path / "a.bin") as files:
        assert files.read("x").dtype == ml_dtypes.bfloat16
        assert files.read("x").tolist() == [[0, 3], [1, 4], [2, 5]]


def test_state_dict_of_a_module(tmp_path):
    """A state dict may have `_metadata`, parameters, shared storages, memo references and names of protocol 4."""
    item = floats(4, (2, 2), (2, 1))
    parameter = call(named("torch._utils", "_rebuild_parameter"), item, b"\x88", ORDERED_DICT)
    metadata = dict_of({"_metadata": ORDERED_DICT + string("") + dict_of({"version": number(1)}) + b"s"})
    framed = b"\x8c\x0ctorch._utils\x94" + b"\x8c\x12_rebuild_tensor_v2\x94\x93"
    flipped = call(framed, storage("FloatStorage", "0", 4), number(0), numbers([2, 2]), numbers([1, 2]), b"\x89", b"N")
    state = ORDERED_DICT + b"("
    state += string("a") + parameter + b"q\x05" + string("again") + b"h\x05" + string("b") + flipped
    state += b"u" + metadata + b"b"
    torch_zip(tmp_path / "a.bin", state, {"0": np.arange(4, dtype=np.float32).tobytes()})
    with open_tensors(tmp_path / "a.bin") as files:
        assert {key: files.read(key).tolist() for key in files} == {
            "a": [[0, 1], [2, 3]],
            "again": [[0, 1], [2, 3]],
            "b": [[0, 2], [1, 3]],
        }


def test_memo_of_protocol_4(tmp_path):
    names = [b"\x8c\x01" + name for name in (b"a", b"b")]
    item = floats(2, (2,), (1,))
    state = b"\x95" + bytes(8) + b"}\x94(" + names[0] + b"\x94" + item + b"\x94" + names[1] + b"h\x02" + b"u"
    torch_zip(tmp_path / "a.bin", state, {"0": np.arange(2, dtype=np.float32).tobytes()})
    with open_tensors(tmp_path / "a.bin") as files:
        assert {key: files.read(key).tolist() for key in files} == {"a": [0, 1], "b": [0, 1]}


def test_sharded(tmp_path):
    for i in (1, 2):
        data = {"0": np.full(2, i, np.float32).tobytes()}
        torch_zip(tmp_path / f"pytorch_model-0000{i}-of-00002.bin", dict_of({f"k{i}": floats(2, (2,), (1,))}), data)
    index = tmp_path / "pytorch_model.bin.index.json"
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    index.write_text(f'{{"weight_map": {{"k1": "{names[0]}", "k2": "{names[1]}"}}}}')
    with open_tensors(tmp_path) as files:
        assert {key: files.read(key).tolist() for key in files} == {"k1": [1, 1], "k2": [2, 2]}
    (tmp_path / names[1]).unlink()
    with pytest.raises(TensorError, match=rf"{names[1]}: missing"):
        open_tensors(tmp_path)


# Malicious and damaged pickles.


class Evil:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", ["os.system", "eval", "nested"])
def test_nothing_is_executed(tmp_path, protocol, kind):
    canary = tmp_path / "canary"
    attack = {
        "os.system": Evil(os.system, f"touch {canary}"),
        "eval": Evil(eval, f"open({str(canary)!r}, 'w').close()"),
        "nested": [{"a": (Evil(print), Evil(open, str(canary), "w"))}],
    }[kind]
    state = pickle.dumps({"weight": attack}, protocol)
    file = torch_zip(tmp_path / "a.bin", b"", extra={"data.pkl": state})
    error = refused(file, "refused: its pickle (names|uses)")
    assert not canary.exists()
    if protocol >= 2:
        assert {"os.system": ".system", "eval": ".eval", "nested": ".print"}[kind] in str(error)
    pickle.loads(state)
    assert canary.exists()  # the attack would have worked


def test_nothing_is_imported(tmp_path, monkeypatch):
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    refused(torch_zip(tmp_path / "a.bin", dict_of({"a": named("trap", "x")})), r"names 'trap\.x'")


@pytest.mark.parametrize(
    "opcodes, name",
    [
        (b"\x82\x01", "EXT1"),  # a registered extension
        (named("torch", "FloatStorage") + b")\x81", "NEWOBJ"),
        (named("torch", "FloatStorage") + b")}\x92", "NEWOBJ_EX"),
        (b"(icollections\nOrderedDict\n", "INST"),
        (b"(" + named("collections", "OrderedDict") + b"o", "OBJ"),
        (b"P0\n", "PERSID"),
        (b"\x8f", "EMPTY_SET"),
        (b"\x96" + struct.pack("<Q", 2**40), "BYTEARRAY8"),
        (b"\x8b" + struct.pack("<I", 2**30), "LONG4"),
        (b"S'x'\n", "STRING"),
    ],
)
def test_other_opcodes_are_refused(tmp_path, opcodes, name):
    refused(torch_zip(tmp_path / "a.bin", dict_of({"a": opcodes})), f"refused: its pickle uses {name}, which")


def test_a_memo_index_costs_no_memory(tmp_path):
    """A large memo index needs no memory. Python's own unpickler would allocate 64 GiB here."""
    item = floats(2, (2,), (1,)) + b"r\xff\xff\xff\xff"
    torch_zip(tmp_path / "a.bin", dict_of({"a": item, "b": b"j\xff\xff\xff\xff"}), {"0": bytes(8)})
    with open_tensors(tmp_path / "a.bin") as files:
        assert list(files) == ["a", "b"]


def test_deep_nesting_does_not_overflow_the_stack(tmp_path):
    deep = number(1) + b"\x85" * 200_000
    refused(torch_zip(tmp_path / "a.bin", b"}" + deep + number(1) + b"s"), "a dict key of type tuple")
    refused(torch_zip(tmp_path / "b.bin", dict_of({"a": deep})), "'a': expected a tensor, found a value of type tuple")


@pytest.mark.parametrize(
    "module, name",
    [
        ("torch", "load"),
        ("torch._utils", "_rebuild_sparse_tensor"),
        ("torch.nn.modules.linear", "Linear"),
        ("torch._utils _rebuild_tensor_v2", "x"),
        ("collections", "OrderedDict.fromkeys"),
        ("builtins", "getattr"),
        ("torch", "QInt8Storage"),
    ],
)
def test_other_names_are_refused(tmp_path, module, name):
    message = f"refused: its pickle names .{module.replace(' ', '.')}.{name}.,"
    refused(torch_zip(tmp_path / "a.bin", dict_of({"a": call(named(module, name))})), message)
    stacked = string(module) + string(name) + b"\x93"
    refused(torch_zip(tmp_path / "b.bin", dict_of({"a": stacked})), message)


def test_state_is_set_on_nothing_but_dicts(tmp_path):
    victims = [floats(1, (), ()), named("collections", "OrderedDict"), named("torch", "FloatStorage"), string("x")]
    for victim in victims:
        refused(
            torch_zip(tmp_path / "a.bin", victim + dict_of({"shape": number(9)}) + b"b", {"0": b"1234"}),
            "sets the state",
        )


@pytest.mark.parametrize(
    "state",
    [
        b"",
        b"(",
        b"0",
        b"h\x07",
        b"R",
        b"u",
        string("x") + b"q\x00" + b"\x85" * 3 + b"Q",
        string("x") + tuple_of() + b"R",
        call(named("torch", "FloatStorage")),
        call(named("torch._utils", "_rebuild_tensor_v2")),
        tensor(string("x"), (), ()),
        tensor(storage("float32", "0", 1), (), ()),
        tensor(storage("FloatStorage", "0", -1), (), ()),
        tensor(storage("UntypedStorage", "0", 4, module="torch.storage"), (), ()),
        tensor(storage("UntypedStorage", "0", 4, module="torch.storage"), (), (), 0, string("x"), version="v3"),
        tensor(storage("OrderedDict", "0", 4, module="collections"), (), ()),
        floats(1, (1,), ()),
        floats(1, (-1,), (1,)),
        floats(1, (1,), (-1,)),
        floats(1, (), (), -1),
        call(named("torch._utils", "_rebuild_parameter"), string("x"), b"\x88", b"N"),
        b"}" + b"N" + string("x") + b"s",
        b"}" + tuple_of(string("a")) + string("x") + b"s",
        b"]" + string("a") + string("x") + b"s",
        b"}" + string("a") + b"a",
        dict_of({})[:-1] + string("a") + b"u",
    ],
)
def test_corrupt_pickles(tmp_path, state):
    refused(torch_zip(tmp_path / "a.bin", state, {"0": bytes(4)}), "its data.pkl is corrupt|its pickle uses POP")


def test_shared_parts_take_no_exponential_time(tmp_path):
    bomb = string("x") + b"q\x00" + b"".join(b"h\x00" + b"\x86q\x00" for _ in range(100))
    refused(torch_zip(tmp_path / "a.bin", b"}" + bomb + string("y") + b"s"), "corrupt")
    refused(torch_zip(tmp_path / "b.bin", dict_of({"a": bomb})), "'a': expected a tensor, found a value of type tuple")


def test_values_that_are_no_tensors_are_named(tmp_path):
    state = {"state_dict": dict_of({"a": floats(1, (), ())}), "step": number(3), "w": floats(1, (), ())}
    error = refused(torch_zip(tmp_path / "a.bin", dict_of(state), {"0": bytes(4)}), "2 problems")
    assert "'state_dict': expected a tensor, found a dict; save only the flat state dict" in error.problems[0]
    assert "'step': expected a tensor, found a value of type int" in error.problems[1]


def test_roots_that_are_no_state_dict(tmp_path):
    for state, kind in [
        (floats(1, (), ()), "a bare tensor"),
        (b"]", "a value of type list"),
        (b"N", "a value of type NoneType"),
    ]:
        refused(torch_zip(tmp_path / "a.bin", state, {"0": bytes(4)}), f"holds {kind}, not a state dict")
    refused(torch_zip(tmp_path / "b.bin", b"}" + number(1) + floats(1, (), ()) + b"s", {"0": bytes(4)}), "1: the name")


@pytest.mark.parametrize(
    "item, message",
    [
        (floats(4, (5,), (1,)), "reach out of its storage of 16 bytes"),
        (floats(4, (2, 2), (3, 1)), "reach out"),
        (floats(4, (2,), (4,)), "reach out"),
        (floats(4, (2,), (1,), 3), "reach out"),
        (floats(4, (), (), 4), "reach out"),
        (floats(4, (0,), (1,), 5), "reach out"),
        (floats(4, (2,), (2**70,)), "reach out"),
        (floats(4, (1,), (1,), 2**70), "reach out"),
        (floats(5, (4,), (1,)), "its storage needs 20 bytes, data/0 has 16"),
        (floats(2**70, (2**40,), (1,)), "its storage needs"),
        (floats(4, (2**40,), (0,)), "expands 16 bytes"),
        (floats(4, (2**63,), (0,)), "too large"),
        (floats(4, (0, 2**40, 2**40), (1, 1, 1)), "too large"),
        (floats(4, [1] * 65, [1] * 65), "65 dimensions"),
        (tensor(storage("FloatStorage", "7", 4), (4,), (1,)), "storage data/7 is not in the file"),
        (tensor(storage("FloatStorage", "../version", 1), (), ()), r"storage data/\.\./version is not"),
        (tensor(storage("FloatStorage", "0", 4), (4,), (1,), 0, dict_of({"conj": b"\x88"})), "conjugated"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, item, message):
    refused(torch_zip(tmp_path / "a.bin", dict_of({"w": item}), {"0": bytes(16)}), message)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 255), st.booleans())
def test_damage_never_escapes_as_another_error(position, byte, insert):
    state = dict_of({"a": floats(4, (2, 2), (1, 2)), "b": floats(4, (2,), (1,), 2)})
    content = bytearray(b"\x80\x02" + state + b".")
    position %= len(content)
    content[position : position + (not insert)] = bytes([byte])
    with tempfile.TemporaryDirectory() as name:
        file = torch_zip(Path(name) / "a.bin", b"", {"0": bytes(16)}, extra={"data.pkl": bytes(content)})
        try:
            with open_tensors(file) as files:
                for key in files:
                    assert files.read(key).nbytes <= 2**24
        except TensorError:
            pass


# Other archives and damaged ones.


GOOD = dict_of({"w": floats(4, (4,), (1,))})


def test_other_archives_and_formats(tmp_path):
    file = tmp_path / "a.bin"
    again = r"re-save it with torch\.save.*or convert it to safetensors"
    file.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")
    refused(file, "legacy torch file.*" + again)
    file.write_bytes(b"")
    refused(file, "no zip file.*" + again)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(file, "git-lfs pointer")
    torch_zip(file, GOOD, {"0": bytes(16)}, extra={"constants.pkl": b""})
    refused(file, "TorchScript.*" + again)
    torch_zip(file, GOOD, {"0": bytes(16)}, extra={"code/__torch__.py": b""})
    refused(file, "TorchScript")
    torch_zip(file, GOOD, {"0": bytes(16)}, compression=zipfile.ZIP_DEFLATED)
    refused(file, "'archive/data/0' is compressed.*" + again)
    torch_zip(file, GOOD, {"0": bytes(16)}, extra={"byteorder": b"big"})
    refused(file, "big-endian")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme", "")
    refused(file, "not as torch.save writes it")


def test_names_that_are_there_twice(tmp_path):
    file = torch_zip(tmp_path / "a.bin", GOOD, {"0": bytes(16)})
    with warnings.catch_warnings(), zipfile.ZipFile(file, "a") as archive:
        warnings.simplefilter("ignore", UserWarning)
        archive.writestr("archive/data/0", bytes(16))
    refused(file, "not as torch.save writes it")


def test_members_must_end_inside_the_file(tmp_path):
    file = torch_zip(tmp_path / "a.bin", dict_of({"w": floats(10**6, (10**6,), (1,))}), {"0": bytes(123)})
    content = file.read_bytes()
    assert content.count(struct.pack("<II", 123, 123)) == 2
    file.write_bytes(content.replace(struct.pack("<II", 123, 123), struct.pack("<II", 4 * 10**6, 4 * 10**6)))
    refused(file, "'archive/data/0' ends beyond the file")


def test_pickle_size_is_limited(tmp_path, monkeypatch):
    file = torch_zip(tmp_path / "a.bin", GOOD, {"0": bytes(16)})
    open_tensors(file).close()
    monkeypatch.setattr(torch_pickle, "MAX_PICKLE_BYTES", 20)
    refused(file, "data.pkl has")


def test_every_truncation_is_noticed(tmp_path):
    whole = torch_zip(tmp_path / "whole.bin", GOOD, {"0": bytes(16)}).read_bytes()
    file = tmp_path / "a.bin"
    for size in range(2, len(whole)):
        file.write_bytes(whole[:size])
        refused(file, "truncated or corrupt zip")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_archives_never_escape_as_another_error(data):
    with tempfile.TemporaryDirectory() as name:
        file = torch_zip(Path(name) / "a.bin", GOOD, {"0": bytes(16)})
        content = bytearray(file.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        file.write_bytes(content)
        try:
            with open_tensors(file) as files:
                for key in files:
                    files.read(key)
        except TensorError:
            pass


# Files written by torch.


@pytest.mark.parity
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_files_of_torch(tmp_path, protocol):
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name in torch_pickle.TORCH_DTYPES:
        bits = torch.randint(0, 2 if name == "bool" else 256, (24 * 8,), dtype=torch.uint8, generator=generator)
        size = torch.empty((), dtype=getattr(torch, name)).element_size()
        state[name] = bits[: 24 * size].view(getattr(torch, name)).reshape(2, 3, 4)
    whole = torch.randn(6, 8, generator=generator)
    state |= {"whole": whole, "transposed": whole.T, "part": whole[2:4, 1::3], "scalar": whole[3, 3]}
    state |= {"expanded": whole[:1].expand(5, 8), "empty": torch.zeros(0, 3), "zero": torch.zeros(())}
    state["parameter"] = torch.nn.Parameter(whole)
    torch.save(state, tmp_path / "a.bin", pickle_protocol=protocol)
    with open_tensors(tmp_path / "a.bin") as files:
        assert list(files) == list(state)
        for key, expected in state.items():
            read = files.read(key)
            tag = torch_pickle.TORCH_DTYPES[str(expected.dtype).removeprefix("torch.")]
            assert (read.shape, files[key].tag) == (tuple(expected.shape), tag)
            expected = expected.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            assert read.tobytes() == expected.tobytes()


@pytest.mark.parity
def test_state_dict_of_a_torch_module(tmp_path):
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    with open_tensors(tmp_path) as files:
        for key, expected in module.state_dict().items():
            np.testing.assert_array_equal(files.read(key), expected.numpy())
        assert math.prod(files["1.num_batches_tracked"].shape) == 1


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_other_files_of_torch_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    file = tmp_path / "a.bin"
    torch.save({"a": torch.zeros(2)}, file, _use_new_zipfile_serialization=False)
    refused(file, "legacy torch file")
    torch.save(torch.nn.Linear(2, 2), file)
    refused(file, r"torch\.nn\.modules\.linear\.Linear")
    torch.save({"a": torch.ones(2, dtype=torch.complex64).conj()}, file)
    refused(file, "conjugated")
    torch.save({"model": {"a": torch.zeros(2)}, "epoch": 1}, file)
    refused(file, "'model': expected a tensor")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    refused(file, "TorchScript")
