"""Caches return records by image id as they were written, and name damaged shards."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from data.test_pipeline import assert_equal, change_record, config_for, open_, write_data
from ross_jax.config import UserError
from ross_jax.data.images import ImageError
from ross_jax.data.precomputed import (
    FORMAT,
    ArraySpec,
    Precomputed,
    differences,
    encode_broken,
    encode_record,
    plan_layout,
    write_json,
    write_shards,
)

PARTS = {
    "targets": {"mean": ArraySpec((2, 3), "float32"), "logvar": ArraySpec((2,), "bfloat16")},
    "features": {"features": ArraySpec((4,), "float32")},
}
RECORDS, BROKEN = 61, 8


def values(image_id: int) -> dict[str, np.ndarray]:
    return {
        "mean": np.arange(6, dtype=np.float32).reshape(2, 3) + image_id,
        "logvar": np.array([image_id, 0.5], ml_dtypes.bfloat16),
        "features": np.full(4, 1 / (1 + image_id), np.float32),
    }


def write_cache(folder: Path) -> Path:
    """Writes a cache of many shards with 61 records, one of which stands for a broken image."""
    folder.mkdir()
    layout = plan_layout(RECORDS, PARTS, shard_bytes=300)
    for shard in range(layout.shards):
        records = [
            {
                part: encode_broken("no image") if i == BROKEN else encode_record(PARTS[part], values(i))
                for part in PARTS
            }
            for i in layout.span(shard)
        ]
        write_shards({part: folder / layout.name(part, shard) for part in PARTS}, records)
    files = sorted(folder.iterdir())
    assert len(files) == 2 * layout.shards > 8
    parts = {part: {name: {"shape": x.shape, "dtype": x.dtype} for name, x in PARTS[part].items()} for part in PARTS}
    manifest = {"format": FORMAT, "records": RECORDS, "shard_records": layout.shard_records, "parts": parts}
    sizes = {path.name: path.stat().st_size for path in files}
    write_json(folder / "cache.json", {**manifest, "made_of": {}, "bytes": sizes})
    return folder


@pytest.fixture
def cache(tmp_path):
    return write_cache(tmp_path / "cache")


def test_every_record_comes_back(cache):
    for reader in (Precomputed(cache), pickle.loads(pickle.dumps(Precomputed(cache)))):
        for i in (0, 1, 33, RECORDS - 1):
            assert_equal(reader.read(i), values(i))
        with pytest.raises(ImageError, match=r"^no image$"):
            reader.read(BROKEN)
    assert_equal(Precomputed(cache, ["features"]).read(5), {"features": values(5)["features"]})
    empty = Precomputed(cache).empty(2, 3)
    assert empty["mean"].shape == (2, 3, 2, 3) and (empty["mean"][1, 2] == values(0)["mean"]).all()


def corrupt(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) - 2 * 2**16 + 150] ^= 0xFF  # inside a record, which padding and the index follow
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda path: path.unlink(),
            r"shards are not as they were written:\n  targets-00003-of-\d+.arrayrecord: missing\n",
        ),
        (
            lambda path: path.write_bytes(path.read_bytes()[:5000]),
            r"targets-00003-of-\d+.arrayrecord: 5000 bytes instead of \d+\n",
        ),
        (corrupt, r"targets-00003-of-\d+.arrayrecord: damaged \(.*remove this file"),
        (lambda path: (path.parent / "cache.json").unlink(), "cache: holds no cache$"),
        (
            lambda path: (path.parent / "cache.json").rename(path.parent / "cache.json.partial"),
            "cache: is not complete: run",
        ),
        (lambda path: (path.parent / "cache.json").write_text('{"format": '), "cache.json: cannot be read"),
        (lambda path: (path.parent / "cache.json").write_text('{"format": 9}'), "cache.json: format 9, this version"),
        (lambda path: (path.parent / "cache.json").write_text('{"format": 1}'), "cache.json: damaged, .*'made_of'"),
    ],
)
def test_what_is_not_as_it_was_written(cache, change, message):
    change(next(cache.glob("targets-00003-*")))
    with pytest.raises(UserError, match=message):
        reader = Precomputed(cache)
        for i in range(RECORDS):
            if i != BROKEN:
                reader.read(i)
    if not (cache / "cache.json").is_file() or "parts" not in (cache / "cache.json").read_text():
        return
    Precomputed(cache, ["features"])  # the other part is not damaged


def test_a_failed_write_leaves_nothing(tmp_path):
    def records():
        yield {"features": b"\x01abc"}
        raise UserError("no more")

    with pytest.raises(UserError, match="no more"):
        write_shards({"features": tmp_path / "shard"}, records())
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"absent/shard.partial: cannot be written \(open\(\) failed: No such file"):
        write_shards({"features": tmp_path / "absent" / "shard"}, [])


def test_differences_are_named():
    recorded, current = {"a": {"b": 1, "same": (1, 2)}, "c": 2}, {"a": {"b": 3, "same": [1, 2]}}
    assert differences(recorded, current) == ["a.b: 1 there, 3 now", "c: 2 there, None now"]


# In the pipeline


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_hold_what_was_computed_of_their_images(tmp_path, cache, workers, caplog):
    """Each image has its own record, an empty slot has record 0, and there are no pixels."""
    config = config_for(write_data(tmp_path / "set"), max_broken=0.1)
    seen, without = set(), open_(config)
    pipeline = open_(replace(config, workers=workers), precomputed=Precomputed(cache), pixels=False)
    assert pipeline.hash == without.hash
    for batch, other in zip(pipeline.batches(), without.batches(), strict=True):
        assert batch.keys() == other.keys() - {"images"} | {"mean", "logvar", "features"}
        expected = np.where(other["image_ids"] == 0, 0, batch["image_ids"])
        for row, slot in np.ndindex(expected.shape):
            assert_equal({name: batch[name][row, slot] for name in values(0)}, values(int(expected[row, slot])))
        seen |= set(batch["image_ids"].ravel().tolist())
        gone = batch["image_ids"] != other["image_ids"]
        assert not batch["image_ids"][gone].any()
        assert (batch["image_start"][gone] == 24).all()
    # The broken image is the first of two images of a sample, so the sample is left out.
    assert seen == set(range(RECORDS)) - {BROKEN, BROKEN + 1}
    assert caplog.text.count("broken sample skipped (index 8): no image") == 1


def test_pixels_stay_where_they_are_needed(tmp_path, cache):
    config = config_for(write_data(tmp_path / "set"), max_broken=0.1)
    batch = next(open_(config, precomputed=Precomputed(cache)).batches())
    for row, slot in zip(*np.nonzero(batch["image_ids"]), strict=True):
        assert batch["images"][row, slot, 4, 4, 2] == 99
        assert (batch["features"][row, slot] == values(int(batch["image_ids"][row, slot]))["features"]).all()


def test_images_by_identity(tmp_path):
    """`images` returns the image that `batches` gives the same id, also after samples with 0, 1 or 2 images."""
    folder = write_data(tmp_path / "set")
    (folder / "images" / "4_0.png").unlink()
    pipeline = open_(config_for(folder))
    found = {}
    for batch in open_(config_for(folder)).batches():
        for row, slot in np.ndindex(batch["image_ids"].shape):
            found[int(batch["image_ids"][row, slot])] = batch["images"][row, slot]
    chunks, broken = [range(0, 7), range(7, 61)], {}
    for chunk, (images, lost) in zip(chunks, pipeline.images(chunks), strict=True):
        broken |= lost
        for image_id, image in zip(chunk, images, strict=True):
            if image_id not in lost:
                np.testing.assert_array_equal(image, found[image_id])
            else:
                assert not image.any()
    ((image_id, (index, reason)),) = broken.items()
    assert index == pipeline.sample_of(image_id) == 4 and "sample 's4': 4_0.png: no such image" in reason


def test_what_describes_the_images(tmp_path):
    folder = write_data(tmp_path / "set")
    before = open_(config_for(folder)).described
    assert json.loads(json.dumps(before)) == open_(config_for(folder, seed=9, batch=24)).described
    change_record(folder, 4, image=[])
    after = open_(config_for(folder)).described
    assert {name for name in before if before[name] != after[name]} == {"count", "source_hash", "counts_hash"}
