"""Measures a recipe's train step: alone, beside the same model in PyTorch, or packed rows beside padded rows."""

import dataclasses
import functools
import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from ross_jax.bench.workload import Workload, make_workload
from ross_jax.config import UserError
from ross_jax.data.packing import PackingConfig
from ross_jax.sharding import batch_sharding, make_mesh, use_mesh
from ross_jax.training.build import build_step
from ross_jax.training.cached import objective_of
from ross_jax.training.metrics import PEAK_FLOPS, matrix_sizes, peak_memory, step_flops
from ross_jax.training.recipe import RunConfig
from ross_jax.training.state import Tree, init_components, init_factors, split
from ross_jax.training.step import make_state
from ross_jax.tree import merge

Figures = dict[str, float | int | str]

STEPS = 1_000_000
"""Steps of the run that the step is taken from. With so many the learning rate hardly changes."""
CHECKED = 2
"""Steps whose losses must agree before PyTorch is timed. The second step's also depend on gradients and optimizer."""
AGREEMENT = {"float32": 1e-4, "bfloat16": 2e-2}
"""`step.dtype` -> largest relative difference of a loss."""


class Stepper:
    """The jitted step of a recipe, its state, and the batch that each step takes.

    Args:
      rows: rows of a step. None: as many as hold `config.data.batch` conversations.

    Raises:
      UserError: rows that the devices cannot share.
    """

    def __init__(self, config: RunConfig, rows: int | None = None):
        self.config = config
        self.mesh = make_mesh(config.mesh)
        multiple = self.mesh.shape["data"] * self.mesh.shape["fsdp"] * config.step.accumulate
        if rows is not None and rows % multiple:
            raise UserError(
                f"--rows {rows}: must be a multiple of {multiple}: at least one row per device and micro-batch"
            )
        self.workload: Workload = make_workload(config, multiple, rows)
        built = build_step(config, self.mesh, STEPS)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, built.state)
        self._batch = jax.device_put(self.workload.batch(), batch_sharding(self.mesh))
        with use_mesh(self.mesh, config.mesh):
            params, frozen = split(random_parameters(config, built.tree), config.freezing)
            start = jax.jit(lambda p, f: make_state(p, f, built.optimizer), out_shardings=shardings, donate_argnums=0)
            self.state = start(params, frozen)
            self._step = built.train_step.lower(self.state, self._batch).compile()

    @property
    def batch(self) -> dict[str, np.ndarray]:
        """The batch, as arrays of the host."""
        return jax.device_get(self._batch)

    @property
    def params(self) -> dict[str, Any]:
        """All parameters, as arrays of the host."""
        return jax.device_get(merge(self.state.params, self.state.frozen))

    def __call__(self) -> dict[str, float]:
        """Runs one step, which moves the state on, and returns its metrics."""
        with use_mesh(self.mesh, self.config.mesh):
            self.state, metrics = self._step(self.state, self._batch)
        return {name: float(value) for name, value in metrics.items()}

    def figures(self, seconds: float) -> Figures:
        """Rates, memory and utilisation of a step that takes `seconds`."""
        plan, tokens, images = self.workload.plan, self.workload.tokens_per_step, self.workload.images_per_step
        figures: Figures = {
            "devices": f"{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}",
            "rows": plan.rows_per_step,
            "filled": tokens / (plan.rows_per_step * self.workload.packing.length),
            "step_s": seconds,
            "tokens_per_s": tokens / seconds,
            "images_per_s": images / seconds,
            "memory_gb": peak_memory() / 1e9,
        }
        peak = PEAK_FLOPS.get(self.mesh.devices.flat[0].device_kind)
        if peak:
            config = self.config
            sizes = matrix_sizes(merge(self.state.params, self.state.frozen), logits=bool(config.text.weight))
            objective = objective_of(config)
            noise_levels = objective.noise_levels if objective else 0
            flops = step_flops(config.model, sizes, set(self.state.params), noise_levels, tokens, images)
            figures["mfu"] = flops / seconds / (peak * self.mesh.size)
        return figures


