"""Headers of weights and settings that would take a hundred times the memory of the file are not parsed."""

import zipfile

import pytest

from convert.torch_zip import torch_zip
from ross_jax.config import UserError
from ross_jax.convert.sources import read_json
from ross_jax.convert.tensors import TensorError, open_tensors


def test_a_safetensors_header_of_brackets(tmp_path):
    """99 MB of `[]` would take 2.8 GB."""
    path = tmp_path / "model.safetensors"
    path.write_bytes((99_000_000).to_bytes(8, "little") + b"[]" * 49_500_000)
    with pytest.raises(TensorError, match=f"{path}: .*a header of 99000000 bytes"):
        open_tensors(path)


def test_a_pickle_of_lists(tmp_path):
    path = torch_zip(tmp_path / "model.bin", b"]" * (2**22 + 1))
    with pytest.raises(TensorError, match=f"{path}: its data.pkl has 419[0-9]{{4}} bytes, more than 4194304"):
        open_tensors(path)


def test_an_archive_of_many_members(tmp_path):
    """Python takes twenty times the memory of a zip's directory."""
    path = tmp_path / "model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(140):
            archive.writestr(f"archive/{number}/" + "a" * 60_000, b"")
    with pytest.raises(TensorError, match=f"{path}: .*a directory of [0-9]* bytes"):
        open_tensors(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}", "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "4300 digits"),
        (b'{"a": [' + b"[]," * 3_000_000 + b"[]]}", "lists and objects"),
        (b'{"a": "' + b"a" * 2**24 + b'"}', "more than 16777216 bytes"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
    ],
)
def test_settings_have_bounds(content, reason, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path}: not valid JSON .*{reason}"):
        read_json(path)
