"""The cost that is read from a compiled program equals the known cost of the program."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from launcher import needs_libtpu
from ross_jax.models.attention import attention, causal_attention
from ross_jax.plan import cost, hlo
from ross_jax.plan.targets import KERNEL_UTILISATION, open_target
from ross_jax.sharding import MeshConfig, make_mesh


def timing(rate=1e9, devices=8):
    """Timing of devices that compute `rate` FLOP/s and need a second per byte that they put into a collective."""
    return cost.Timing(
        lambda cycles, flops: flops / rate, lambda flops: flops / rate, lambda kind, size, group: float(size), devices
    )


def read(function, *arguments, printed=True):
    """The cost of a program that is compiled for the CPU.

    Args:
      printed: whether the text keeps the trip counts that XLA prints.
    """
    text = jax.jit(function).lower(*arguments).compile().as_text()
    stripped = re.sub(r'"known_trip_count":\{"n":"\d+"\}', "", text)
    return cost.estimate(hlo.parse(text if printed else stripped), timing())


def flops(found):
    return sum(event.count * event.flops for event in found.events)


def test_products_in_nested_loops():
    def program(x, y):
        def outer(x, _):
            return jax.lax.scan(lambda x, _: (jnp.sin(x @ y), None), x, length=5)[0], None

        return jax.lax.scan(outer, x, length=3)[0] @ y

    found = read(program, jnp.ones((6, 7)), jnp.ones((7, 7)))
    assert flops(found) == (3 * 5 + 1) * 2 * 6 * 7 * 7
    assert found.notes == [] and found.scheduled == pytest.approx(flops(found) / 1e9)


LOOPS = {
    "less": (lambda i: i < 9, 2, 0, 5),
    "at most": (lambda i: i <= 10, 2, 0, 6),
    "more": (lambda i: i > 1, -3, 20, 7),
    "at least": (lambda i: i >= 2, -3, 20, 7),
    "not equal": (lambda i: i != 8, 2, 0, 4),
    "none": (lambda i: i < 0, 1, 0, 0),
}
"""Name -> (condition of the loop, step of its counter, start of its counter, trip count)."""


@pytest.mark.parametrize("printed", [True, False])
@pytest.mark.parametrize("name", LOOPS)
def test_loops(name, printed):
    """Trip counts are found if XLA prints them, as for CPU, and if it does not, as for TPU."""
    condition, step, start, turns = LOOPS[name]

    def loop(x):
        return jax.lax.while_loop(
            lambda state: condition(state[0]), lambda state: (state[0] + step, jnp.sin(state[1] @ x)), (start, x)
        )

    found = read(loop, jnp.ones((4, 4)), printed=printed)
    assert sum(event.count for event in found.events) == turns and not found.notes


def test_nested_loops_without_printed_counts():
    def program(x):
        def outer(x, _):
            return jax.lax.scan(lambda x, _: (jnp.sin(x @ x), None), x, length=5)[0], None

        return jax.lax.scan(outer, x, length=3)[0]

    assert [event.count for event in read(program, jnp.ones((4, 4)), printed=False).events] == [15]


def test_loops_of_unknown_length():
    """A loop runs as often as its counter allows; without a counter it counts once, and a note says so."""

    def until(x):
        return jax.lax.while_loop(lambda s: (s[0] < 9) & (s[1].sum() > 0), lambda s: (s[0] + 1, s[1] @ x), (0, x))

    def endless(x):
        return jax.lax.while_loop(lambda y: y.sum() > 0, lambda y: y @ x, x)

    assert [event.count for event in read(until, jnp.ones((4, 4))).events] == [9]
    found = read(endless, jnp.ones((4, 4)))
    assert [event.count for event in found.events] == [1] and "counted once" in found.notes[0]


def test_batched_product():
    found = read(lambda a, b: jnp.einsum("bshd,bthd->bhst", a, b), jnp.ones((2, 5, 3, 4)), jnp.ones((2, 7, 3, 4)))
    assert flops(found) == 2 * (2 * 3 * 5 * 7) * 4


CONVOLUTIONS = {
    "same": dict(window_strides=(1, 1), padding="SAME"),
    "strided": dict(window_strides=(2, 3), padding=((1, 2), (0, 3))),
    "dilated input": dict(window_strides=(1, 1), padding=((2, 2), (2, 2)), lhs_dilation=(2, 3)),
    "dilated kernel": dict(window_strides=(1, 1), padding="SAME", rhs_dilation=(2, 2)),
    "groups": dict(window_strides=(1, 1), padding="SAME", feature_group_count=2),
    "batch groups": dict(window_strides=(1, 1), padding="SAME", batch_group_count=2),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    """A convolution of ones has twice as many FLOPs as the sum of its outputs."""
    groups = CONVOLUTIONS[name].get("feature_group_count", 1)
    images, kernel = jnp.ones((4, 9, 8, 6)), jnp.ones((3, 3, 6 // groups, 10))
    run = functools.partial(
        jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"), **CONVOLUTIONS[name]
    )
    # HLO before the CPU compiler rewrites convolutions.
    module = hlo.parse(jax.jit(run).lower(images, kernel).compiler_ir("hlo").as_hlo_module().to_string())
    found = sum(cost.flops(module, each, inner) for each in module.computations.values() for inner in each)
    assert found == 2 * int(run(images, kernel).sum())


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize(
    ("kind", "talk", "axis"),
    [
        ("all-reduce", lambda x, axis: jax.lax.psum(x, axis), "fsdp"),
        ("all-reduce", lambda x, axis: jax.lax.psum(x, axis), "data"),
        ("all-reduce", lambda x, axis: jax.lax.psum(x, axis), ("data", "fsdp")),
        ("all-gather", lambda x, axis: jax.lax.all_gather(x, axis).sum(0), "fsdp"),
        ("reduce-scatter", lambda x, axis: jnp.tile(jax.lax.psum_scatter(x, axis, tiled=True), (4, 1)), "fsdp"),
        ("collective-permute", lambda x, axis: jax.lax.ppermute(x, axis, [(i, (i + 1) % 4) for i in range(4)]), "fsdp"),
        ("all-to-all", lambda x, axis: jax.lax.all_to_all(x, axis, 0, 0, tiled=True), "fsdp"),
    ],
)
def test_collectives(mesh, kind, talk, axis):
    """A collective in a loop of 3 turns has the kind, bytes and group that the program gives it."""

    def program(x):
        return jax.lax.scan(lambda x, _: (jnp.sin(talk(x, axis)), None), x, length=3)[0]

    rows = PartitionSpec(("data", "fsdp"))
    spread = jax.shard_map(program, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    found = read(spread, jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=NamedSharding(mesh, rows)))
    [event] = [event for event in found.events if event.kind in cost.COLLECTIVES]
    places = {"fsdp": [0, 1, 2, 3], "data": [0, 4]}.get(axis, list(range(8)))
    places = places[:2] if kind == "collective-permute" else places
    assert (event.kind, event.count, event.bytes, list(event.group)) == (kind, 3, 8 * 16 * 4, places)
    assert found.seconds(kind) == 3 * event.bytes


ASYNCHRONOUS = """HloModule overlap

