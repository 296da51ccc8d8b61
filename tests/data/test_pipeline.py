"""A run's batches depend on the step alone: not on processes, workers, restarts or broken samples."""

import io
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ross_jax.config import ConfigError, UserError, from_dict
from ross_jax.data.conversation import EncodedConversation
from ross_jax.data.images import ImageConfig, decode_official
from ross_jax.data.packing import PackingConfig
from ross_jax.data.pipeline import DataConfig, Pipeline, Preprocessing, open_pipeline
from ross_jax.data.sources import SourceConfig
from ross_jax.data.workers import Workers

IMAGE_TOKENS, SIZE = 4, 8
COUNT = 60


@dataclass(frozen=True)
class WordEncoder:
    """Stand-in for a conversation encoder: a word's id is its length, and answers are supervised.

    Attributes:
      longer: number of words that are added to each message.
    """

    longer: int = 0

    def __call__(self, record):
        ids, labels = [], []
        for message in record.get("conversations", [{"from": "human", "value": "<image>"}]):
            if message["value"] == "refuse":
                raise UserError(f"sample {record['id']!r}: refused")
            words = message["value"].split() + ["x"] * self.longer
            some = [-200 if word == "<image>" else len(word) for word in words]
            ids += some
            labels += some if message["from"] == "gpt" else [-100] * len(some)
        return EncodedConversation(np.array(ids, np.int32), np.array(labels, np.int32))


def write_data(folder: Path, count: int = COUNT) -> Path:
    """Writes samples, of which sample i has i % 3 images. Image values and text lengths identify a sample."""
    random = np.random.RandomState(3)
    (folder / "images").mkdir(parents=True)
    records = []
    for i in range(count):
        names = [f"{i}_{k}.png" for k in range(i % 3)]
        for k, name in enumerate(names):
            Image.new("RGB", (5, 7), (i, k, 99)).save(folder / "images" / name)
        answer = " ".join("w" * (1 + i % 50) for _ in range(random.randint(2, 9)))
        record = {
            "id": f"s{i}",
            "conversations": [
                {"from": "human", "value": " ".join(["<image>"] * len(names) + ["why"])},
                {"from": "gpt", "value": answer},
            ],
        }
        records.append({**record, "image": names} if names else record)
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def change_record(folder: Path, index: int, **values) -> None:
    records = json.loads((folder / "data.json").read_text())
    records[index].update(values)
    (folder / "data.json").write_text(json.dumps(records))


def config_for(folder: Path, **changes) -> DataConfig:
    source = SourceConfig(str(folder / "data.json"), images=(str(folder / "images"),))
    packing = PackingConfig(length=24, images=3)
    return replace(DataConfig(sources=(source,), packing=packing, batch=12, threads=2, seed=1), **changes)


