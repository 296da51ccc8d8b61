"""Data in published layouts becomes the same samples, at random and in worker processes, and says what is wrong."""

import gzip
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from data.layouts import COUNT, LAYOUTS, QUESTION, answer, colour, llava, onevision, picture
from ross_jax.config import UserError, from_dict
from ross_jax.data.encoders import build_encoder, build_training_encoder
from ross_jax.data.images import ImageError, decode
from ross_jax.data.samples import SampleError
from ross_jax.data.sources import Limits, SourceConfig, open_source
from ross_jax.data.spelling import briefly
from ross_jax.data.turns import read_turns
from tokenizer_fixtures import byte_level_tokenizer


def open_(values: dict, **changes):
    return open_source(from_dict(SourceConfig, values | changes))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_the_same(tmp_path, layout):
    source = open_(LAYOUTS[layout](tmp_path / "data"))
    copy = pickle.loads(pickle.dumps(source))
    assert len(source) == COUNT
    encode = build_encoder("chatml", byte_level_tokenizer())
    for index in np.random.RandomState(0).permutation(COUNT).tolist():
        sample = copy[index]
        assert [colour(decode(image.read(), image.name)) for image in sample.images] == [index]
        turns = read_turns(sample.record)
        assert turns[0][0] == "user" and turns[0][1].startswith("<image>")
        assert QUESTION in turns[0][1] or "captions" in layout
        assert turns[1] == ("assistant", answer(index))
        assert encode(sample.record).num_images == 1
    assert open_(LAYOUTS[layout](tmp_path / "other")).fingerprint == source.fingerprint


def test_conditions_filter_rows_and_items(tmp_path):
    values = LAYOUTS["finevision"](tmp_path / "data")
    strict = open_(values, where=("relevance_min >= 4",))
    assert [colour(decode(s.images[0].read(), s.id)) for s in map(strict.__getitem__, range(len(strict)))] == [4, 8, 9]
    items = open_(values, where=("relevance_ratings >= 3", "source == 'made'"))
    assert [len(items[i].record["texts"]) for i in range(5)] == [1, 1, 2, 2, 2]
    assert strict.fingerprint != items.fingerprint
    for where, message in [
        ("relevance >= 4", r"no column 'relevance' \(did you mean 'relevance_min'\?\)"),
        ("relevance_min >> 4", "the column has int64 values"),
        ("relevance_min", "is no condition"),
        ("relevance_min > 9", r"no row satisfies \['relevance_min > 9'\]"),
        ("source > 3", "the column has string values"),
    ]:
        with pytest.raises(UserError, match=message):
            open_(values, where=(where,))


def test_texts_are_read_without_images(tmp_path, monkeypatch):
    """Measuring lengths decodes no image, and each row group of texts once."""
    source, decoded = open_(onevision(tmp_path / "data")), []
    original = parquet.ParquetFile.read_row_group

    def read(self, group, columns):
        decoded.append(columns)
        return original(self, group, columns)

    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", read)
    samples = [source[i] for i in range(COUNT)]
    assert [len(sample.images) for sample in samples] == [1] * COUNT
    assert len(decoded) == 6 and all("image.path" in columns and "image" not in columns for columns in decoded)
    samples[0].images[0].read()
    assert decoded[6:] == [["image"]]


def test_few_row_groups_are_kept(tmp_path):
    source = open_source(from_dict(SourceConfig, onevision(tmp_path / "data")), limits=Limits(shuffle_memory=1))
    for index in (0, 11, 5, 0, 7):
        assert colour(decode(source[index].images[0].read(), "")) == index
        assert len(source._decoded) <= 2


def write_rows(path: Path, **columns) -> dict:
    parquet.write_table(pyarrow.table(columns), path)
    return {"path": str(path), "kind": "parquet"}


def test_rows_without_images_and_broken_rows(tmp_path):
    image = [{"bytes": picture(1), "path": None}, None, {"bytes": b"no image", "path": "x.jpg"}]
    turns = [llava(1), [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}], None]
    source = open_(write_rows(tmp_path / "a.parquet", image=image, conversations=turns))
    assert [len(source[i].images) for i in range(3)] == [1, 0, 1]
    assert source[1].id == "a.parquet[1]" and str(source[1]).startswith(f"{tmp_path}/a.parquet, row 1: ")
    with pytest.raises(ImageError, match=r"x\.jpg: empty, or no image"):
        decode(source[2].images[0].read(), source[2].images[0].name)
    captions = write_rows(tmp_path / "b.parquet", image=[picture(3)], text=["a hill"])
    assert open_(captions, caption="text")[0].record["conversations"][1] == {"from": "gpt", "value": "a hill"}
    assert "conversations" not in open_(captions)[0].record
    with pytest.raises(UserError, match=r"no column 'txt' \(did you mean 'text'\?\)"):
        open_(captions, caption="txt")


