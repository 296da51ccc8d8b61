"""Plans of a tiny recipe, compiled for TPU and GPU, agree with counts that do not come from the compiler."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ross_jax.config import ConfigError, from_dict, to_dict
from ross_jax.plan import cost, hlo
from ross_jax.plan.figure import draw
from ross_jax.plan.planner import plan
from ross_jax.plan.program import answering_for, make_job, needed_bytes, train_program
from ross_jax.plan.report import describe
from ross_jax.plan.targets import KERNEL_UTILISATION, open_target
from ross_jax.plan.text import text
from ross_jax.plan.workload import Options, abstract_batch, assume_batch
from ross_jax.sharding import MeshConfig, make_mesh
from ross_jax.training.recipe import RunConfig, complete
from ross_jax.tree import flatten
from tiny import CONFIG


def recipe(**changes) -> RunConfig:
    values = {
        "model": to_dict(CONFIG),
        "text": {"template": "qwen_2", "tokenizer": "none"},
        "data": {"sources": [{"path": "none.json"}], "packing": {"length": 64, "images": 2}, "batch": 8},
        "freeze": {"trainable": ["language/.*", "projector/.*", "denoiser/.*"]},
        "optimizer": {"learning_rate": 1e-3},
        "step": {"dtype": "bfloat16", "remat": "full", "text_chunk": 32},
    }
    return from_dict(RunConfig, complete(values | changes).to_dict())


OPTIONS = Options("tiny", tokens=20.0, images=1.0, epoch=1000)


@pytest.fixture(scope="module")
def target():
    pytest.importorskip("libtpu", reason="needs libtpu: bash launch/setup.sh tpu")
    return open_target("v5e:2x2")


def test_workload():
    config = recipe()
    # The 2 image slots limit a row to 2 conversations; its 64 * 0.95 tokens would hold 3 of them, of 20 tokens each.
    found = assume_batch(config, OPTIONS, 4)
    assert (found.rows, found.conversations, found.tokens, found.images) == (4, 8, 160, 8)
    found = assume_batch(config, Options("tiny", tokens=40.0, images=1.0), 1)
    assert found.rows == round(8 / (64 * 0.95 / 40)) and found.epoch is None
    assert any("--epoch" in line for line in found.assumptions)
    assert assume_batch(config, Options("tiny", rows=12), 4).rows == 12
    with pytest.raises(ConfigError, match="--rows=6: must be a multiple of 4"):
        assume_batch(config, Options("tiny", rows=6), 4)


def test_batch_is_what_the_step_takes():
    config = recipe()
    mesh = make_mesh(MeshConfig(), jax.devices()[:4])
    batch = abstract_batch(config, mesh, 8)
    assert batch["images"].shape == (8, 2, 28, 28, 3) and batch["tokens"].shape == (8, 64)
    program = train_program(config, mesh, 8, 10)
    held = {name: leaf for name, leaf in program.arguments.items() if name.startswith("optimizer/mu/language")}
    assert held["optimizer/mu/language/head"].sharding.shard_shape((64, 96)) == (16, 96)


def test_low_rank_updates_leave_the_base_without_moments():
    """The planned state holds the base in bfloat16, and moments and float32 values of factors alone."""
    program = train_program(recipe(lora={"rank": 4}), make_mesh(MeshConfig(), jax.devices()[:4]), 8, 10)
    found = {name: leaf for name, leaf in program.arguments.items() if "/language/" in name}
    base = {name for name in found if name.startswith("frozen/") and not name.endswith("/lora_scale")}
    assert {found[name].dtype.name for name in base} == {"bfloat16"} and "frozen/language/layers/up/kernel" in base
    factors = 2 * 7  # A and B of seven kernels, each with two moments
    assert len(found) - len(base) - 7 == 3 * factors
    held = found["optimizer/mu/language/layers/up/lora_a"]
    assert held.shape == (2, 64, 4) and held.sharding.shard_shape(held.shape) == (2, 16, 4)


def test_cached_parts_take_the_place_of_pixels():
    config = recipe()
    mesh = make_mesh(MeshConfig(), jax.devices()[:4])
    targets = abstract_batch(config, mesh, 8, ("targets",))
    both = abstract_batch(config, mesh, 8, ("targets", "features"))
    for name in ("image_targets_mean", "image_targets_logvar"):
        assert targets[name].shape == both[name].shape == (8, 2, 8, 8, 4)
    assert "images" in targets and "images" not in both
    assert both["image_features"].dtype == jnp.bfloat16
    with pytest.raises(ConfigError, match=r"features: config\.freeze\.trainable has the vision encoder learn"):
        learns = recipe(freeze={"trainable": ["language/.*", "vision/.*"]})
        abstract_batch(learns, mesh, 8, ("features",))
    with pytest.raises(ConfigError, match="images: no such part"):
        abstract_batch(config, mesh, 8, ("images",))


@pytest.mark.slow
@pytest.mark.parametrize(("cached", "convolutions"), [(("targets",), 1), (("targets", "features"), 0)])
def test_cached_parts_are_not_computed(cached, convolutions):
    """Cached parts leave no convolution of theirs: the autoencoder has many, the vision encoder one."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:4])
    text = train_program(recipe(), mesh, 8, 10, cached).lower().as_text()
    assert text.count("stablehlo.convolution") == convolutions