def open_(config: DataConfig, encode=None, rows_per_step=None, multiple=6, writer=True, **changes) -> Pipeline:
    preprocessing = Preprocessing(encode or WordEncoder(), ImageConfig(SIZE), IMAGE_TOKENS, **changes)
    return open_pipeline(config, preprocessing, multiple=multiple, rows_per_step=rows_per_step, writer=writer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def reference(folder):
    pipeline = open_(config_for(folder, epochs=2))
    return pipeline, list(pipeline.batches())


def assert_equal(batch, other):
    assert sorted(batch) == sorted(other)
    for name in batch:
        np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


def conversations(batches):
    """(last token, number of tokens, values of its images, ids of its images) of each conversation."""
    found = []
    for batch in batches:
        for r in range(len(batch["tokens"])):
            for segment in range(1, batch["segments"][r].max(initial=0) + 1):
                where = np.flatnonzero(batch["segments"][r] == segment)
                if not len(where):
                    continue
                starts = batch["image_start"][r]
                slots = np.flatnonzero((starts >= where[0]) & (starts <= where[-1]))
                values = [tuple(batch["images"][r, slot, 4, 4].tolist()) for slot in slots]
                found.append(
                    (int(batch["tokens"][r, where[-1]]), len(where), values, batch["image_ids"][r, slots].tolist())
                )
    return found


def test_an_epoch_holds_every_sample_once(folder, reference):
    pipeline, batches = reference
    assert len(batches) == pipeline.steps == sum(plan.steps for plan in pipeline.plans)
    records = json.loads((folder / "data.json").read_text())
    expected, next_id = [], 1
    for i, record in enumerate(records):
        images = len(record.get("image", []))
        length = IMAGE_TOKENS * images + 1 + len(record["conversations"][1]["value"].split())
        ids = list(range(next_id, next_id + images))
        expected.append((1 + i % 50, length, [(i, k, 99) for k in range(images)], ids))
        next_id += images
    first, second = batches[: pipeline.plans[0].steps], batches[pipeline.plans[0].steps :]
    for epoch in (first, second):
        assert sorted(conversations(epoch)) == sorted(expected)
    assert conversations(first) != conversations(second)
    for batch in batches:
        assert batch["tokens"].shape == (pipeline.rows_per_step, 24)
        assert batch["images"].shape == (pipeline.rows_per_step, 3, SIZE, SIZE, 3)


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_processes_read_the_same_run_together(folder, reference, processes):
    pipeline, batches = reference
    start = 3
    parts = [pipeline.batches(start, process, processes) for process in range(processes)]
    steps = list(zip(*parts, strict=True))
    assert len(steps) == pipeline.steps - start
    for step, expected in zip(steps, batches[start:], strict=True):
        assert len(step[0]["tokens"]) == pipeline.rows_per_step // processes
        assert_equal({name: np.concatenate([part[name] for part in step]) for name in expected}, expected)


@pytest.mark.parametrize("start", [0, 1, 5])
def test_a_restored_run_goes_on_bit_for_bit(folder, reference, start):
    """A pipeline that is opened again, with another number of threads, continues with the same batches."""
    expected_pipeline, expected = reference
    pipeline = open_(config_for(folder, epochs=2, threads=0), rows_per_step=expected_pipeline.rows_per_step)
    assert pipeline.hash == expected_pipeline.hash
    for batch, other in zip(pipeline.batches(start), expected[start:], strict=True):
        assert_equal(batch, other)


def test_restored_with_other_devices(folder, reference):
    expected_pipeline, expected = reference
    pipeline = open_(config_for(folder, epochs=2), rows_per_step=expected_pipeline.rows_per_step, multiple=1)
    assert [plan.hash for plan in pipeline.plans] == [plan.hash for plan in expected_pipeline.plans]
    assert_equal(next(iter(pipeline.batches(4))), expected[4])


def test_worker_processes_change_nothing(folder, reference):
    _, expected = reference
    pipeline = open_(config_for(folder, epochs=2, workers=2))
    batches = list(pipeline.batches(2))
    assert len(batches) == len(expected) - 2
    for batch, other in zip(batches, expected[2:], strict=True):
        assert_equal(batch, other)


def test_many_samples_are_measured_on_all_cores(folder, reference, monkeypatch):
    used = []
    monkeypatch.setattr("ross_jax.data.lengths._MANY", COUNT)
    monkeypatch.setattr("ross_jax.data.lengths.cores", lambda: 2)
    monkeypatch.setattr("ross_jax.data.reading.Workers", lambda *args: used.append(args[2]) or Workers(*args))
    assert open_(config_for(folder, epochs=2)).hash == reference[0].hash
    assert used == [2]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_changed_tokenizer_is_noticed(tmp_path, workers):
    """Cached lengths that another encoder measured end the run with an error, from worker processes too."""
    config = config_for(write_data(tmp_path / "set", 30), cache=str(tmp_path / "cache"))
    open_(config, encode_key="words")
    pipeline = open_(replace(config, workers=workers), WordEncoder(longer=1), encode_key="words")
    with pytest.raises(UserError, match=r"sample 's\d+' now has \d+ tokens.*data or tokenizer changed"):
        list(pipeline.batches())


def test_start_and_end(folder, reference):
    pipeline, expected = reference
    assert list(pipeline.batches(pipeline.steps)) == []
    assert_equal(next(pipeline.batches(pipeline.steps - 1)), expected[-1])
    with pytest.raises(UserError, match="outside this run"):
        pipeline.batches(pipeline.steps + 1)
    with pytest.raises(UserError, match=r"6 rows per step do not divide by 4 processes; \[1, 2, 3, 6\] do"):
        pipeline.batches(0, 0, 4)


def test_hash_tells_runs_apart(folder, reference):
    config = config_for(folder, epochs=2)
    changes = [
        replace(config, seed=2),
        replace(config, epochs=1),
        replace(config, batch=24),
        replace(config, packing=PackingConfig(25, 3)),
    ]
    assert len({reference[0].hash, *(open_(change).hash for change in changes)}) == 5


@pytest.mark.parametrize("layout", ["pack", "pad"])
def test_layouts_hold_the_same_conversations(folder, reference, layout):
    pipeline = open_(config_for(folder, packing=PackingConfig(24, 3, layout=layout)))
    assert sorted(conversations(pipeline.batches())) == sorted(
        conversations(reference[1][: reference[0].plans[0].steps])
    )


# Broken samples


def break_image(folder: Path, index: int, content: bytes | None) -> None:
    path = folder / "images" / f"{index}_0.png"
    path.write_bytes(content) if content is not None else path.unlink()


def truncated() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (40, 40, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()[:900]


@pytest.mark.parametrize("content", [None, b"", truncated()], ids=["missing", "empty", "truncated"])
def test_a_broken_image_empties_its_place(tmp_path, reference, caplog, content):
    folder = write_data(tmp_path / "set")
    broken = [1, 4, 5, 7, 8, 14, 20, 32]
    for index in broken:
        break_image(folder, index, content)
    _, expected = reference
    batches = list(open_(config_for(folder, epochs=2, max_broken=0.2)).batches())
    for index in broken:
        named = rf"broken sample skipped \(index {index}\): .*data\.json, record {index}: sample 's{index}': "
        assert len(re.findall(named, caplog.text)) == 1
    gone_samples = 0
    for batch, other in zip(batches, expected, strict=True):
        middle = other["images"][:, :, 4, 4]  # (sample, image, 99)
        gone_slots = np.isin(middle[..., 0], broken) & (middle[..., 2] == 99)
        gone_samples += np.count_nonzero(gone_slots & (middle[..., 1] == 0))
        for r in range(len(batch["tokens"])):
            starts = other["image_start"][r, gone_slots[r]]
            gone = np.isin(other["segments"][r], other["segments"][r, starts])
            nothing = {"tokens": 0, "targets": -100, "positions": 0, "segments": 0}
            for name, value in nothing.items():
                np.testing.assert_array_equal(batch[name][r], np.where(gone, value, other[name][r]))
            nothing = {"image_start": 24, "image_ids": 0}
            for name, value in nothing.items():
                np.testing.assert_array_equal(batch[name][r], np.where(gone_slots[r], value, other[name][r]))
            expected_images = other["images"][r] * ~gone_slots[r][:, None, None, None]
            np.testing.assert_array_equal(batch["images"][r], expected_images)
    assert gone_samples == 2 * len(broken)


def test_too_many_broken_images_stop_the_run(tmp_path):
    folder = write_data(tmp_path / "set")
    for index in (1, 4, 7):
        break_image(folder, index, b"")
    pipeline = open_(config_for(folder))
    with pytest.raises(UserError, match=r"are broken.*1\.0%.*\n  .*data\.json, record \d+: sample 's\d+': \d_0\.png"):
        list(pipeline.batches())
    list(open_(config_for(folder, max_broken=0.05)).batches())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conversations": [{"from": "gpt", "value": "refuse"}]}, "sample 's4': refused"),
        ({"image": []}, "sample 's4': 1 image markers in the text, 0 images"),
        ({"image": 5}, "sample 's4': an image must be a file name"),
        ({"conversations": []}, "sample 's4': 0 image markers in the text, 1 images"),
    ],
)
def test_a_broken_record_is_left_out(tmp_path, caplog, change, message):
    folder = write_data(tmp_path / "set")
    change_record(folder, 4, **change)
    pipeline = open_(config_for(folder))
    assert message in caplog.text
    assert pipeline.plans[0].unusable == 1 and 4 not in pipeline.plans[0].samples
    assert len(conversations(pipeline.batches())) == COUNT - 1
    change_record(folder, 5, **{**change, "image": 5})
    with pytest.raises(UserError, match="2 of 60 samples read are broken"):
        open_(config_for(folder))


