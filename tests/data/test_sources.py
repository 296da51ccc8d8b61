"""Sources find each sample, work in worker processes, and explain what is wrong."""

import io
import json
import logging
import os
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tensorflow_datasets.core.features import image_feature

from data.test_archives import FILES, NAMES, STORES, write
from ross_jax.config import UserError, from_dict
from ross_jax.data.images import ImageError, decode
from ross_jax.data.records import RecordFile
from ross_jax.data.sources import (
    BrokenSamples,
    Concatenated,
    ImageSource,
    LlavaSource,
    SampleError,
    SourceConfig,
    open_source,
)

RECORDS = [
    {"id": "a", "image": "sub/0.png", "conversations": [{"from": "human", "value": "<image>\nhé?"}]},
    {"id": 7, "image": ["0.png", "1.png"], "conversations": [{"from": "human", "value": "<image><image>"}]},
    {"conversations": [{"from": "human", "value": "text only 你好"}]},
    {"id": "a", "image": "", "conversations": []},
]


# Records


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("escape", [True, False])
def test_json_and_jsonl_hold_the_same(tmp_path, indent, escape):
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(RECORDS, indent=indent, ensure_ascii=escape) + "\n")
    lines = [json.dumps(record, ensure_ascii=escape) for record in RECORDS]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n\n".join(lines) + "\r\n")
    for name in ("a.json", "a.jsonl"):
        records = RecordFile(tmp_path / name)
        assert list(records) == RECORDS and len(records) == 4
        copy = pickle.loads(pickle.dumps(records))
        assert [copy[i] for i in (3, 0, 2, 1)] == [RECORDS[i] for i in (3, 0, 2, 1)]
        assert len(pickle.dumps(records)) < 1500  # holds offsets, not records


