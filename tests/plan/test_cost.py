"""Costs read from compiled programs against what the same programs are known to cost."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ross_jax.plan import cost, hlo


def timing(rate=1e9, devices=8):
    """So many FLOP/s, and a second for each byte that a device puts into a collective."""
    return cost.Timing(
        lambda cycles, flops: flops / rate, lambda flops: flops / rate, lambda kind, size, group: float(size), devices
    )


def read(function, *arguments, printed=True):
    """The cost of a program compiled for 8 CPU devices; without the trip counts that XLA prints, on request."""
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


@pytest.mark.parametrize("printed", [True, False])
def test_loops(printed):
    """Nested, and counting down by 3, whether XLA prints its trip counts or not."""

    def nested(x):
        def outer(x, _):
            return jax.lax.scan(lambda x, _: (jnp.sin(x @ x), None), x, length=5)[0], None

        return jax.lax.scan(outer, x, length=3)[0]

    def down(x):
        return jax.lax.while_loop(lambda s: s[0] > 1, lambda s: (s[0] - 3, jnp.sin(s[1] @ s[1])), (20, x))

    turns = {nested: 15, down: 7}  # 20, 17, ..., 2
    for function, expected in turns.items():
        found = read(function, jnp.ones((4, 4)), printed=printed)
        assert [event.count for event in found.events] == [expected]
        assert not found.notes


def test_loops_of_unknown_length():
    """At most as many turns as the counter allows; where there is no counter, one, and a note."""

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
    """A convolution of ones sums up how often a product meets data; that is held against the count from its text."""
    groups = CONVOLUTIONS[name].get("feature_group_count", 1)
    images, kernel = jnp.ones((4, 9, 8, 6)), jnp.ones((3, 3, 6 // groups, 10))
    run = functools.partial(
        jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"), **CONVOLUTIONS[name]
    )
    # Before the CPU compiler rewrites it.
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
    """In a loop of 3, over a known axis, with 8 x 16 floats on each device."""

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


GROUPS = {
    "replica_groups={{0,2},{1,3}}": [0, 2],
    "replica_groups=[2,4]<=[8]": [0, 1, 2, 3],
    "replica_groups=[4,2]<=[2,4]T(1,0)": [0, 4],
    "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}": [0, 4],
    "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, use_global_device_ids=true": [0, 1, 2, 3],
    "replica_groups=mesh['axis_0'=8] {'axis_0':(1)2}": [0, 4],
    "replica_groups=mesh['axis_0'=8] {'axis_0':(2)4}": [0, 1, 2, 3],
    "replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}, use_global": [0, 1, 2, 3],
    "replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}": [0, 4],
    "replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=(7,1,2,3,4,5,6,0) {'axis_1'}": [1, 7],
    "source_target_pairs={{0,3},{3,0}}": [0, 3],
    "channel_id=1": list(range(8)),
}


@pytest.mark.parametrize("text", GROUPS)
def test_groups(text):
    line = f"ENTRY %m (x: f32[2]) -> f32[2] {{\n  ROOT %c = f32[2] all-reduce(%x), {text}, to_apply=%add\n}}"
    assert cost.replica_group(hlo.parse(line).entry.root, 8) == GROUPS[text]


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
    """400 bytes over the links beside 400 FLOPs, 400 FLOPs once both are done, and 400 bytes that nothing hides."""
    found = cost.estimate(hlo.parse(ASYNCHRONOUS), timing(rate, 2))
    assert found.seconds(*cost.COLLECTIVES) == 800
    assert found.scheduled == expected


SLICES = """HloModule slices

