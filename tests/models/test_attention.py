"""Attention: kernels, interpreted on CPU, give XLA's outputs and gradients; the mesh chooses the kernel."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from ross_jax.models.attention import (
    attention,
    bidirectional_attention,
    causal_attention,
    needs_mask,
    segment_mask,
    splash_attention,
)
from ross_jax.models.blockwise import blockwise_attention
from ross_jax.models.image_attention import fits, image_attention
from ross_jax.models.layers import SAVED_ATTENTION
from ross_jax.models.packed_attention import BLOCK, packed_attention
from ross_jax.plan.program import GPU_OPTIONS, answering_for
from ross_jax.plan.targets import open_target
from ross_jax.sharding import AXES, MeshConfig, make_mesh


def inputs(batch: int, length: int, heads: int, kv_heads: int, dim: int, seed: int = 0):
    """Random queries, keys, values, and segments: each row has two conversations of odd lengths, then padding."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = [(batch, length, n, dim) for n in (heads, kv_heads, kv_heads)]
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    segments = np.zeros((batch, length), np.int32)
    for row in range(batch):
        first = 37 + 13 * row
        segments[row, :first], segments[row, first : length - 29 * row] = 1, 2
    return *arrays, jnp.asarray(segments)


def xla(query, key, value, segments):
    return attention(query, key, value, segment_mask(segments, segments))


def whole(query, key, value, _):
    return jax.nn.dot_product_attention(query, key, value)


def interpreted(*arguments):
    return splash_attention(*arguments, interpret=True)


def real(function):
    """A function that returns the output of `function` and its gradients, with padding masked."""

    def run(query, key, value, segments, weights):
        def loss(*arrays):
            output = function(*arrays, segments) * (segments != 0)[:, :, None, None]
            return jnp.sum(output * weights), output

        gradients, output = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(query, key, value)
        return output, *gradients

    return jax.jit(run)


@pytest.mark.parametrize(
    ("batch", "length", "heads", "kv_heads", "dim"),
    [(2, 256, 4, 2, 64), (1, 128, 2, 2, 72), (3, 256, 4, 1, 128), (2, 150, 2, 2, 64)],
)
def test_splash_is_attention(batch, length, heads, kv_heads, dim):
    """Outputs and gradients are XLA's for the head sizes of Llama, CLIP and SigLIP and for uneven lengths."""
    arguments = inputs(batch, length, heads, kv_heads, dim)
    weights = jax.random.normal(jax.random.key(9), arguments[0].shape)
    for found, expected in zip(real(interpreted)(*arguments, weights), real(xla)(*arguments, weights), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("batch", "length", "heads", "dim"), [(2, 128, 2, 64), (1, 729, 2, 72), (2, 577, 1, 64), (1, 130, 2, 72)]
)
def test_bidirectional_splash_is_attention(batch, length, heads, dim):
    """Outputs and gradients are XLA's at the lengths of vision towers, which no tile divides."""
    *arrays, segments = inputs(batch, length, heads, heads, dim)
    weights = jax.random.normal(jax.random.key(9), arrays[0].shape)
    everywhere = jnp.ones_like(segments)

    def splash(query, key, value, _):
        return bidirectional_attention(query, key, value, interpret=True)

    found, expected = (real(function)(*arrays, everywhere, weights) for function in (splash, whole))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5)


def interpreted_images(query, key, value, _):
    assert fits(query.shape, key.shape, query.dtype)
    return bidirectional_attention(query, key, value, interpret=True)