def list_records(path: Path) -> list[dict]:
    return list(RecordFile(path))


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.dictionaries(st.text(), JSON), min_size=1),
    st.integers(0, 3),
    st.booleans(),
    st.sampled_from([1, 7, 2**20]),
)
def test_any_records_are_found(tmp_path_factory, records, indent, escape, piece):
    folder = tmp_path_factory.mktemp("records")
    try:
        (folder / "a.json").write_text(json.dumps(records, indent=indent, ensure_ascii=escape))
    except UnicodeEncodeError:  # lone surrogates cannot be written
        return
    (folder / "a.jsonl").write_text("".join(json.dumps(r, ensure_ascii=escape) + "\n" for r in records), newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ross_jax.data.records._PIECE", piece)
        assert list_records(folder / "a.json") == records
        assert list_records(folder / "a.jsonl") == records


BAD_FILES = [
    ("a.json", b"", "is empty"),
    ("a.json", b" [ ] ", "is empty: no record"),
    ("a.jsonl", b"\n\n", "is empty: no record"),
    ("a.json", b'[{"id": 1},\n {"id": }]', "line 2, column 9: Expecting value"),
    ("a.json", b'[{"id": 1},\n {"id": 2}', r"line 2, column 11: Expecting ',' or '\]'"),
    ("a.json", b'[{"id": 1},]', "line 1, column 12: Expecting value"),
    ("a.json", b'[{"id": 1}] x', "line 1, column 13: Extra data"),
    ("a.json", b"[", "line 1, column 2: Expecting value"),
    ("a.json", '[{"é": 1},\n\n"x'.encode(), "line 3, column 1: Unterminated string"),
    ("a.json", b'{"id": 1}', "holds a JSON dict, not a list; expected a list"),
    ("a.json", b'{"id": 1}\n{"id": 2}', r"looks like JSONL: name it \.jsonl"),
    ("a.json", b"id,image\n1,a.png", r"line 1, column 1: Expecting value; .* begins with 'id,image"),
    ("a.json", b'{"id": 1,\n "x" 2}', "line 2, column 6: Expecting ':'"),
    ("a.json", b'[{"id": 1}, 7]', "item 1 is a JSON int"),
    ("a.jsonl", b'{"id": 1}\n{"id": 2\n', "line 2, column 9: Expecting"),
    ("a.jsonl", b'{"id": 1}\n\n{"id": 2} {"id": 3}\n', "line 3, column 11: Extra data"),
    ("a.jsonl", b'[{"id": 1}]\n', "line 1 is a JSON list"),
    ("a.json", b'[{"id": "\xff"}]', "is not UTF-8 at byte 9, in line 1"),
    ("a.json", '[{"id": "\u732b"},\n\n{"id": "'.encode() + b'\xe7\x8c"}]', "is not UTF-8 at byte 25, in line 3"),
    ("a.jsonl", b'{"id": 1}\n{"id": "\xff"}', "is not UTF-8 at byte 18, in line 2"),
    ("a.json", '[{"id": "\u732b\u732b"},\n{"id": "x" 7}]'.encode(), "line 2, column 12: Expecting ','"),
    ("a.json", b'[{"id": ' + b"[" * 100_000, "line 1, column 2: .*recursion"),
    ("a.jsonl", b'{"id": ' + b"1" * 5000 + b"}", "line 1, column 1: Exceeds the limit"),
    ("a.jsonl", b'{\n"id": 1}', "line 1, column 2: .*each record in one line"),
    ("a.jsonl", b' [\n{"id": 1}]', r"is a JSON list, or its beginning; .*\.json"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_files_give_the_position(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: .*{message}"):
        list_records(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [case for case in BAD_FILES if case[0] == "a.json" and case[1][:1] not in (b"{", b"i")],
)
def test_bad_files_in_small_pieces(tmp_path, monkeypatch, name, content, message):
    """Places are right wherever a piece of the file ends."""
    for size in (1, 2, 3, 5, 8):
        monkeypatch.setattr("ross_jax.data.records._PIECE", size)
        test_bad_files_give_the_position(tmp_path, name, content, message)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"absent\.json: cannot be read \(No such file"):
        list_records(tmp_path / "absent.json")


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_opening_takes_little_memory(tmp_path, monkeypatch, suffix):
    """A tenth of the file at most, whatever its characters. Pieces are small here, as the file is."""
    monkeypatch.setattr("ross_jax.data.records._PIECE", 2**12)
    record = json.dumps({"id": 1, "conversations": ["\u732b\U0001f600" * 150]}, ensure_ascii=False)
    lines = [record] * 1000
    path = tmp_path / f"a.{suffix}"
    path.write_text("\n".join(lines) if suffix == "jsonl" else "[" + ",".join(lines) + "]")
    tracemalloc.start()
    try:
        assert len(RecordFile(path)) == 1000
        assert tracemalloc.get_traced_memory()[1] < 0.1 * path.stat().st_size
    finally:
        tracemalloc.stop()


def test_lines_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n{"id": 2}\n')
    (tmp_path / "blank.jsonl").write_text('{"id": 1}\n\n{"id": 2}\n')
    assert RecordFile(tmp_path / "a.jsonl").place(1).endswith("/a.jsonl, record 1 (line 2)")
    assert RecordFile(tmp_path / "blank.jsonl").place(1).endswith("/blank.jsonl, record 1")


# LLaVA samples


@pytest.fixture
def llava(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps(RECORDS))
    return LlavaSource(tmp_path / "data.json", [write(tmp_path / "images")])


def test_llava_samples(llava):
    samples = [pickle.loads(pickle.dumps(llava))[i] for i in range(len(llava))]
    assert [sample.id for sample in samples] == ["a", "7", "data.json[2]", "a"]
    assert [sample.record for sample in samples] == RECORDS
    assert [[image.name for image in sample.images] for sample in samples] == [
        ["sub/0.png"],
        ["0.png", "1.png"],
        [],
        [],
    ]
    assert [image.read() for image in samples[1].images] == [FILES["0.png"], FILES["1.png"]]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"id": "x"}, r"sample 'x': no 'conversations'; it has \['id'\]"),
        (
            {"image": 3, "conversations": []},
            r"/data\.json, record 0: sample without an id: an image must be a file name",
        ),
        (
            {"id": 1, "image": ["a.png", ""], "conversations": []},
            r"data\.json, record 0: sample 1: an image must be a file name",
        ),
    ],
)
def test_bad_records_name_the_sample(tmp_path, record, message):
    (tmp_path / "data.json").write_text(json.dumps([record]))
    with pytest.raises(SampleError, match=message):
        LlavaSource(tmp_path / "data.json")[0]


