"""What a run reports: FLOPs of a step, waiting for input, and a loss outside its range."""

import dataclasses
import math
import time

import jax
import jax.numpy as jnp
import pytest
from jax.interpreters.partial_eval import dce_jaxpr

from ross_jax.lora import LoraConfig
from ross_jax.models.layers import ONES
from ross_jax.models.ross import RossConfig
from ross_jax.objectives.loss import make_loss
from ross_jax.objectives.reconstruction import ReconstructionConfig
from ross_jax.sharding import batch_sharding, make_mesh
from ross_jax.training import metrics
from ross_jax.training.loop import global_batches
from ross_jax.training.metrics import LossRangeMonitor, Meter, matrix_sizes, step_flops
from ross_jax.training.optimizer import OptimizerConfig, learning_rates, make_optimizer
from ross_jax.training.state import FreezeConfig, abstract_tree, split
from ross_jax.training.step import make_state, make_train_step
from tiny import CONFIG, MODELS, ONE_DEVICE, STAGE2, make_batch

FREEZE = {
    "stage 1": FreezeConfig((r"projector/.*", r"denoiser/.*"), dtype="float32"),
    "stage 2": STAGE2,
    "encoder too": FreezeConfig((r"(?!autoencoder/).*",), dtype="float32"),
    "denoiser alone": FreezeConfig((r"denoiser/.*",), dtype="float32"),
    "low rank": STAGE2,
}
UPDATES = {"low rank": LoraConfig(5, targets=(r"language/layers/(out|up)/kernel", r"projector/.*"))}


def products(jaxpr, times: int = 1):
    """Yields (kind, FLOPs, sizes of dimensions) of each matrix product and convolution, with all trips of loops.

    Left out: products of attention, which have batch dimensions; rotary embedding's swap of a head's halves; and sums,
    which are products with ones.
    """
    swap = (CONFIG.language.head_dim,) * 2
    for equation in jaxpr.eqns:
        shapes = [var.aval.shape for var in (*equation.invars, *equation.outvars)]
        numbers = equation.params.get("dimension_numbers")
        if (
            equation.primitive.name == "dot_general"
            and not numbers[1][0]
            and swap not in shapes
            and shapes[0][-1] != ONES
        ):
            contracted = math.prod(shapes[0][i] for i in numbers[0][0])
            yield "matrix", 2 * times * contracted * math.prod(shapes[2]), set(sum(shapes, ()))
        if equation.primitive.name == "conv_general_dilated":
            window = math.prod(shapes[1]) // shapes[1][numbers.rhs_spec[0]]
            yield "window", 2 * times * window * math.prod(shapes[2]), set(sum(shapes, ()))
        length = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from products(inner, times * length)


def program(
    model: RossConfig,
    freeze: FreezeConfig,
    updates: LoraConfig | None,
    reconstruction: ReconstructionConfig,
    batch: dict,
    text_weight: float = 1.0,
):
    """The traced step without unused values, and the shapes of its parameters."""
    settings = OptimizerConfig(1e-3)
    optimizer = make_optimizer(settings, 10)
    tree = abstract_tree(model, freeze, make_mesh(ONE_DEVICE, jax.devices()[:1]), None, updates)
    state = jax.eval_shape(lambda p, f: make_state(p, f, optimizer), *split(tree, freeze))
    loss = make_loss(model, reconstruction, text_weight=text_weight, chunk=32)
    step = make_train_step(loss, optimizer, jax.random.key(0), 1, learning_rates(settings, 10))
    traced = jax.make_jaxpr(step)(state, batch).jaxpr
    return dce_jaxpr(traced, [True] * len(traced.outvars))[0], tree