@pytest.mark.parametrize(
    ("batch", "length", "heads", "dim"),
    [(3, 128, 2, 64), (1, 729, 4, 64), (2, 1, 4, 32), (1, 577, 2, 128), (2, 50, 8, 16)],
)
def test_image_attention_is_attention(batch, length, heads, dim):
    """Outputs and gradients in bfloat16 are as close to float32 as XLA's, with one to eight heads in a row of lanes."""
    *arrays, segments = inputs(batch, length, heads, heads, dim)
    segments = jnp.ones_like(segments)
    weights = jax.random.normal(jax.random.key(9), arrays[0].shape)
    halves = [array.astype(jnp.bfloat16) for array in arrays]
    with jax.default_matmul_precision("highest"):
        exact = real(whole)(*arrays, segments, weights)
    found, others = (real(each)(*halves, segments, weights) for each in (interpreted_images, whole))
    for ours, theirs, wanted in zip(found, others, exact, strict=True):
        assert ours.dtype == theirs.dtype
        errors = [float(jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32) - wanted)))) for x in (ours, theirs)]
        assert ours.shape == theirs.shape and errors[0] < 1.5 * errors[1] + 1e-6


@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "dim", "dtype"),
    [
        (729, 16, 16, 72, "bfloat16"),  # a head crosses rows of lanes
        (729, 1, 1, 64, "bfloat16"),  # the head fills half a row of lanes
        (1025, 2, 2, 64, "bfloat16"),  # the scores exceed the memory on chip
        (729, 4, 2, 64, "bfloat16"),  # grouped heads
        (729, 2, 2, 64, "float32"),
    ],
)
def test_what_image_attention_leaves_to_splash(length, heads, kv_heads, dim, dtype):
    assert fits((2, 729, 16, 64), (2, 729, 16, 64), "bfloat16")
    assert not fits((2, length, heads, dim), (2, length, kv_heads, dim), dtype)


@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize(("length", "dim"), [(729, 64), (1024, 128)])
def test_image_attention_compiles(topology, length, dim):
    """Both passes compile for each TPU, whose on-chip memory holds the scores."""
    pytest.importorskip("libtpu", reason="needs libtpu: bash launch/setup.sh tpu")
    device = open_target(topology).devices[0]
    array = jax.ShapeDtypeStruct((2, length, 256), jnp.bfloat16, sharding=SingleDeviceSharding(device))

    def run(query, key, value, gradient):
        output, pull = jax.vjp(lambda *arrays: image_attention(*arrays, dim), query, key, value)
        return output, *pull(gradient)

    text = jax.jit(run).lower(*[array] * 4).compile().as_text()
    assert all(f"image_attention_{way}_{dim}" in text for way in ("fwd", "bwd"))


def test_a_batch_without_images_compiles():
    """Both passes compile for a batch of size 0, as a recipe without image slots has it."""
    pytest.importorskip("libtpu", reason="needs libtpu: bash launch/setup.sh tpu")
    mesh = make_mesh(MeshConfig(1, -1, 1), open_target("v5e:2x2").devices)
    array = jax.ShapeDtypeStruct((0, 729, 16, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        jax.jit(jax.grad(lambda *arrays: attention(*arrays).sum(), (0, 1, 2))).lower(*[array] * 3).compile()


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 4)])
def test_image_attention_on_a_mesh(sizes):
    """Outputs and gradients equal those of one device, whichever mesh axes split the images."""
    *arrays, segments = inputs(8, 130, 2, 2, 64)
    weights = jax.random.normal(jax.random.key(9), arrays[0].shape)
    arguments = (*(array.astype(jnp.bfloat16) for array in arrays), jnp.ones_like(segments), weights)
    expected = real(interpreted_images)(*arguments)
    with jax.set_mesh(make_mesh(MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])):
        found = real(interpreted_images)(*arguments)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("batch", "length", "heads", "kv_heads", "dim"),
    [(2, 256, 4, 2, 64), (1, 700, 2, 2, 72), (3, 300, 4, 1, 8), (1, 90, 3, 3, 4), (1, 1100, 2, 1, 8), (0, 9, 2, 2, 8)],
)
@pytest.mark.parametrize("order", ["packed", "mixed"])
def test_packed_attention_is_attention(batch, length, heads, kv_heads, dim, order):
    """Outputs and gradients are XLA's for lengths of one to many blocks and segments in any order."""
    *arrays, segments = inputs(batch, length, heads, kv_heads, dim)
    if order == "mixed":
        segments = jax.random.randint(jax.random.key(1), segments.shape, 0, 4) * 3
    weights = jax.random.normal(jax.random.key(9), arrays[0].shape)
    found, expected = (real(function)(*arrays, segments, weights) for function in (packed_attention, xla))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5)


