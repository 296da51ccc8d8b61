"""Data files that are something else than they seem, and folders of links."""

import gzip
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from ross_jax.config import UserError
from ross_jax.data.sources import SourceConfig, open_source

IMAGE_FOLDER = "images"  # the kind of a source without text

RECORD = {"id": 0, "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "cafe"}]}

LIST = json.dumps([RECORD] * 40, indent=1).encode()
LINES = b"\n".join([json.dumps(RECORD).encode()] * 40)
LATIN_1 = [json.dumps(RECORD).encode()] * 30 + [json.dumps(RECORD).encode().replace(b"cafe", b"caf\xe9")]
LATIN_1_BYTE = b"\n".join(LATIN_1).index(b"\xe9")
PARQUET = b"PAR1\x15\x04\x15\xc8" + bytes(range(256)) + b"PAR1"

FILES = {
    "list.jsonl": (LIST, [r"\blist\b", r"\.json\b"]),
    "data.json.gz": (gzip.compress(LIST), ["g(un)?zip|compress"]),
    "data.jsonl.gz": (gzip.compress(LINES), ["g(un)?zip|compress"]),
    "compressed.json": (gzip.compress(LIST), ["g(un)?zip|compress"]),
    "train.parquet": (PARQUET, ["(?i)parquet"]),
    "latin1.jsonl": (b"\n".join(LATIN_1), [rf"\bline 31\b|\bbyte {LATIN_1_BYTE}\b"]),
    "latin1.json": (b"[" + b",".join(LATIN_1) + b"]", [rf"\bbyte {LATIN_1_BYTE + 1}\b"]),
    "lines.json": (LINES, [r"JSONL", r"\.jsonl\b"]),
}
"""Name -> (content, what the error must say besides the name)."""

files = pytest.mark.parametrize("name", FILES)


def explains(said: str, path: Path) -> None:
    """The error tells what the file holds without leaning on the file's name."""
    said = said.replace(str(path), "").replace(path.name, "")
    for pattern in FILES[path.name][1]:
        assert re.search(pattern, said), f"{pattern} is not in: {said}"


@files
def test_training_names_what_a_file_is(name, tmp_path):
    """A user names a file for training that another program wrote."""
    path = tmp_path / name
    path.write_bytes(FILES[name][0])
    with pytest.raises(UserError) as raised:
        open_source(SourceConfig(str(path)))[0]
    explains(str(raised.value), path)


@files
def test_inspection_names_what_a_file_is(name, call, recipe, tmp_path):
    """A user looks at such a file first."""
    path = tmp_path / name
    path.write_bytes(FILES[name][0])
    tokenizer = recipe.parent / "tokenizer"
    status, _, said = call("inspect_data", "--template", "qwen_2", "--tokenizer", tokenizer, "--data", path)
    assert status == 1
    explains(said, path)


def draw(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 9), "red").save(path)


def image_names(folder: Path) -> list[str]:
    source = open_source(SourceConfig(str(folder), kind=IMAGE_FOLDER))
    return sorted(source[i].id for i in range(len(source)))


def test_some_folders_are_links(tmp_path):
    """A subset of ImageNet whose folders of classes are links to another disk, one class apart."""
    for name in ("disk/cat", "disk/dog", "subset/bird"):
        draw(tmp_path / name / "1.png")
    for name in ("cat", "dog"):
        (tmp_path / "subset" / name).symlink_to(tmp_path / "disk" / name)
    assert image_names(tmp_path / "subset") == ["bird/1.png", "cat/1.png", "dog/1.png"]


def test_all_folders_are_links(tmp_path):
    """The same subset where every class is a link, one of them inside another folder."""
    for name in ("disk/cat", "disk/dog"):
        draw(tmp_path / name / "1.png")
    (tmp_path / "subset" / "large").mkdir(parents=True)
    (tmp_path / "subset" / "cat").symlink_to(tmp_path / "disk" / "cat")
    (tmp_path / "subset" / "large" / "dog").symlink_to(tmp_path / "disk" / "dog")
    assert image_names(tmp_path / "subset") == ["cat/1.png", "large/dog/1.png"]


def test_links_that_lead_back(tmp_path):
    """A folder that links to itself and to the folder above gives each of its images once."""
    draw(tmp_path / "subset" / "bird" / "1.png")
    (tmp_path / "subset" / "again").symlink_to(tmp_path / "subset")
    (tmp_path / "subset" / "bird" / "self").symlink_to(tmp_path / "subset" / "bird")
    assert image_names(tmp_path / "subset") == ["bird/1.png"]


def test_linked_files(tmp_path):
    """A folder of links to single files, itself reached through a link."""
    draw(tmp_path / "disk" / "1.png")
    (tmp_path / "subset").mkdir()
    (tmp_path / "subset" / "a.png").symlink_to(tmp_path / "disk" / "1.png")
    (tmp_path / "link").symlink_to(tmp_path / "subset")
    assert image_names(tmp_path / "link") == ["a.png"]