def test_a_wrong_template_is_one_error(folder, caplog):
    """An encoder that takes no record: the error shows some of them, and no sample has a warning of its own."""

    def refuse(record):
        raise UserError("takes a question and a caption")

    with pytest.raises(UserError, match=r"60 of 60 samples read are broken.*(\n.*takes a question.*){5}\n.*template"):
        open_(config_for(folder), refuse)
    assert "broken sample" not in caplog.text


def test_many_broken_samples_are_counted(tmp_path, caplog):
    folder = write_data(tmp_path / "set")
    for index in range(15):
        change_record(folder, index, image=5)
    open_(config_for(folder, max_broken=0.5))
    assert caplog.text.count("broken sample skipped") == 10
    assert caplog.text.count("more broken samples are skipped and only counted") == 1
    assert "15 of 60 samples cannot be used" in caplog.text


# Fields


def test_fields_and_marks_are_counted(tmp_path, caplog):
    folder = write_data(tmp_path / "set")
    question = [{"from": "human", "value": "<image>\nwhy"}, {"from": "gpt", "value": "because", "weight": 0}]
    for index in (0, 3, 6):
        change_record(folder, index, conversations=question, photo="0.png", model="x")
    change_record(folder, 9, conversations=[{"from": "human", "value": "what is <image> in HTML"}, question[1]])
    open_(config_for(folder, max_broken=0.1))  # the encoder of these tests takes marks without images for broken
    assert "3 of 60 records have a mark in a question and no image (3 with <image>)" in caplog.text
    assert "fields that are not read: 'conversations[].weight' (4 records), 'photo' (3 records)" in caplog.text
    assert "'model'" not in caplog.text.partition("not read")[2]