ENTRY %main (x: f32[100], w: f32[4,5], v: f32[5,10]) -> f32[100] {
  %x = f32[100] parameter(0)
  %w = f32[4,5] parameter(1)
  %v = f32[5,10] parameter(2)
  %token = token[] after-all()
  %sent = (f32[100], u32[], token[]) send(%x, %token), channel_id=2, is_host_transfer=true, ATTRIBUTES
  %got = (f32[100], u32[], token[]) recv(%token), channel_id=1, is_host_transfer=true, ATTRIBUTES
  %sent-done = token[] send-done(%sent), channel_id=2, is_host_transfer=true
  %gathered = f32[100] all-reduce(%x), channel_id=3, replica_groups={{0,1}}, to_apply=%add
  %product = f32[4,10] dot(%w, %v), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %got-done = (f32[100], token[]) recv-done(%got), channel_id=1, is_host_transfer=true
  %late = f32[4,10] dot(%w, %v), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %result = f32[100] get-tuple-element(%got-done), index=0
}
""".replace(
    "ATTRIBUTES",
    'frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_reduce_operation="SUM",'
    '_xla_megascale_target="{1,2,4:5}x{0:1}",_xla_megascale_transfer_type="ALL_REDUCE"}',
)


@pytest.mark.parametrize(("rate", "expected"), [(1.0, 400 + 400 + 400), (0.01, 400 + 40000 + 40000)])
def test_slices_talk_through_their_hosts(rate, expected):
    """Beside the links, not behind them, from what is sent to what is received; four slices of two devices."""
    found = cost.estimate(hlo.parse(SLICES), timing(rate, 8))
    across, within = [event for event in found.events if event.kind in cost.COLLECTIVES]
    assert (across.kind, across.bytes, across.group) == ("all-reduce", 400, (0, 2, 4, 6))
    assert (within.kind, within.group) == ("all-reduce", (0, 1))
    assert found.scheduled == expected


KERNEL = """ENTRY %main (q: bf16[2,8,256,64], k: bf16[2,4,256,64]) -> bf16[2,8,256,64] {{
  %mask = s8[1,2,2] parameter(0)
  %q = bf16[2,8,256,64] parameter(1)
  %k = bf16[2,4,256,64] parameter(2)
  ROOT %NAME.1 = bf16[2,8,256,64] custom-call(%mask, %q, %k), custom_call_target="TARGET", backend_config={{CONFIG}}
}}
""".replace("{{", "{").replace("}}", "}")
SQUARE = 2 * 8 * 256 * 256 * 64
INTERMEDIATE = '"intermediate_tensor_shape": {"dimensions": ["2", "8", "256", "256"]}'


@pytest.mark.parametrize(
    ("name", "target", "config", "expected"),
    [
        ("mine", "tpu_custom_call", '"cost_estimate":{"flops":"12345"}', 12345),
        ("mine", "tpu_custom_call", "", 0),
        ("image_attention_fwd_32", "tpu_custom_call", "", 2 * 2 * SQUARE),
        ("image_attention_bwd_32", "tpu_custom_call", "", 5 * 2 * SQUARE),
        ("splash_mha_fwd_residuals", "tpu_custom_call", "", 2 * 2 * SQUARE // 2),
        ("splash_mqa_dkv_no_residuals", "tpu_custom_call", "", 4 * 2 * SQUARE // 2),
        ("splash_mha_dq_no_residuals", "tpu_custom_call", "", 3 * 2 * SQUARE // 2),
        ("splash_mha_fwd_a", "tpu_custom_call", '}, metadata={op_name="vision/bidirectional/x"', 2 * 2 * SQUARE),
        ("a", "__cudnn$fmhaSoftmax", INTERMEDIATE, 2 * 2 * SQUARE),
        ("a", "__cudnn$fmhaSoftmaxBackward", INTERMEDIATE + ', "mask_type": "CAUSAL"', 5 * 2 * SQUARE // 2),
        ("a", "__cudnn$fmhaScaleBiasSoftmax", INTERMEDIATE + ', "mask_type": "CAUSAL"', 2 * 2 * SQUARE // 2),
        ("a", "__cudnn$fmhaScaleBiasSoftmaxBackward", INTERMEDIATE, 5 * 2 * SQUARE),
    ],
)
def test_kernels(name, target, config, expected):
    """By what they state, else by the products that attention is made of, of which a causal mask leaves half."""
    text = KERNEL.replace("NAME", name).replace("TARGET", target).replace("CONFIG", config)
    found = cost.estimate(hlo.parse(text), timing())
    [event] = found.events
    assert (event.kind, event.flops) == ("kernel", expected)
    # Matrix units are 128 wide: heads of 64, as here, or of 32, of which four share a row, leave them partly idle.
    idle = 4 if "picture" in name else 2 if "splash" in name else 1
    assert found.seconds("kernel") == idle * expected / 1e9
    assert [("states no FLOPs" in note) for note in found.notes] == ([] if expected else [True])


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
    assert np.all([cost.part_of("jit(train_step)/copy") == cost.OTHER])