def test_rows_without_image_slots():
    """A plan for text alone assumes no images, and its batch has no image slots."""
    config = recipe(
        data={"sources": [{"path": "none.json"}], "packing": {"length": 64, "images": 0}, "batch": 8},
        reconstruction={"kind": "none"},
    )
    found = assume_batch(config, Options("tiny", tokens=20.0), 4)
    assert found.images == 0 and found.tokens == pytest.approx(0.95 * 64 * found.rows)
    program = train_program(config, make_mesh(MeshConfig(), jax.devices()[:4]), 8, 10)
    assert program.arguments["batch/images"].size == 0


def test_messages_of_exhausted_memory():
    said = "the total memory required for HLO temporaries (800.00G) exceeds available HBM (30.75G)"
    assert needed_bytes(said) == 800 * 2**30
    assert needed_bytes("Ran out of memory in memory space hbm. Used 20.50M of 15.75G hbm.") == 20.5 * 2**20
    assert needed_bytes("something else") is None


def products(jaxpr, times=1):
    """FLOPs of matrix products and convolutions in a traced program, times the trips of loops: an upper bound."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            size = 1
            for i in contracted:
                size *= left[i]
            total += 2 * times * equation.outvars[0].aval.size * size
        if equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            features = equation.params["dimension_numbers"].rhs_spec[0]
            total += 2 * times * equation.outvars[0].aval.size * kernel.size // kernel.shape[features]
        turns = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            for inner in value if isinstance(value, (list, tuple)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if isinstance(inner, jax.extend.core.Jaxpr):
                    total += products(inner, times * turns)
    return total


@pytest.mark.slow
def test_products_on_tpu():
    """Batched products that XLA compiles to dilated convolutions count as the products."""
    pytest.importorskip("libtpu", reason="needs libtpu: bash launch/setup.sh tpu")
    target = open_target("v5e:1x1")
    at = jax.sharding.SingleDeviceSharding(target.devices[0])

    def program(q, k, v):
        def layer(q, _):
            scores = jax.nn.softmax(jnp.einsum("bshd,bthd->bhst", q, k))
            return jnp.einsum("bhst,bthd->bshd", scores, v), None

        return jax.lax.scan(layer, q, length=6)[0]

    shape = jax.ShapeDtypeStruct((2, 256, 4, 128), jnp.bfloat16, sharding=at)
    compiled = jax.jit(program).lower(shape, shape, shape).compile()
    timing = target.timing(make_mesh(MeshConfig(), target.devices))
    found = cost.estimate(hlo.parse(compiled.as_text()), timing)
    assert sum(event.count * event.flops for event in found.events) == 6 * 2 * 2 * (2 * 4 * 256 * 256) * 128
    assert found.seconds("compute") > 6 * 2 * 2 * (2 * 4 * 256 * 256) * 128 / target.chip.peak


@pytest.mark.slow
def test_windowed_product_on_tpu():
    """A product that XLA overlaps with the gathering of its operand in a loop keeps its FLOPs and its bytes."""
    pytest.importorskip("libtpu", reason="needs libtpu: bash launch/setup.sh tpu")
    target, size = open_target("v5e:4x4"), 16384
    mesh = make_mesh(MeshConfig(1, 1, 16), target.devices)
    rows, columns = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("tensor", None), (None, "tensor")))
    left, right = (jax.ShapeDtypeStruct((size, size), jnp.bfloat16, sharding=at) for at in (rows, columns))
    compiled = jax.jit(jnp.matmul, out_shardings=columns).lower(left, right).compile()
    found = cost.estimate(hlo.parse(compiled.as_text()), target.timing(mesh))
    assert sum(event.count * event.flops for event in found.events) == 2 * size**3 // 16
    permuted = [event.count for event in found.events if event.kind == "collective-permute"]
    assert sum(permuted) >= 15 and max(permuted) == 4
    received = 15 * size * size * 2 / 16  # bytes per device
    assert received / 90e9 <= found.seconds("collective-permute") < 1.5 * received / 90e9


@pytest.mark.slow
def test_plan_on_one_chip():
    """FLOPs are close to those of the traced step, and memory covers its arguments."""
    pytest.importorskip("libtpu", reason="needs libtpu: bash launch/setup.sh tpu")
    config, target = recipe(), open_target("v5e:1x1")
    found = plan(config, target, OPTIONS)
    mesh = make_mesh(config.mesh, target.devices)
    program = train_program(config, mesh, found.rows, 100)
    with jax.set_mesh(mesh):
        traced = products(program.function.trace(*program.inputs).jaxpr.jaxpr)
    assert 0.85 * traced < found.flops <= traced
    assert found.memory["arguments"] >= sum(leaf.size * leaf.dtype.itemsize for leaf in program.arguments.values())
    assert found.needed < 1.05 * sum(found.memory.values()) and found.fits


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
def test_plan(topology, tmp_path):
    pytest.importorskip("libtpu", reason="needs libtpu: bash launch/setup.sh tpu")
    found = plan(recipe(), open_target(topology), dataclasses.replace(OPTIONS, dump=tmp_path / "dump"))
    assert (found.devices, found.mesh, found.rows) == (4, {"data": 1, "fsdp": 4, "tensor": 1}, 4)
    seconds = found.seconds
    assert seconds["step"] == pytest.approx(seconds["compute"] + seconds["kernels"] + seconds["collectives"])
    assert 0 < seconds["overlapped"] <= seconds["step"] * 1.0001 and seconds["collectives"] > 0
    assert sum(part["share"] for part in found.parts.values()) == pytest.approx(1)
    assert {"encoder", "language model", "text loss", "autoencoder", "reconstruction", "optimizer"} <= set(found.parts)
    assert found.parts.get("other", {"share": 0})["share"] < 0.1
    assert found.rates["conversations"] * seconds["step"] == pytest.approx(8)
    assert found.steps_per_epoch == 125 and found.hours_per_epoch == pytest.approx(125 * seconds["step"] / 3600)
    assert found.parameters["autoencoder"]["trainable"] == 0 < found.parameters["language"]["trainable"]
    replicated = {line["path"] for line in found.replicated}
    assert "language/final_norm/scale" in replicated and "language/head" not in replicated
    assert {line["axes"] for line in found.collectives} == {"fsdp"}
    assert found.notes == []
    [dump] = (tmp_path / "dump").iterdir()
    assert "ENTRY" in dump.read_text()
    printed = text(found)
    for word in ("fits, ", "An estimate", "hours per epoch", "text loss", "that every device holds in full", "assumed"):
        assert word in printed
    json.dumps(dataclasses.asdict(found))
    draw(found, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_plan_for_gpus():
    """FLOPs are close to those of the traced step, in a plan that needs no GPU.

    The trace does not show the products inside cuDNN's attention, so they are left out.
    """
    pytest.importorskip("jax_cuda12_plugin", reason="needs the CUDA plugin: bash launch/setup.sh cuda")
    config, target = recipe(), open_target("h100:1x1x1")
    found = plan(config, target, OPTIONS)
    mesh = make_mesh(config.mesh, target.devices)
    program = train_program(config, mesh, found.rows, 100)
    with jax.set_mesh(mesh):
        traced = products(program.function.trace(*program.inputs).jaxpr.jaxpr)
    inside = found.seconds["kernels"] * target.chip.peak * KERNEL_UTILISATION
    assert inside > 0 and 0.85 * traced < found.flops - inside <= traced
    assert found.fits and found.memory["temporaries"] > 0
    assert "no cycles" in found.method and "MEM_FRACTION" in text(found)


def test_cudnn_attention_lowers_for_another_gpu():
    """JAX gets the compute capability of the target when it asks for that of the device."""
    pytest.importorskip("jax_cuda12_plugin", reason="needs the CUDA plugin: bash launch/setup.sh cuda")
    from jax._src.cudnn import fused_attention_stablehlo as asked

    [device, *_] = open_target("h100:1x1x8").devices
    with answering_for(device):
        assert asked.check_compute_capability("9.0") and not asked.check_compute_capability("10.0")
        assert asked.is_cuda_compute_capability_equal("9.0")
    assert not asked.is_cuda_compute_capability_equal("9.0")


@pytest.mark.slow
def test_generation(target):
    options = dataclasses.replace(OPTIONS, objective="generate", prompt=32, new_tokens=8)
    found = plan(recipe(), target, options)
    assert found.seconds["step"] == pytest.approx(found.seconds["prefill"] + found.seconds["decode"])
    assert found.seconds["token"] * 8 == pytest.approx(found.seconds["decode"]) and found.seconds["decode"] > 0
    assert found.rows == 4 and found.mfu is None
    with pytest.raises(ConfigError, match="--prompt=3: an image alone has 4 tokens"):
        plan(recipe(), target, dataclasses.replace(options, prompt=3))


@pytest.mark.slow
def test_what_does_not_fit():
    """A plan says that head and embedding of 4 GiB each, with their moments, do not fit on a chip of 15.75 GiB."""
    pytest.importorskip("libtpu", reason="needs libtpu: bash launch/setup.sh tpu")
    model = dataclasses.replace(CONFIG, language=dataclasses.replace(CONFIG.language, vocab_size=2**24))
    found = plan(recipe(model=to_dict(model)), open_target("v5e:1x1"), OPTIONS)
    assert not found.fits and "does not fit" in text(found)
    assert found.needed is None or found.needed > found.capacity


def test_a_mesh_that_does_not_divide(target):
    with pytest.raises(ConfigError, match="does not divide 4 devices"):
        plan(recipe(mesh={"data": 3}), target, OPTIONS)


def test_rules_of_the_recipe_count(target):
    def replicated(**mesh):
        return {line["path"] for line in describe(make_job(recipe(mesh=mesh), target, OPTIONS)).replicated}

    assert "language/head" not in replicated() and "language/head" in replicated(rules=[["embed", []]])


def test_flat_arguments_have_every_leaf(target):
    config = recipe()
    program = train_program(config, make_mesh(config.mesh, target.devices), 4, 10)
    kinds = {name.partition("/")[0] for name in program.arguments}
    assert kinds == {"parameters", "frozen", "optimizer", "batch"}
    assert flatten({"a": program.arguments})["a/batch/tokens"].shape == (4, 64)