ENTRY %main (x: f32[100], w: f32[4,5], v: f32[5,10]) -> f32[100] {
  %x = f32[100] parameter(0)
  %w = f32[4,5] parameter(1)
  %v = f32[5,10] parameter(2)
  %start = f32[100] all-reduce-start(%x), channel_id=1, replica_groups={{0,1}}, to_apply=%add
  %product = f32[4,10] dot(%w, %v), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %done = f32[100] all-reduce-done(%start)
  %late = f32[4,10] dot(%w, %v), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %again = f32[100] all-reduce(%done), channel_id=2, replica_groups={{0,1}}, to_apply=%add
}
"""


@pytest.mark.parametrize(
    ("rate", "expected"), [(1.0, 400 + 400 + 400), (100.0, 400 + 4 + 400), (0.01, 40000 + 40000 + 400)]
)
def test_overlap(rate, expected):
    """A collective beside a product costs the longer of both; a product or collective alone costs its own time."""
    found = cost.estimate(hlo.parse(ASYNCHRONOUS), timing(rate, 2))
    assert found.seconds(*cost.COLLECTIVES) == 800
    assert found.scheduled == expected


@pytest.mark.slow
@needs_libtpu
def test_attention_on_tpu():
    """Pallas kernels count as the products that they compute: a causal mask leaves half of the scores.

    Heads of 64 values use half of a matrix unit, so a kernel takes twice the time of its FLOPs.
    """
    target = open_target("v5e:1x1")
    at = jax.sharding.SingleDeviceSharding(target.devices[0])
    mesh = make_mesh(MeshConfig(), target.devices)

    def kernels(function, shape, *more):
        def loss(x, *more):
            return function(x, jax.nn.relu(x), x, *more).astype(jnp.float32).sum()

        with jax.set_mesh(mesh):
            step = jax.jit(jax.value_and_grad(loss))
            text = step.lower(jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=at), *more).compile().as_text()
        found = cost.estimate(hlo.parse(text), target.timing(mesh))
        total = sum(event.count * event.flops for event in found.events if event.kind == "kernel")
        return total, found.seconds("kernel") * target.chip.peak * KERNEL_UTILISATION / total

    def causal(query, key, value, segments):
        return causal_attention(query, key, value, segments, None)

    # The forward kernel has 2 products. Backward kernels have 3 (queries) and 4 (keys and values), or 5 in one kernel.
    segments = jax.ShapeDtypeStruct((2, 1024), jnp.int32, sharding=at)
    total, idle = kernels(causal, (2, 1024, 4, 128), segments)
    assert total == (2 + 3 + 4) * 2 * (2 * 4 * 1024 * 1024 * 128) // 2 and idle == pytest.approx(1)
    total, idle = kernels(attention, (2, 256, 4, 64))
    assert total == (2 + 5) * 2 * (2 * 4 * 256 * 256 * 64) and idle == pytest.approx(2)


def test_parts():
    def program(x):
        with jax.named_scope("text_loss"):
            x = jnp.sin(x @ x)
        with jax.named_scope("optimizer"):
            return x @ x @ x

    found = read(program, jnp.ones((4, 4)))
    by_part = {}
    for event in found.events:
        by_part[event.part] = by_part.get(event.part, 0) + event.flops
    assert by_part == {"text loss": 2 * 4**3, "optimizer": 2 * 2 * 4**3}
    assert cost.part_of("jit(train_step)/transpose(jvp(Ross))/language/while/body/layers/up") == "language model"
    assert cost.part_of("jit(train_step)/jvp(Ross)/Ross.encode_images/vision/while") == "encoder"
    assert cost.part_of("jit(train_step)/transpose(jvp(Autoencoder.decode))/decoder/conv_in") == "autoencoder"
    assert cost.part_of("jit(run)/decode/while/body/Ross/language/layers/up") == "decode"
    assert cost.part_of("jit(train_step)/copy") == cost.OTHER