def test_marks_and_no_image_at_all_are_refused(tmp_path):
    question = {"from": "human", "value": "why?\n<image>", "picture": "0.png"}
    records = [{"photo": "0.png", "conversations": [question, {"from": "gpt", "value": "so"}]}] * 9
    (tmp_path / "data.json").write_text(json.dumps(records))
    with pytest.raises(
        UserError, match=r"data\.json: 9 of 9 records have a mark.*conversations\[\]\.picture', 'photo'"
    ):
        open_(DataConfig((SourceConfig(str(tmp_path / "data.json")),)))


@pytest.mark.parametrize("field", ["image_path", "img", "image_files"])
def test_common_names_of_the_images_field_are_read(tmp_path, caplog, field, reference):
    folder = write_data(tmp_path / "set")
    records = json.loads((folder / "data.json").read_text())
    records = [{field if name == "image" else name: value for name, value in record.items()} for record in records]
    (folder / "data.json").write_text(json.dumps(records))
    assert open_(config_for(folder, epochs=2)).hash == reference[0].hash
    assert f"the field {field!r} of 40 records is read as 'image'" in caplog.text


# Long conversations


def test_conversations_that_exceed_a_row_are_explained(folder, caplog):
    """Twenty samples have two images; the texts alone are at most 10 words."""
    config = config_for(folder, packing=PackingConfig(30, 1))
    with pytest.raises(UserError, match=r"20 of 60 .* 20 exceed packing\.images = 1 .*has 2\).*data\.max_dropped = 20"):
        open_(config)
    open_(config, rows_per_step=6)  # a run that has begun
    assert open_(replace(config, max_dropped=0.5)).plans[0].dropped == 20
    assert caplog.text.count("20 exceed packing.images = 1") == 2 and "packing.length =" not in caplog.text