def test_packed_attention_leaves_out_other_conversations():
    """NaN in one conversation reaches neither outputs nor gradients of the others."""
    lengths = (3 * BLOCK, 2 * BLOCK + 5, BLOCK - 5)
    query, key, value, _ = inputs(1, sum(lengths), 4, 2, 8)
    segments = jnp.repeat(jnp.arange(1, 4), jnp.asarray(lengths), total_repeat_length=sum(lengths))[None]
    others = (segments == 1)[:, :, None, None]
    key, value = (jnp.where(others, jnp.nan, x) for x in (key, value))
    output, pull = jax.vjp(lambda *arrays: packed_attention(*arrays, segments), query, key, value)
    gradients = pull(jnp.where(others, 0, jnp.ones_like(output)))
    assert all(bool(jnp.isfinite(x[:, lengths[0] :]).all()) for x in (output, *gradients))
    assert bool(jnp.isnan(output[:, : lengths[0]]).all())


@pytest.mark.parametrize("sizes", [None, (2, 2, 2)])
def test_what_packed_attention_returns_can_be_kept(sizes):
    """Outputs saved under SAVED_ATTENTION are not computed again in the backward pass, on a mesh too."""
    *arrays, segments = inputs(8, 300, 4, 2, 8)
    names, policies = jax.checkpoint_policies.save_only_these_names(SAVED_ATTENTION), jax.checkpoint_policies

    def layer(*arrays):
        return jnp.sin(causal_attention(*(checkpoint_name(x, SAVED_ATTENTION) for x in arrays), segments, None)).sum()

    def loops(policy) -> int:
        run = jax.jit(jax.value_and_grad(jax.checkpoint(layer, policy=policy), (0, 1, 2)))
        return run.lower(*arrays).as_text().count("stablehlo.while")

    with jax.set_mesh(make_mesh(MeshConfig(*sizes))) if sizes else contextlib.nullcontext():
        assert loops(names) == loops(policies.everything_saveable) < loops(policies.nothing_saveable)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 2, 4)])
def test_packed_attention_on_a_mesh(sizes):
    """Outputs and gradients equal those of one device, without collectives where the tensor axis divides the heads."""
    *arrays, segments = inputs(4, 300, 4, 2, 64)
    weights = jax.random.normal(jax.random.key(9), arrays[0].shape)

    def run(*arguments):
        return causal_attention(*arguments, mask=None)

    expected = real(run)(*arrays, segments, weights)
    mesh = make_mesh(MeshConfig(*sizes))
    split = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor" if sizes[2] == 2 else None))
    with jax.set_mesh(mesh):
        arguments = [jax.device_put(x, split) for x in arrays]
        found = real(run)(*arguments, segments, weights)
        text = jax.jit(run).lower(*arguments, segments).compile().as_text()
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5)
    assert sizes[2] == 4 or not re.search("all-gather|all-reduce|all-to-all|permute", text)


