"""Packing plans: each sample once, no row over its limits, and the same plan everywhere and at any time."""

import os
from dataclasses import replace
from pathlib import Path

import grain
import numpy as np
import pytest
from grain.experimental import BestFitPackIterDataset
from hypothesis import given, settings
from hypothesis import strategies as st

from ross_jax.config import ConfigError, UserError, from_dict
from ross_jax.data.best_fit import OPEN_ROWS, best_fit
from ross_jax.data.packing import Lengths, Location, PackingConfig, PackingPlan, PlanSettings, cached_plan, make_plan


def make_lengths(samples: list[tuple[int, int, int]]) -> Lengths:
    return Lengths(*np.array(samples, np.int32).reshape(-1, 3).T)


def llava_like(count: int, image_tokens: int = 64, seed: int = 0) -> Lengths:
    random = np.random.RandomState(seed)
    images = (random.rand(count) < 0.9).astype(np.int32)
    text = np.clip(random.lognormal(3.5, 0.7, count), 8, 150).astype(np.int32)
    return Lengths(text + image_tokens * images, images, text // 2)


def check(plan, lengths: Lengths, config: PackingConfig) -> None:
    fits = (lengths.tokens > 0) & (lengths.tokens <= config.length) & (lengths.images <= config.images)
    if config.supervised is not None:
        fits &= lengths.supervised <= config.supervised
    assert sorted(plan.samples.tolist()) == np.flatnonzero(fits).tolist()
    assert plan.unusable == np.sum(lengths.tokens == 0)
    assert plan.dropped == len(lengths) - len(plan.samples) - plan.unusable
    assert plan.offsets[0] == 0 and plan.offsets[-1] == len(plan.samples) and (np.diff(plan.offsets) >= 0).all()
    assert plan.rows == plan.steps * plan.rows_per_step
    for row in map(plan.row, range(plan.rows)):
        assert lengths.tokens[row].sum() <= config.length
        assert lengths.images[row].sum() <= config.images
        assert config.supervised is None or lengths.supervised[row].sum() <= config.supervised
        assert config.layout == "pack" or len(row) <= 1
    assert plan.samples.dtype == plan.offsets.dtype == np.int32


LENGTHS = st.lists(st.tuples(st.integers(0, 24), st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=60)
CONFIGS = st.builds(
    PackingConfig,
    length=st.integers(8, 40),
    images=st.integers(0, 3),
    supervised=st.none() | st.integers(1, 12),
    layout=st.sampled_from(["pack", "pad"]),
)


@settings(max_examples=80, deadline=None)
@given(LENGTHS, CONFIGS, st.integers(1, 9), st.integers(1, 4), st.integers(0, 3))
def test_every_plan_keeps_its_promises(samples, config, batch, multiple, epoch):
    lengths = make_lengths([(1, 0, 0), *samples])
    plan = make_plan(lengths, PlanSettings(config, batch, multiple, seed=5, epoch=epoch))
    check(plan, lengths, config)
    assert plan.rows_per_step % multiple == 0
    again = make_plan(lengths, PlanSettings(config, batch, multiple, seed=5, epoch=epoch))
    assert again.hash == plan.hash
    # Each step has a conversation. Packed steps differ by at most one row that is not empty.
    real = (np.diff(plan.offsets) > 0).reshape(plan.steps, -1).sum(axis=1)
    assert real.min() >= 1
    assert config.layout == "pad" or real.max() - real.min() <= 1


def test_plan_never_changes():
    """A run continues only with its own plan, so plans may change only with a new `_FORMAT`."""
    lengths = llava_like(300)
    packed = make_plan(lengths, PlanSettings(PackingConfig(256, 3, supervised=120), 16, multiple=2, seed=1, epoch=2))
    padded = make_plan(lengths, PlanSettings(PackingConfig(256, 3, layout="pad"), 16, seed=1, epoch=2))
    assert packed.hash[:16] == "2c00260f42922c8b"
    assert padded.hash[:16] == "b89d01a79d8ecb23"


@pytest.mark.parametrize("limits", [(256,), (256, 3, 120)])
def test_rows_are_those_of_grain(limits):
    """Several hundred rows are open at once, and all are closed when nothing fits."""
    lengths = llava_like(1500)
    needs = np.stack([lengths.tokens, lengths.images, lengths.supervised][: len(limits)])
    names = ("tokens", "images", "supervised")[: len(limits)]
    zero = np.int8(0)

    def arrays(sample):
        return {n: np.broadcast_to(zero, count[sample]) for n, count in zip(names, needs, strict=True)} | {"at": sample}

    packed = BestFitPackIterDataset(
        grain.MapDataset.source(range(1500)).map(arrays).to_iter_dataset(),
        length_struct=dict(zip(names, limits, strict=True)),
        num_packing_bins=OPEN_ROWS,
        shuffle_bins=False,
        meta_features=("at",),
    )
    expected = [list(map(int, row["at"])) for row in packed]
    rows = best_fit(needs, limits)
    assert [np.flatnonzero(rows == row).tolist() for row in range(rows.max() + 1)] == expected
    scaled = best_fit(200 * needs, [200 * limit for limit in limits])  # numbers that need 32 bits
    np.testing.assert_array_equal(scaled, rows)


def test_order_depends_on_seed_and_epoch():
    lengths = llava_like(200)
    plans = [
        make_plan(lengths, PlanSettings(PackingConfig(256, 3), 16, seed=seed, epoch=epoch))
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len({plan.hash for plan in plans}) == 4
    assert all(sorted(plan.samples) == list(range(200)) for plan in plans)
    first = plans[0].samples[:50]
    assert np.corrcoef(np.arange(50), first)[0, 1] < 0.5  # shuffled, not the order of the file


def test_packing_beats_padding_on_llava_like_lengths():
    lengths = llava_like(2000)
    packed, padded = PackingConfig(256, 3), PackingConfig(256, 3, layout="pad")
    dense = make_plan(lengths, PlanSettings(packed, batch=64)).statistics(lengths, packed)
    sparse = make_plan(lengths, PlanSettings(padded, batch=64)).statistics(lengths, padded)
    assert dense["efficiency"] > 0.9 > 2 * sparse["efficiency"]
    # The fewest possible rows, by tokens or by image slots, counted independently of the plan.
    best = max(np.ceil(lengths.tokens.sum() / 256), np.ceil(lengths.images.sum() / 3))
    assert best / dense["rows"] > 0.88
    assert dense["conversations_per_step"] == pytest.approx(64, rel=0.05)


def test_padding_groups_by_modality_and_length():
    lengths = llava_like(205)
    config = PackingConfig(256, 1, layout="pad")
    plan = make_plan(lengths, PlanSettings(config, batch=10))
    check(plan, lengths, config)
    steps = [plan.samples[i : i + 10] for i in range(0, 205, 10)]
    images = [{bool(lengths.images[s]) for s in step} for step in steps]
    mixed = [i for i, kinds in enumerate(images) if len(kinds) == 2]
    # Only the leftovers of both kinds are mixed, at the end.
    text = int(np.sum(lengths.images == 0))
    assert len(mixed) <= 2 and all(i >= len(steps) - 2 for i in mixed)
    assert sum(kinds == {False} for kinds in images) >= text // 10
    for step in steps[:-2]:
        assert (np.diff(lengths.tokens[step]) <= 0).all()
    only_images = [kinds == {True} for kinds in images[:-2]]
    assert not all(only_images) and only_images != sorted(only_images, reverse=True)  # groups are shuffled


def test_too_long_is_counted():
    lengths = make_lengths([(10, 1, 1), (11, 1, 1), (9, 2, 1), (0, 0, 0), (8, 0, 5), (1, 0, 0)])
    plan = make_plan(lengths, PlanSettings(PackingConfig(10, 1, supervised=4), batch=2))
    assert sorted(plan.samples.tolist()) == [0, 5]
    assert (plan.dropped, plan.unusable) == (3, 1)
    with pytest.raises(UserError, match=r"none of 6 samples fits a row of 0*5 tokens.*\(1 are broken.*11 tokens"):
        make_plan(
            make_lengths([(10, 0, 0), (11, 1, 1), (9, 2, 1), (0, 0, 0), (8, 0, 5), (6, 0, 0)]),
            PlanSettings(PackingConfig(5, 1), batch=2),
        )


def test_image_ids_are_unique_and_stay():
    lengths = make_lengths([(5, 2, 1), (5, 0, 1), (5, 3, 1), (5, 1, 1)])
    assert lengths.first_image_ids.dtype == np.uint32
    assert lengths.first_image_ids.tolist() == [1, 3, 3, 6]


def test_locations_follow_one_another():
    lengths = make_lengths([(5, 2, 1), (7, 0, 1), (6, 3, 1), (9, 9, 9)])
    plan = PackingPlan(np.array([0, 0, 3], np.int32), np.array([2, 0, 1], np.int32), 1, 1, 0)
    assert list(plan.locations(0, lengths)) == []
    assert list(plan.locations(1, lengths)) == [
        (2, Location(start=0, slot=0, segment=1, first_image_id=3)),
        (0, Location(start=6, slot=3, segment=2, first_image_id=1)),
        (1, Location(start=11, slot=5, segment=3, first_image_id=3)),
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"length": 0}, "holds nothing"),
        ({"images": -1}, "holds nothing"),
        ({"supervised": 0}, "at least one target"),
        ({"layout": "packed"}, "did you mean 'pack'"),
        ({"lenght": 4}, "did you mean 'length'"),
    ],
)
def test_config_errors(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(PackingConfig, values)


# Cached plans


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


SETTINGS = PlanSettings(PackingConfig(256, 3), batch=8)


def test_cache_returns_the_same_plan(tmp_path, monkeypatch):
    lengths = llava_like(50)
    plan = cached_plan(tmp_path / "new", lengths, SETTINGS)
    assert plan.hash == make_plan(lengths, SETTINGS).hash
    monkeypatch.setattr("ross_jax.data.packing.make_plan", None)  # plans can only be read from here on
    for writer in (True, False):
        assert cached_plan(tmp_path / "new", lengths, SETTINGS, writer).hash == plan.hash
    assert len(files(tmp_path / "new")) == 2  # for new runs and for runs that continue; no temporary file is left
    continued = replace(SETTINGS, rows_per_step=plan.rows_per_step, multiple=plan.rows_per_step)
    assert cached_plan(tmp_path / "new", lengths, continued, writer=False).hash == plan.hash


def test_cache_keeps_settings_apart(tmp_path):
    changes = ({}, {"epoch": 1}, {"seed": 1}, {"batch": 4}, {"multiple": 2}, {"packing": PackingConfig(255, 3)})
    for change in changes:
        cached_plan(tmp_path, llava_like(50), replace(SETTINGS, **change))
    cached_plan(tmp_path, llava_like(50, seed=1), SETTINGS)
    assert len(files(tmp_path)) == 2 * (len(changes) + 1)


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_damaged_cache_is_made_again(tmp_path, damage, caplog):
    lengths = llava_like(50)
    plan = cached_plan(tmp_path, lengths, SETTINGS)
    path = next(file for file in files(tmp_path) if '"rows_per_step": null' in str(np.load(file)["described"]))
    if damage == "flip":
        np.savez(path, **{**np.load(path), "samples": plan.samples[::-1]})
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="shared between all processes"):
        cached_plan(tmp_path, lengths, SETTINGS, writer=False)
    assert cached_plan(tmp_path, lengths, SETTINGS).hash == plan.hash
    assert "made again" in caplog.text
    assert cached_plan(tmp_path, lengths, SETTINGS, writer=False).hash == plan.hash


def test_unwritable_cache_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"plan-.*cannot be written: No space left on device; free the disk"):
        cached_plan(tmp_path, llava_like(50), SETTINGS)
    assert files(tmp_path) == []