def test_truncation_keeps_what_fits(folder):
    limits = dict(length=9, images=1)
    dropped = open_(config_for(folder, packing=PackingConfig(**limits), max_dropped=0.5))
    cut = open_(config_for(folder, packing=PackingConfig(**limits, too_long="truncate")))
    # 20 samples have two images.
    assert dropped.plans[0].dropped >= 20 and cut.plans[0].dropped == 0
    assert len(conversations(cut.batches())) == COUNT
    for batch in cut.batches():
        starts = batch["image_start"][batch["image_ids"] > 0]
        assert (starts + IMAGE_TOKENS <= 9).all()


def test_supervised_limit(folder):
    pipeline = open_(config_for(folder, packing=PackingConfig(24, 3, supervised=9)))
    counts = [np.count_nonzero(batch["targets"] != -100, axis=1).max() for batch in pipeline.batches()]
    assert 6 <= max(counts) <= 9


# Other sources and options


def test_bare_images(folder):
    source = SourceConfig(str(folder / "images"), kind="images")
    pipeline = open_(config_for(folder, sources=(source,), packing=PackingConfig(8, 2)))
    batches = list(pipeline.batches())
    assert sum(np.count_nonzero(batch["image_ids"]) for batch in batches) == 60
    assert all((batch["targets"] == -100).all() for batch in batches)
    assert {tuple(starts) for batch in batches for starts in batch["image_start"]} <= {(0, 4), (0, 8), (8, 8)}


def test_several_sources(folder):
    (source,) = config_for(folder).sources
    pipeline = open_(config_for(folder, sources=(source, SourceConfig(str(folder / "images"), kind="images"))))
    ids = np.concatenate([batch["image_ids"].ravel() for batch in pipeline.batches()])
    assert sorted(ids[ids > 0].tolist()) == list(range(1, 121))


def test_official_decoding_is_chosen_once(tmp_path):
    folder = write_data(tmp_path / "set", 2)
    turned = Image.fromarray(np.repeat(np.arange(64, dtype=np.uint8).reshape(8, 8, 1), 3, axis=2))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned.save(folder / "images" / "1_0.png", exif=exif)
    images = {}
    for name, options in {"default": {}, "official": {"decode": decode_official}}.items():
        (batch,) = open_(config_for(folder), **options).batches()
        images[name] = batch["images"][batch["image_ids"] > 0][0]
    np.testing.assert_array_equal(images["official"], np.asarray(turned))
    np.testing.assert_array_equal(images["default"], np.asarray(turned)[::-1, ::-1])


def test_cache_saves_measuring(tmp_path, monkeypatch, reference):
    folder = write_data(tmp_path / "set")
    config = config_for(folder, epochs=2, cache=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"measured lengths are not there; is .* shared"):
        open_(config, encode_key="words", writer=False)
    assert open_(config, encode_key="words").hash == reference[0].hash
    encode = lambda record: pytest.fail("measured again")  # noqa: E731
    for writer in (True, False):
        assert open_(config, encode, encode_key="words", writer=writer).hash == reference[0].hash
    with pytest.raises(pytest.fail.Exception):
        open_(config, encode, encode_key="other tokenizer")
    change_record(folder, 0, id="other text")
    with pytest.raises(pytest.fail.Exception):
        open_(config, encode, encode_key="words")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sources": []}, "name at least one"),
        ({"batch": 0}, "batch is 0"),
        ({"workers": -1}, "workers is -1"),
        ({"max_broken": 2.0}, "a share"),
        ({"packing": {"lenght": 3}}, r"data\.packing\.lenght: no such field \(did you mean 'length'"),
        ({"sources": [{"path": "x", "kind": "lava"}]}, r"data\.sources\[0\]\.kind: 'lava'.*did you mean 'llava'"),
    ],
)
def test_config_errors(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(DataConfig, {"sources": [{"path": "x"}], **values}, "data")