@pytest.mark.parametrize(
    ("batch", "length", "heads", "kv_heads", "dim"),
    [(2, 256, 4, 4, 64), (1, 729, 2, 2, 72), (3, 300, 4, 1, 8), (2, 1, 3, 3, 4), (0, 9, 2, 2, 8)],
)
def test_blocks_that_see_everything_are_attention(batch, length, heads, kv_heads, dim):
    """Blockwise attention without segments gives XLA's outputs and gradients."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(batch, length, n, dim) for n in (heads, kv_heads, kv_heads)]
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    segments, weights = jnp.ones((batch, length), jnp.int32), jax.random.normal(jax.random.key(9), shapes[0])

    def blocks(query, key, value, _):
        return blockwise_attention(query, key, value)

    found, expected = (real(function)(*arrays, segments, weights) for function in (blocks, whole))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(("queries", "keys"), [(3, 300), (300, 5), (1, 1)])
def test_blocks_attend_to_all_keys(queries, keys):
    """Outputs and gradients of the public function are XLA's, also if there are far more keys than queries or fewer."""
    seeds = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, queries, 4, 8), (2, keys, 2, 8), (2, keys, 2, 8), (2, queries, 4, 8)]
    *arrays, weights = (jax.random.normal(seed, shape) for seed, shape in zip(seeds, shapes, strict=True))

    def run(function):
        output, pull = jax.vjp(function, *arrays)
        return output, *pull(weights)

    for ours, theirs in zip(run(attention), run(jax.nn.dot_product_attention), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5)


def test_packed_attention_in_bfloat16():
    """Outputs and gradients in bfloat16 are as close to float32 as XLA's."""
    *arrays, segments = inputs(2, 512, 4, 2, 64)
    weights = jax.random.normal(jax.random.key(9), arrays[0].shape)
    exact = real(xla)(*arrays, segments, weights)
    halves = [array.astype(jnp.bfloat16) for array in arrays]
    found, others = (real(function)(*halves, segments, weights) for function in (packed_attention, xla))
    for ours, theirs, wanted in zip(found, others, exact, strict=True):
        assert ours.dtype == theirs.dtype
        errors = [float(jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32) - wanted)))) for x in (ours, theirs)]
        assert errors[0] < 1.5 * errors[1]


def test_a_layer_computed_again_makes_its_scores_once():
    """The backward pass of a rematerialised layer repeats its two products once and adds four for the gradients."""
    *arrays, _ = inputs(1, 16, 2, 2, 8)
    layer = jax.checkpoint(lambda *x: jnp.sin(blockwise_attention(*x)))
    _, pull = jax.vjp(layer, *arrays)
    assert str(jax.make_jaxpr(pull)(arrays[0])).count("dot_general[") == 2 + 4


def test_padding_is_finite():
    query, key, value, segments = inputs(2, 300, 4, 2, 8)
    output, pull = jax.vjp(lambda *arrays: packed_attention(*arrays, segments), query, key, value)
    assert all(bool(jnp.isfinite(x).all()) for x in (output, *pull(jnp.ones_like(output))))


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 2, 4)])
def test_splash_on_a_mesh(sizes):
    """Outputs and gradients are XLA's on a mesh; 4-fold tensor parallelism repeats the 2 key heads."""
    arguments = inputs(4, 128, 4, 2, 64)
    weights = jax.random.normal(jax.random.key(9), arguments[0].shape)
    expected = real(xla)(*arguments, weights)
    with jax.set_mesh(make_mesh(MeshConfig(*sizes))):
        found = real(interpreted)(*arguments, weights)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(("platform", "wanted"), [("tpu", False), ("cpu", False), ("gpu", True)])