def random_parameters(config: RunConfig, tree: Tree) -> Tree:
    """A run's first parameters, except that no parameter of the denoiser is zero: zero gates would hide its blocks."""
    key = jax.random.key(config.seed)
    made = merge(init_components(config.model, tree, tree, key), init_factors(tree, config.lora, key))

    @functools.partial(jax.jit, donate_argnums=0)
    def move(component: Tree) -> Tree:
        leaves, structure = jax.tree.flatten(component)
        draws = (jax.random.normal(jax.random.fold_in(key, i), leaf.shape) for i, leaf in enumerate(leaves))
        moved = [(leaf + 0.02 * draw).astype(leaf.dtype) for leaf, draw in zip(leaves, draws, strict=True)]
        return jax.tree.unflatten(structure, moved)

    return made | {name: move(made[name]) for name in made if name == "denoiser"}


def interleave(
    steps: Mapping[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each repetition. Steps take turns, so that other work on the machine slows all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            start = clock()
            step()
            seconds[name].append(clock() - start)
    return seconds


def measure(config: RunConfig, repeats: int, rows: int | None = None) -> Figures:
    """Figures of the step alone."""
    stepper = Stepper(config, rows)
    stepper()  # warms up
    return stepper.figures(statistics.median(interleave({"jax": stepper}, repeats)["jax"]))


def against_torch(config: RunConfig, repeats: int, rows: int | None = None) -> Figures:
    """Figures of the step beside the same step in PyTorch, on a CPU or a GPU.

    Raises:
      UserError: a recipe that the PyTorch step does not compute; losses that differ.
    """
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("diffusers") is None:
        missing = "not installed; `bash launch/setup.sh parity` does. JAX alone:"
        return {"torch": missing, **measure(config, repeats, rows)}
    from ross_jax.bench.peer import Peer

    stepper = Stepper(config, rows)
    peer = Peer(config, stepper.params, stepper.batch)
    losses = [(stepper(), peer(step)) for step in range(CHECKED)]
    compared = ("text_loss", "reconstruction_loss")
    for step, (own, peers) in enumerate(losses):
        for name in compared:
            if abs(own[name] - peers[name]) > AGREEMENT[config.step.dtype] * abs(peers[name]):
                raise UserError(
                    f"step {step}: {name} is {own[name]:.7g} here, {peers[name]:.7g} in PyTorch; they do not compute "
                    "the same, so their times say nothing"
                )
    seconds = interleave({"jax": stepper, "torch": lambda: peer(CHECKED - 1)}, repeats)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    own, peers = losses[-1]
    return {
        **stepper.figures(medians["jax"]),
        "torch_step_s": medians["torch"],
        "torch_tokens_per_s": stepper.workload.tokens_per_step / medians["torch"],
        "torch_device": str(peer.device),
        "torch_threads": peer.threads,
        "remat": config.step.remat,
        **{name: own[name] for name in compared},
        **{f"torch_{name}": peers[name] for name in compared},
        "fastest_s": min(seconds["jax"]),
        "torch_fastest_s": min(seconds["torch"]),
        "torch_over_jax": medians["torch"] / medians["jax"],
    }


def against_padding(config: RunConfig, repeats: int, rows: int | None = None) -> Figures:
    """Figures of the step on packed rows beside the step on as many padded rows, which hold one conversation each.

    Padded rows have one image slot, as no conversation has more images.
    """
    packing = config.data.packing
    packed = Stepper(_with(config, dataclasses.replace(packing, layout="pack")), rows)
    slots = int(packed.workload.lengths.images.max())
    padding = dataclasses.replace(packing, layout="pad", images=slots)
    padded = Stepper(_with(config, padding), packed.workload.plan.rows_per_step)
    for stepper in (packed, padded):
        stepper()  # warms up
    seconds = interleave({"packed": packed, "padded": padded}, repeats)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rates = packed.figures(medians["packed"]), padded.figures(medians["padded"])
    return {
        **rates[0],
        **{f"padded_{name}": rates[1][name] for name in ("filled", "step_s", "tokens_per_s", "images_per_s")},
        "packed_over_padded": rates[0]["tokens_per_s"] / rates[1]["tokens_per_s"],
    }


def _with(config: RunConfig, packing: PackingConfig) -> RunConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, packing=packing))