def test_missing_images(tmp_path, llava):
    with pytest.raises(UserError, match=r"image folder '.*/nowhere' does not exist"):
        LlavaSource(tmp_path / "data.json", [str(tmp_path / "nowhere")])
    (tmp_path / "images" / "1.png").unlink()
    with pytest.raises(ImageError, match=r"1\.png: no such image in .*/images"):
        llava[1].images[1].read()
    with pytest.raises(UserError, match="no image folder is set") as error:
        LlavaSource(tmp_path / "data.json")[0].images[0].read()
    assert not isinstance(error.value, ImageError)  # the config is wrong, not the sample


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("https://example.org/a.png", "is an address.*download"),
        ("data:image/png;base64,iVBORw0KG", "image 0: is no base64"),
        ("iVBORw0KGgo=" * 100, "image 0: is no base64"),
        ("a" * 500 + ".png", "no such image"),
        ("\ud83d.png", r"\\ud83d\.png: no such image"),
    ],
)
def test_what_is_no_name_is_said_briefly(tmp_path, name, message):
    (tmp_path / "data.json").write_text(json.dumps([{"image": name, "conversations": []}]))
    with pytest.raises(ImageError, match=message) as raised:
        LlavaSource(tmp_path / "data.json", [write(tmp_path / "images")])[0].images[0].read()
    assert len(str(raised.value)) < 500 and str(raised.value).isprintable()


def test_several_places_of_images(tmp_path):
    one = write(tmp_path / "one.zip", {"0.png": b"one"})
    two = write(tmp_path / "two=2", {"0.png": b"hidden", "sub/0.png": b"two"})
    three = write(tmp_path / "three.tar", {"1.png": b"three"})
    (tmp_path / "data.json").write_text(json.dumps([{**RECORDS[0], "image": ["0.png", "sub/0.png", "coco/1.png"]}]))
    source = LlavaSource(tmp_path / "data.json", [one, two, f"coco={three}"])
    assert [image.read() for image in source[0].images] == [b"one", b"two", b"three"]


# Images without text, several sources, TFDS


@pytest.mark.parametrize("name", STORES)
def test_bare_images(tmp_path, name):
    source = open_source(from_dict(SourceConfig, {"path": write(tmp_path / name), "kind": "images"}))
    assert [source[i].id for i in range(len(source))] == NAMES
    assert "conversations" not in source[0].record
    assert source[2].images[0].read() == FILES["sub/0.png"]
    with pytest.raises(UserError, match="no image in it"):
        ImageSource(write(tmp_path / "texts", {"a.txt": b""}))
    latin_1 = ImageSource(write(tmp_path / "latin_1", {os.fsdecode(b"\xe9.png"): b""}))
    assert len(latin_1.fingerprint) == 64


def test_concatenated(tmp_path, llava):
    images = ImageSource(tmp_path / "images")
    both = Concatenated([images, llava, images])
    assert [both[i].id for i in range(len(both))] == [*NAMES, "a", "7", "data.json[2]", "a", *NAMES]
    assert both.fingerprint != Concatenated([llava, images, images]).fingerprint


TFDS_PREPARE = """
import io, sys
import tensorflow_datasets as tfds
from PIL import Image

def png(value):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (value, 0, 0)).save(buffer, "PNG")
    buffer.seek(0)
    return buffer

class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        features = {"image": tfds.features.Image(shape=(None, None, 3)), "caption": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))
    def _split_generators(self, manager):
        return {"train": ((i, {"image": png(i), "caption": f"image {i}"}) for i in range(5))}
    def _generate_examples(self):
        pass

Tiny(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""


def test_tfds(tmp_path):
    # A process of its own keeps the builder class out of TFDS's registry, so that the data set is found on disk.
    subprocess.run([sys.executable, "-c", TFDS_PREPARE, str(tmp_path)], check=True, capture_output=True)
    config = SourceConfig("tiny", "tfds", data_dir=str(tmp_path), caption="caption")
    source = pickle.loads(pickle.dumps(open_source(config)))
    assert len(source) == 5
    for i in range(5):
        sample = source[i]
        value = int(np.asarray(decode(sample.images[0].read(), sample.id))[0, 0, 0])
        assert sample.id == f"tiny/train/{i}"
        assert [m["value"] for m in sample.record["conversations"]] == ["<image>", f"image {value}"]
    assert "conversations" not in open_source(SourceConfig("tiny", "tfds", data_dir=str(tmp_path)))[0].record
    assert "tensorflow" not in sys.modules
    for change, message in [
        ({"path": "tinny"}, "'tinny', split 'train'.*not found"),
        ({"split": "test"}, "Unknown split 'test'"),
        ({"caption": "text"}, r"no feature 'text'; it has \['caption', 'image'\]"),
    ]:
        with pytest.raises(UserError, match=message):
            open_source(SourceConfig(**{**config.__dict__, **change}))


@pytest.fixture
def pillow_encodes(monkeypatch):
    """Makes Pillow encode TFDS's mock images, because TensorFlow, which TFDS uses, is not installed."""

    def encode(self, pixels: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, self.encoding_format)
        return buffer.getvalue()

    monkeypatch.setattr(image_feature._ImageEncoder, "_encode_image", encode)