@pytest.mark.parametrize(
    ("stage", "kind", "text"),
    [
        *((stage, "denoise", 1.0) for stage in ("stage 1", "stage 2", "encoder too", "low rank")),
        *(("stage 2", kind, 1.0) for kind in MODELS if kind != "denoise"),
        ("stage 2", "denoise", 0.0),
        ("denoiser alone", "denoise", 0.0),
    ],
)
def test_flops_are_those_of_the_program(stage, kind, text):
    """The FLOPs of a full batch are those of the products with matrices in the traced step.

    A kernel with a low-rank update has no gradient of its own. Where only the denoiser learns, there are no logits, and
    the backward pass ends at the denoiser.
    """
    batch = make_batch()
    batch["segments"][:], batch["image_start"][:] = 1, (2, 11)
    model, updates = MODELS[kind], UPDATES.get(stage, LoraConfig())
    freeze = FREEZE[stage].with_updates(model, updates)
    jaxpr, tree = program(model, freeze, updates, ReconstructionConfig(kind.split()[0], remat="none"), batch, text)
    tokens, images = float(batch["tokens"].size), float(batch["image_start"].size)
    found = 0
    for form, flops, sizes in products(jaxpr):
        patches = {CONFIG.vision.patch_size, model.teacher.patch_size if model.teacher else None}
        autoencoder = form == "window" and not patches & sizes
        seen = model.teacher.image_size if model.teacher else CONFIG.target_size
        resizing = form == "matrix" and {CONFIG.vision.image_size, seen} <= sizes
        found += 0 if autoencoder or resizing else flops
    # The backward pass computes logits again, which does not count.
    found -= 2 * CONFIG.language.vocab_size * CONFIG.language.hidden_size * tokens * bool(text)
    draws = 4 if kind == "denoise" else 0
    trained = set(split(tree, freeze)[0]) - ({"denoiser"} if kind == "none" else set())
    sizes = matrix_sizes(tree, logits=bool(text))
    assert step_flops(model, sizes, trained, draws, tokens, images) == pytest.approx(found, rel=1e-9)


def test_a_tied_head_counts_and_a_looked_up_table_does_not():
    table = jax.ShapeDtypeStruct((96, 64), jnp.float32)
    assert matrix_sizes({"language": {"embedding": table}}) == {"language/embedding": 96 * 64}
    assert matrix_sizes({"language": {"embedding": table, "head": table}}) == {"language/head": 96 * 64}


def test_mfu_is_work_over_time_and_devices(monkeypatch):
    sizes = {"language/head": 1000}
    monkeypatch.setitem(metrics.PEAK_FLOPS, jax.devices()[0].device_kind, 1e6)
    meter = Meter(CONFIG, sizes, {"language"}, 4)
    begin = time.perf_counter()
    rates = meter.read([{"tokens": 10.0, "images": 0.0}, {"tokens": 30.0, "images": 0.0}])
    assert rates["seconds_per_step"] * 2 <= time.perf_counter() - begin + 0.1
    # 40 tokens; per weight 2 FLOPs for the logits and for each of the two gradients.
    work = 40 * 1000 * 2 * 3
    seconds = 2 * rates["seconds_per_step"]
    assert rates["mfu"] == pytest.approx(work / seconds / 1e6 / jax.device_count())
    assert rates["tokens_per_second"] == pytest.approx(40 / seconds)


@dataclasses.dataclass
class Running:
    ready: bool

    def is_ready(self) -> bool:
        return self.ready


@pytest.mark.parametrize(("ready", "expected"), [(True, 0.3), (False, 0.0)])
def test_waiting_counts_where_the_device_is_idle(ready, expected):
    def slow():
        for seed in range(3):
            time.sleep(0.1)
            yield make_batch(seed=seed)

    meter = Meter(CONFIG, {}, set(), 0)
    meter.running = Running(ready)
    sharding = batch_sharding(make_mesh(ONE_DEVICE, jax.devices()[:1]))
    assert len(list(global_batches(slow(), sharding, meter=meter))) == 3
    assert meter.waited == pytest.approx(expected, abs=0.2 if ready else 0)


def warnings(watch: LossRangeMonitor, values: list[float], start: int = 0) -> list[int]:
    return [step for step, value in enumerate(values, start=start + 1) if watch.update(step, value)]


def test_a_loss_outside_its_range_is_said_once():
    watch = LossRangeMonitor((0.1, 0.3), start=5, logs=4)
    assert warnings(watch, [9.0] * 5) == []  # the warmup
    assert warnings(watch, [0.2] * 4, 5) == []
    assert warnings(watch, [0.5] * 9, 9) == [11]  # the mean of four losses leaves the range
    assert warnings(watch, [0.2] * 9, 18) == []
    assert warnings(watch, [0.0] * 9, 27) == [30]  # the mean was back in the range before
    assert LossRangeMonitor((0.1, 0.3), 0, 1).update(7, 0.25) is None
    message = "step 7: the reconstruction loss is 0.400 on average over the last 1 logs; expected are 0.1 to 0.3"
    assert LossRangeMonitor((0.1, 0.3), 0, 1).update(7, 0.4).startswith(message)
