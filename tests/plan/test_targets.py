"""Topologies: the time of collectives on their links, and errors about topologies that do not exist."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ross_jax.config import ConfigError, UserError
from ross_jax.plan import hlo
from ross_jax.plan.cost import COLLECTIVES, estimate
from ross_jax.plan.targets import GPUS, TPUS, Target, axes_of, open_target, sent_bytes, torus_seconds, wraps
from ross_jax.sharding import MeshConfig, compiler_options, make_mesh

GB = 10**9


def slice_of(chip, *sizes):
    return Target("test", TPUS[chip], [], sizes, wraps(chip, sizes))


def line(count, axis=0, rank=2):
    return [[i if j == axis else 0 for j in range(rank)] for i in range(count)]


def grid(*sizes):
    places = [[]]
    for size in sizes:
        places = [[*place, i] for place in places for i in range(size)]
    return places


@pytest.mark.parametrize(
    ("chip", "sizes", "closed"),
    [
        ("v5e", (8, 8), (False, False)),
        ("v5e", (8, 16), (False, True)),
        ("v6e", (16, 16), (True, True)),
        ("v5p", (4, 4, 4), (True, True, True)),
        ("v5p", (2, 4, 4), (False, False, False)),
        ("v4", (4, 4, 8), (True, True, True)),
    ],
)
def test_wraps(chip, sizes, closed):
    assert wraps(chip, sizes) == closed


def test_rings():
    """A gather of V bytes in a ring of n devices moves (n - 1) / n of V over both directions, an all-reduce twice."""
    ring = slice_of("v5e", 16, 16)
    shard = 100_000_000
    gathered = 16 * shard * 15 / 16 / (90 * GB)
    assert torus_seconds("all-gather", shard, line(16), ring) == pytest.approx(gathered)
    assert torus_seconds("all-reduce", 16 * shard, line(16), ring) == pytest.approx(2 * gathered)
    assert torus_seconds("reduce-scatter", 16 * shard, line(16), ring) == pytest.approx(gathered)
    # A part of the axis, or an axis without wraparound, has half the rate.
    part = 8 * shard * 7 / 8 / (45 * GB)
    assert torus_seconds("all-gather", shard, line(8), ring) == pytest.approx(part)
    assert torus_seconds("all-gather", shard, line(8), slice_of("v5e", 8, 8)) == pytest.approx(part)
    # The rates of several axes add up. v5p has faster links.
    both = 256 * shard * 255 / 256 / (180 * GB)
    assert torus_seconds("all-gather", shard, grid(16, 16), ring) == pytest.approx(both)
    cube = 64 * shard * 63 / 64 / (540 * GB)
    assert torus_seconds("all-gather", shard, grid(4, 4, 4), slice_of("v5p", 4, 4, 4)) == pytest.approx(cube)


def test_other_patterns():
    ring = slice_of("v5e", 16, 16)
    assert torus_seconds("collective-permute", 90 * GB, line(2), ring) == pytest.approx(1)
    # All to all: a quarter of all bytes crosses the middle in each direction, over 1 ring or over 16.
    assert torus_seconds("all-to-all", 1_000_000, line(16), ring) == pytest.approx(16e6 / 4 / (90 * GB))
    assert torus_seconds("all-to-all", 1_000_000, grid(16, 16), ring) == pytest.approx(256e6 / 4 / (16 * 90 * GB))
    assert torus_seconds("all-reduce", 1_000_000, line(1), ring) == 0
    assert (
        torus_seconds("all-reduce", 1_000_000, [[0, 0, 0], [0, 0, 0]], slice_of("v7x", 2, 2, 1)) == 0
    )  # two cores of a chip
    assert sent_bytes("all-gather", 10, 8) == 70 and sent_bytes("all-reduce", 8, 4) == 12
    assert sent_bytes("collective-permute", 10, 2) == 10


def test_every_chip_is_described():
    for chip in [*TPUS.values(), *GPUS.values()]:
        assert chip.peak > 1e14
        assert 0.7 < chip.memory / chip.installed < 1
    for chip in TPUS.values():
        # Per cycle, matrix units compute a whole number of 128 x 128 blocks of multiply-adds.
        assert chip.peak / chip.clock / (2 * 128**2) == pytest.approx(
            round(chip.peak / chip.clock / (2 * 128**2)), 3e-3
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5x:8x8", "no chip 'v5x' .did you mean 'v7x"),
        ("tpu", "known are v4, v5e, v5p, v6e, v7x, rtx4090, a100, h100, h200, b200"),
        ("v5e", "2 sizes are needed .chips along each axis., as in v5e:8x8"),
        ("v5p:8x8", "3 sizes are needed .*v5p:4x4x4"),
        ("v5e:8x0", "2 sizes are needed"),
        ("0xv5e:8x8", "no chip '0xv5e'"),
        ("2xh100:1x1x8", "no chip '2xh100'"),
        ("h100:8", "slices x hosts x GPUs of a host., as in h100:1x1x8"),
    ],
)
def test_bad_topologies(text, message):
    with pytest.raises(ConfigError, match=message):
        open_target(text)


@pytest.mark.parametrize(("text", "extra"), [("v5e:2x2", "tpu"), ("h100:1x1x8", "cuda")])
def test_a_missing_compiler_names_its_extra(text, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"bash launch/setup.sh {extra}"):
        open_target(text)


def test_real_slices():
    pytest.importorskip("libtpu", reason="needs libtpu: bash launch/setup.sh tpu")
    for text, count in (("v4:2x2x4", 16), ("v5e:4x4", 16), ("v5p:4x4x4", 64), ("v6e:1x1", 1), ("v7x:2x2x1", 8)):
        target = open_target(text)
        assert len(target.devices) == count
        assert {device.device_kind for device in target.devices} == {target.chip.kind}
        fastest_kernels = "xla_jf_convolution_performance_target" not in compiler_options(target.devices[0])
        assert fastest_kernels == text.startswith(("v4", "v7x"))
        sizes = [1 + max(place) for place in zip(*(device.coords for device in target.devices), strict=True)]
        assert sizes[: len(target.sizes)] == list(target.sizes)
    both = open_target("2xv5e:2x4")
    assert [device.slice_index for device in both.devices] == [0] * 8 + [1] * 8 and both.sizes == (2, 4)
    with pytest.raises(ConfigError, match=r"knows no such slice.*3x3"):
        open_target("v5e:3x3")


def test_sums_across_slices():
    """Gradients are summed inside slices first; then each device's part of the sum is summed across slices."""
    pytest.importorskip("libtpu", reason="needs libtpu: bash launch/setup.sh tpu")
    target = open_target("3xv5e:2x2")
    mesh = make_mesh(MeshConfig(-1, 4, 1), target.devices)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    shares = NamedSharding(mesh, PartitionSpec("fsdp"))
    x = jax.ShapeDtypeStruct((3072, 1024), jnp.bfloat16, sharding=rows)
    w = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=shares)
    step = jax.jit(jax.grad(lambda w, x: jnp.sum(jnp.square((x @ w).astype(jnp.float32)))), out_shardings=shares)
    found = estimate(hlo.parse(step.lower(w, x).compile().as_text()), target.timing(mesh))
    [across] = [event for event in found.events if event.kind in COLLECTIVES and len(event.group) == 3]
    assert (across.kind, across.bytes, axes_of(across.group, mesh)) == ("all-reduce", 1024 * 1024 * 2 // 4, "data")
    assert across.seconds == pytest.approx(2 * 2 / 3 * across.bytes / 3.125e9)
    assert any(axes_of(event.group, mesh) == "fsdp" for event in found.events if event.kind in COLLECTIVES)
