"""Mixtures: exact counts in every epoch, each sample before any repeats, and windows of row groups."""

from collections import Counter

import numpy as np
import pytest

from data.layouts import COUNT, LAYOUTS, onevision
from ross_jax.config import ConfigError, UserError, from_dict
from ross_jax.data.encoders import build_encoder
from ross_jax.data.images import ImageConfig
from ross_jax.data.mixture import Mixture, Part
from ross_jax.data.packing import Lengths, PackingConfig, PlanSettings, make_plan
from ross_jax.data.pipeline import DataConfig, Preprocessing, open_pipeline
from tokenizer_fixtures import byte_level_tokenizer

FOUR = ("onevision", "finevision", "typed parts", "webdataset")
WEIGHTS = (1, 2, 3, 6)


def open_(folder, weights=WEIGHTS, **changes):
    sources = [
        LAYOUTS[name](folder / name.replace(" ", "_")) | {"weight": weight, "name": name}
        for name, weight in zip(FOUR, weights, strict=True)
        if not (folder / name.replace(" ", "_")).exists()
    ]
    values = {"sources": sources, "packing": {"length": 256, "images": 4}, "batch": 8, "epochs": 4, "threads": 2}
    return from_dict(DataConfig, values | changes)


def pipeline_of(config, **changes):
    encode = build_encoder("chatml", byte_level_tokenizer())
    return open_pipeline(config, Preprocessing(encode, ImageConfig(8), 4, encode_key="x"), **changes)


def test_four_sources_in_exact_shares(tmp_path, caplog):
    """48 samples by the weights 1, 2, 3 and 6, in batches and in the log; resumed by two processes in the middle."""
    caplog.set_level("INFO")
    config = open_(tmp_path, cache=str(tmp_path / "cache"))
    pipeline = pipeline_of(config, multiple=2)
    batches = list(pipeline.batches())
    steps = np.cumsum([0, *(plan.steps for plan in pipeline.plans)])
    for epoch in range(4):
        counts = Counter()
        for batch in batches[steps[epoch] : steps[epoch + 1]]:
            first = (batch["positions"] == 0) & (batch["segments"] > 0)
            counts.update(batch["sources"][first].tolist())
        assert [counts[number] for number in range(4)] == [4, 8, 12, 24]
    assert "source typed parts: 12 conversations of an epoch (25.0%)" in caplog.text
    again = pipeline_of(config, multiple=1, rows_per_step=pipeline.rows_per_step, writer=False)
    assert again.hash == pipeline.hash
    shares = zip(*(again.batches(3, process, 2) for process in range(2)), strict=True)
    for (one, other), whole in zip(shares, batches[3:], strict=True):
        for name, values in whole.items():
            np.testing.assert_array_equal(np.concatenate([one[name], other[name]]), values, err_msg=name)


def counts_of(mixture: Mixture, epochs: int = 3) -> list[Counter]:
    total = sum(part.samples for part in mixture.parts)
    lengths = Lengths(*np.ones((3, total), np.int32))
    settings = (PlanSettings(PackingConfig(4, 4), 4, epoch=epoch) for epoch in range(epochs))
    return [Counter(make_plan(lengths, each, mixture).samples.tolist()) for each in settings]


def test_repeats_and_shares_go_through_all_samples():
    """Half of a source per epoch: two epochs hold it once. A source that is too small repeats whole passes."""
    mixture = Mixture((Part("a", 10, repeat=0.5), Part("b", 3, repeat=2.0), Part("c", 4, repeat=0.0)))
    first, second, _ = counts_of(mixture)
    both = first + second
    assert [both[sample] for sample in range(17)] == [1] * 10 + [4] * 3 + [0] * 4
    assert first.keys() != second.keys()
    weighted = Mixture((Part("a", 10, weight=1.0), Part("b", 3, weight=1.0), Part("c", 4, weight=2.0)))
    so_far = Counter()
    for epoch in counts_of(weighted):
        shares = [sum(epoch[s] for s in range(start, end)) for start, end in ((0, 10), (10, 13), (13, 17))]
        assert sum(shares) == 17 and abs(shares[0] - 4.25) < 1 and abs(shares[2] - 8.5) < 1
        so_far += epoch
        assert max(so_far[s] for s in range(13, 17)) - min(so_far[s] for s in range(13, 17)) <= 1