def test_imagenet_from_mock_data(pillow_encodes):
    """Each ImageNet sample has its own image, and neither label nor file name."""
    config = SourceConfig("imagenet2012", "tfds", split="validation")
    with tfds.testing.mock_data(num_examples=5):
        source = pickle.loads(pickle.dumps(open_source(config)))
        assert len(source) == 5
        images = set()
        for i in range(5):
            sample = source[i]
            assert sample.record == {"id": f"imagenet2012/validation/{i}", "image": f"imagenet2012/validation/{i}"}
            images.add(np.asarray(decode(sample.images[0].read(), sample.id)).tobytes())
        assert len(images) == 5


class CountingReads:
    """A TFDS data source that records which examples are read."""

    def __init__(self, data):
        self._data, self.dataset_info, self.read = data, data.dataset_info, []

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict:
        self.read.append(index)
        return self._data[index]


def test_images_of_tfds_are_not_read_before_they_are_asked_for(pillow_encodes, monkeypatch):
    """TFDS examples are read only when their image is, so that measuring lengths does not read ImageNet."""
    with tfds.testing.mock_data(num_examples=3):
        data = CountingReads(
            tfds.data_source("imagenet2012", split="train", decoders={"image": tfds.decode.SkipDecoding()})
        )
        monkeypatch.setattr(tfds, "data_source", lambda *args, **kwargs: data)
        source = open_source(SourceConfig("imagenet2012", "tfds"))
        samples = [source[i] for i in range(3)]
        assert not data.read
        samples[1].images[0].read()
        assert data.read == [1]


def test_unprepared_imagenet_is_not_downloaded(tmp_path, monkeypatch):
    """Nothing is downloaded or written for unprepared ImageNet; the error says how to prepare it."""
    folder = tmp_path / "data"
    with pytest.raises(UserError) as error:
        open_source(SourceConfig("imagenet2012", "tfds", data_dir=str(folder)))
    assert f"`tfds build imagenet2012 --file_format=array_record` and `--data_dir={folder}`" in str(error.value)
    assert not folder.exists()


# Broken samples


def test_one_broken_sample_is_borne_and_logged_once(caplog):
    broken = BrokenSamples(total=20, max_share=0.01)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):  # epochs
            broken.update(20, [(4, "sample 'x': bad")])
    assert broken.count == 1
    assert [record.getMessage() for record in caplog.records] == ["broken sample skipped (index 4): sample 'x': bad"]


def test_a_share_of_broken_samples_stops_the_run():
    broken = BrokenSamples(total=100_000, max_share=0.01)
    broken.update(100, [(i, f"sample {i}") for i in range(10)])  # 10 % of 100 read samples, but only 1 % of 1000
    with pytest.raises(UserError, match=r"11 of 101 samples read are broken.* 1\.0%") as error:
        broken.update(1, [(10, "sample 10")])
    assert "sample 0\n" in str(error.value) and "sample 4" in str(error.value) and "sample 5" not in str(error.value)
    later = BrokenSamples(total=100_000, max_share=0.01)
    later.update(10_000, [(i, "") for i in range(100)])
    with pytest.raises(UserError):
        later.update(0, [(100, "")])


@pytest.mark.parametrize(("total", "count"), [(1, 1), (2, 2), (12, 2)])
def test_small_data_sets_stop_too(total, count):
    with pytest.raises(UserError, match="raise max_broken"):
        BrokenSamples(total, 0.01).update(total, [(i, "bad") for i in range(count)])