def test_what_is_no_parquet(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    for path, message in [("empty", "no file in it ends in .parquet"), ("none.parquet", "does not exist")]:
        with pytest.raises(UserError, match=message):
            open_({"path": str(tmp_path / path), "kind": "parquet"})
    with pytest.raises(UserError, match=r"a\.parquet: no Parquet file that can be read"):
        open_({"path": str(tmp_path / "a.parquet"), "kind": "parquet"})
    with pytest.raises(UserError, match=r"no column of .*; it has \['x'\]"):
        open_(write_rows(tmp_path / "b.parquet", x=[1]))
    source = open_(onevision(tmp_path / "data"))
    shard = sorted((tmp_path / "data").iterdir())[1]
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"00001-of-00002\.parquet: was changed after it was opened"):
        source[9]


def test_order_of_image_parts():
    """Parts with an index, parts with an image of their own, and marks, in the order of the text."""
    from ross_jax.data.fields import record_images

    parts = [{"type": "image", "index": 1, "text": None}, {"type": "text", "text": "and <image>", "index": None}]
    parts += [{"type": "image", "image": "own.jpg"}, {"type": "image", "index": None}]
    record = {"messages": [{"role": "user", "content": parts}], "images": ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]}
    assert record_images(record) == ["1.jpg", "0.jpg", "own.jpg", "2.jpg", "3.jpg"]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_members_in_every_format_of_tar(tmp_path, kind):
    """Long names and other alphabets, as Python's own reader has them; members of no sample are left out."""
    names = [
        "a.jpg",
        "a.json",
        "b.cls",
        f"{'folder/' * 12}c.jpg",
        "none/\u732b.jpg",
        "x.jpg",
        "x.cls",
        "x.0.jpg",
        "x.txt",
    ]
    names += [] if kind == tarfile.USTAR_FORMAT else [f"{'folder/' * 30}d.jpg", "y" * 150 + ".png"]
    with tarfile.open(tmp_path / "a.tar", "w", format=kind) as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            data = b'{"caption": "a"}' if name.endswith("json") else name.encode()
            member.size, member.mtime = len(data), 2.5 if kind == tarfile.PAX_FORMAT else 2
            archive.addfile(member, io.BytesIO(data))
    source = open_({"path": str(tmp_path / "a.tar"), "kind": "webdataset"})
    found = {image.name: image.read() for i in range(len(source)) for image in source[i].images}
    assert {briefly(name): name.encode() for name in names if name.endswith(("jpg", "png"))} == found
    assert [len(source[i].images) for i in range(4)] == [1, 1, 1, 2]
    assert source[3].record["conversations"][1]["value"] == "x.txt"


def test_what_is_no_webdataset(tmp_path):
    good = LAYOUTS["webdataset"](tmp_path / "data")
    shard = tmp_path / "data" / "00001.tar"
    content = shard.read_bytes()
    cases = {
        "cut": (content[:3000], r"00001\.tar: is no tar file that can be read \((a member of|no header)"),
        "text": (b"no tar" * 200, r"00001\.tar: is no tar file .*no header at byte 0"),
        "flipped": (bytes([content[0] ^ 1]) + content[1:], "no header at byte 0"),
        "compressed": (gzip.compress(content), r"00001\.tar: is compressed with gzip; decompress it"),
    }
    for data, message in cases.values():
        shard.write_bytes(data)
        with pytest.raises(UserError, match=message):
            open_(good)
    (tmp_path / "empty").mkdir()
    for path, message in [("empty", "no file in it ends in .tar"), ("absent.tar", "cannot be read")]:
        with pytest.raises(UserError, match=message):
            open_({"path": str(tmp_path / path), "kind": "webdataset"})
    with tarfile.open(tmp_path / "texts.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("a.cls"), io.BytesIO())
    with pytest.raises(UserError, match="no sample in it"):
        open_({"path": str(tmp_path / "texts.tar"), "kind": "webdataset"})


def test_broken_members_are_broken_samples(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in {"a.json": b"{", "b.json": b"7", "c.txt": b"\xff", "d.json": b'{"id": 1}'}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    source = open_({"path": str(tmp_path / "a.tar"), "kind": "webdataset"})
    for index, message in enumerate([r"a\.tar, a: .*Expecting", "holds a JSON int", r"c\.txt is not UTF-8 at byte 0"]):
        with pytest.raises(SampleError, match=message):
            source[index]
    with pytest.raises(UserError, match="no image"):
        build_training_encoder("chatml", byte_level_tokenizer())(source[3].record)