def test_a_mixture_without_usable_samples():
    lengths = Lengths(*np.array([[0, 1], [0, 0], [0, 1]], np.int32))
    mixture = Mixture((Part("a", 1, weight=1.0), Part("b", 1, weight=1.0)))
    with pytest.raises(UserError, match="source a: none of its 1 samples can be used, and the mixture wants 1"):
        make_plan(lengths, PlanSettings(PackingConfig(4, 4), 4), mixture)


@pytest.mark.parametrize("layout", ["pack", "pad"])
def test_windows_keep_row_groups_together(layout):
    """A row group's samples lie in one part of the plan, in another order in each epoch; each sample comes once."""
    groups = np.array([[100, 50]] * 40)
    mixture = Mixture((Part("a", 4000, groups=groups, window=200), Part("b", 1000)))
    lengths = Lengths(*np.ones((3, 5000), np.int32))
    plans = [
        make_plan(lengths, PlanSettings(PackingConfig(4, 4, layout=layout), 16, epoch=epoch), mixture)
        for epoch in range(2)
    ]
    assert sorted(plans[0].samples.tolist()) == list(range(5000)) and plans[0].hash != plans[1].hash
    for plan in plans:
        where = np.argsort(plan.samples)[:4000].reshape(40, 100)
        assert np.median(np.ptp(where, axis=1)) < 2500 and (np.diff(where) < 0).any(axis=1).all()
        spread = np.argsort(plan.samples)[4000:]
        assert np.abs(np.histogram(spread, 5, (0, 5000))[0] - 200).max() < 60


def test_parquet_is_read_window_by_window(tmp_path):
    """With little memory the plan keeps groups together; with much it is that of any other source."""
    small = pipeline_of(from_dict(DataConfig, config(tmp_path, shuffle_memory=1)))
    assert sorted(small.plans[0].samples.tolist()) == list(range(COUNT))
    large = pipeline_of(from_dict(DataConfig, config(tmp_path)))
    assert large.plans[0].hash != small.plans[0].hash
    assert large.plans[0].hash == make_plan(large.lengths, PlanSettings(large.config.packing, 8)).hash


def config(folder, **changes) -> dict:
    source = {"path": str(folder / "data"), "kind": "parquet"}
    if not (folder / "data").exists():
        onevision(folder / "data")
    return {"sources": [source], "packing": {"length": 100, "images": 1}, "batch": 8, **changes}


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([{"path": "a", "weight": 1}, {"path": "b"}], r"have the weights \[1.0, None\]; give all of them"),
        ([{"path": "a", "weight": 1, "repeat": 2}], "weight is 1.0 and repeat 2.0; set one"),
        ([{"path": "a", "repeat": 0}], "every weight or repeat is 0"),
        ([{"path": "a", "weight": -1}], "weight is -1.0; it must be at least 0"),
        ([{"path": "a", "where": ["x > 1"]}], "where: .* filters columns of Parquet files, and the kind is 'llava'"),
    ],
)
def test_config_errors(sources, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(DataConfig, {"sources": sources})


def test_largest_remainders_are_rounded_up():
    """Ten samples by the weights 26, 39 and 35: 2.6, 3.9 and 3.5 of them."""
    mixture = Mixture(
        tuple(Part(name, 10, weight=weight) for name, weight in zip("abc", (26.0, 39.0, 35.0), strict=True))
    )
    assert mixture.counts([4, 3, 3]) == [3, 4, 3]
