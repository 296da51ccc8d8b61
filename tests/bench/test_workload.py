"""Synthetic conversations resemble the published mix, and batches hold what their plan says."""

import dataclasses

import numpy as np
import pytest

from configs import bench as recipe
from ross_jax.bench.workload import PARTS, conversation_lengths, make_workload
from ross_jax.config import from_dict
from ross_jax.training.recipe import RunConfig


def config(**packing) -> RunConfig:
    found = from_dict(RunConfig, recipe.get_config().to_dict())
    packing = dataclasses.replace(found.data.packing, **packing)
    return dataclasses.replace(found, data=dataclasses.replace(found.data, packing=packing))


def test_lengths_are_the_same_for_ever():
    """Lengths never change, because measurements are only comparable on the same conversations."""
    lengths = conversation_lengths(1000, 729)
    assert lengths.tokens[:8].tolist() == [873, 830, 1043, 795, 975, 880, 937, 1178]
    assert lengths.hash == conversation_lengths(1000, 729).hash


def test_lengths_resemble_the_mix():
    lengths = conversation_lengths(20000, 100)
    total = sum(size for size, *_ in PARTS)
    images = sum(size for size, image, *_ in PARTS if image)
    assert lengths.images.mean() == pytest.approx(images / total, abs=0.01)
    text = lengths.tokens - 100 * lengths.images
    assert 250 < text.mean() < 350 and (lengths.supervised < text).all() and lengths.supervised.min() > 0


@pytest.mark.parametrize("layout", ["pack", "pad"])
def test_batch_holds_what_the_plan_says(layout):
    workload = make_workload(config(layout=layout), multiple=2)
    plan, lengths = workload.plan, workload.lengths
    batch = workload.batch()
    assert plan.rows_per_step % 2 == 0 and batch["tokens"].shape == (plan.rows_per_step, 1024)
    for row in range(plan.rows_per_step):
        samples = plan.row(workload.step * plan.rows_per_step + row)
        assert layout == "pack" or len(samples) == 1
        found = np.bincount(batch["segments"][row], minlength=len(samples) + 1)[1:]
        assert found.tolist() == lengths.tokens[samples].tolist()
        assert np.count_nonzero(batch["image_ids"][row]) == lengths.images[samples].sum()
        assert np.count_nonzero(batch["targets"][row] != -100) == lengths.supervised[samples].sum()
    assert batch["tokens"].max() < workload.vocabulary


def test_the_batch_is_a_typical_one():
    workload = make_workload(config(), multiple=1)
    batch = workload.batch()
    assert np.count_nonzero(batch["segments"]) == pytest.approx(workload.tokens_per_step, rel=0.03)
    assert np.count_nonzero(batch["image_ids"]) == pytest.approx(workload.images_per_step, abs=0.5)