def test_the_mesh_chooses(platform, wanted):
    """The platform of the mesh decides whether attention needs a mask, not the platform of the host."""
    device = AbstractDevice("device", None, platform)
    mesh = AbstractMesh((1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert needs_mask() == wanted
    assert not needs_mask()


@pytest.mark.parametrize(("precision", "dtype"), [(None, "bfloat16"), ("highest", "float32")])
def test_towers_on_tpu_round_operands_as_products_do(precision, dtype):
    """The kernel rounds float32 operands as XLA's products do: to bfloat16 at the default precision only."""
    mesh = AbstractMesh(
        (1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=AbstractDevice("a", None, "tpu")
    )
    arrays = [jax.ShapeDtypeStruct((2, 130, 2, 64), jnp.float32)] * 3
    with jax.sharding.use_abstract_mesh(mesh), jax.default_matmul_precision(precision):
        traced = jax.make_jaxpr(attention)(*arrays)
    assert [each.dtype for each in traced.out_avals] == [jnp.float32]
    [kernel] = pallas_calls(traced.jaxpr)
    read = {x.aval.dtype for x in kernel.invars if x.aval.ndim > 2}
    assert {str(each) for each in read if jnp.issubdtype(each, jnp.floating)} == {dtype}


def pallas_calls(jaxpr):
    """Yields the equations that call a Pallas kernel, at any depth."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
            continue
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from pallas_calls(inner)


def test_a_mask_that_is_given_decides():
    query, key, value, segments = inputs(2, 64, 4, 2, 8)
    mask = segment_mask(segments, segments)
    expected = attention(query, key, value, mask)
    np.testing.assert_array_equal(causal_attention(query, key, value, segments, mask), expected)


def cudnn_is(function, gpu, length, heads, kv_heads, dim):
    """Checks that `function` runs in cuDNN, with outputs and gradients as close to float32 as XLA's."""
    *arrays, segments = inputs(2, length, heads, kv_heads, dim)
    weights = jax.random.normal(jax.random.key(9), arrays[0].shape)
    halves = [array.astype(jnp.bfloat16) for array in arrays]
    with jax.default_matmul_precision("highest"):
        exact = real(function)(*arrays, segments, weights)
    others = real(function)(*halves, segments, weights)
    with jax.set_mesh(make_mesh(MeshConfig(1, 1, 1), [gpu])):
        compiled = real(function).lower(*halves, segments, weights).compile()
        found = jax.device_get(compiled(*halves, segments, weights))
    assert "__cudnn$fmha" in compiled.as_text()
    for ours, theirs, wanted in zip(found, others, exact, strict=True):
        errors = [np.sqrt(np.mean(np.square(np.asarray(x, np.float32) - wanted))) for x in (ours, theirs)]
        assert errors[0] < 1.5 * errors[1]


@pytest.mark.parametrize(("heads", "kv_heads"), [(28, 4), (32, 4), (32, 32)])
def test_cudnn_compiles_whatever_the_tensor_axis_divides(heads, kv_heads):
    """cuDNN's attention compiles where the tensor axis divides all heads, query heads alone, or none."""
    pytest.importorskip("jax_cuda12_plugin", reason="needs the CUDA plugin: bash launch/setup.sh cuda")
    devices = open_target("h100:1x1x8").devices
    mesh = make_mesh(MeshConfig(1, 1, 8), devices)
    split = NamedSharding(mesh, PartitionSpec(None, None, "tensor"))
    shapes = [(2, 512, count * 128) for count in (heads, kv_heads, kv_heads)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=split) for shape in shapes]
    segments = jax.ShapeDtypeStruct((2, 512), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))

    def loss(query, key, value, segments):
        split = (x.reshape(*x.shape[:2], -1, 128) for x in (query, key, value))
        return causal_attention(*split, segments, segment_mask(segments, segments)).astype(jnp.float32).sum()

    with jax.set_mesh(mesh), answering_for(devices[0]):
        lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays, segments)
        assert "__cudnn$fmha" in lowered.compile(compiler_options=GPU_OPTIONS).as_text()


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (28, 4)])
@pytest.mark.parametrize("length", [512, 2048])
def test_cudnn_is_attention_inside_segments(gpu, length, heads, kv_heads):

    def packed(query, key, value, segments):
        return causal_attention(query, key, value, segments, segment_mask(segments, segments))

    cudnn_is(packed, gpu, length, heads, kv_heads, 128)


@pytest.mark.gpu
@pytest.mark.parametrize(("length", "heads", "dim"), [(729, 16, 72), (576, 16, 64), (577, 2, 64)])
def test_cudnn_is_attention_of_towers(gpu, length, heads, dim):
    """Attention without a mask runs in cuDNN at the lengths and head sizes of SigLIP and CLIP."""
    cudnn_is(lambda query, key, value, _: attention(query, key, value), gpu, length, heads, heads, dim)
