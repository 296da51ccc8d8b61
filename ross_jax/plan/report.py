"""A plan's result: one record from which text, JSON and figure are made."""

import collections
import dataclasses
import importlib.metadata
import math
from typing import Any

from jax.sharding import Mesh

from ross_jax.plan.cost import COLLECTIVES, OTHER, PARTS, Cost
from ross_jax.plan.hlo import Module
from ross_jax.plan.program import Compiled, Job
from ross_jax.plan.targets import GPU_SHARE, GPU_UTILISATION, KERNEL_UTILISATION, Target, axes_of
from ross_jax.sharding import use_mesh, why_replicated
from ross_jax.training.cached import objective_of, spared_components
from ross_jax.training.metrics import matrix_sizes, step_flops
from ross_jax.tree import flatten

ARRAYS = 12
"""Number of lines in each list of largest arrays."""
_NOT_MADE = ("parameter", "tuple", "get-tuple-element", "while", "bitcast", "conditional", "constant", "opt-barrier")
"""Opcodes of instructions that make no new arrays."""


@dataclasses.dataclass(frozen=True)
class Report:
    """A plan. Bytes and FLOPs are per device unless said otherwise; times are of one step or one generation.

    Attributes:
      cached: parts that are read from a cache instead of computed.
      parameters: component -> {"trainable": count, "frozen": count}, of the whole model.
      capacity: bytes that a program can use.
      needed: bytes that the program needs; None if it did not compile.
      replicated: parameters that every device holds in full, and why.
      largest: the largest arguments, by path, and the largest arrays that the program makes, by operation.
      memory: kind -> bytes.
      flops: floating-point operations, recomputation included.
      useful_flops: floating-point operations of all devices that the step needs, recomputation not included.
      seconds: `compute`, `kernels` and `collectives`; `step` is their sum; `overlapped` is the step if collectives run
        beside compute as XLA scheduled them.
      parts: part of the step -> seconds, seconds in collectives, FLOPs and share of the step.
      mfu: useful FLOPs per second, as a share of the devices' peak.
      rates: images, tokens etc. per second, of all devices together.
      compile_seconds, host_memory: seconds and bytes that the planner took.
    """

    recipe: str
    objective: str
    topology: str
    devices: int
    mesh: dict[str, int]
    remat: str
    rows: int
    cached: list[str]
    assumptions: list[str]
    parameters: dict[str, dict[str, int]]
    capacity: int
    needed: int | None
    fits: bool
    replicated: list[dict[str, Any]]
    largest: list[dict[str, Any]]
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    flops: float = 0.0
    useful_flops: float | None = None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    parts: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    collectives: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    mfu: float | None = None
    rates: dict[str, float] = dataclasses.field(default_factory=dict)
    hours_per_epoch: float | None = None
    steps_per_epoch: int | None = None
    method: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)
    compile_seconds: float = 0.0
    host_memory: int = 0


def describe(job: Job, needed: int | None = None) -> Report:
    """A report of everything that is known without compiling.

    Args:
      needed: bytes that the compiler asked for, if the program did not fit.
    """
    config, mesh = job.config, job.mesh
    counts: dict[str, dict[str, int]] = collections.defaultdict(lambda: {"trainable": 0, "frozen": 0})
    replicated = []
    used = {name.split("/")[1] for name in job.program.arguments if name.startswith(("parameters/", "frozen/"))}
    leaves, freezing = flatten(config.abstract_tree(mesh)), config.freezing
    with use_mesh(mesh, config.mesh):
        reasons = {path: why_replicated(path, leaf.shape, mesh) for path, leaf in leaves.items()}
    for path, leaf in leaves.items():
        component = path.partition("/")[0]
        if component not in used:
            continue
        size = math.prod(leaf.shape)
        counts[component]["trainable" if job.trains and freezing.trains(path) else "frozen"] += size
        if reasons[path] and mesh.size > 1:
            line = {"path": path, "shape": list(leaf.shape), "bytes": size * leaf.dtype.itemsize}
            replicated.append(line | {"why": reasons[path]})
    arrays = [
        {
            "name": name,
            "array": f"{leaf.dtype}{list(leaf.shape)}",
            "bytes": math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
            "split": str(leaf.sharding.spec),
        }
        for name, leaf in job.program.arguments.items()
    ]
    return Report(
        recipe=job.options.recipe,
        objective=job.options.objective,
        topology=job.target.name,
        devices=mesh.size,
        mesh=dict(mesh.shape),
        remat=config.step.remat,
        rows=job.workload.rows,
        cached=list(job.options.cached) if job.trains else [],
        assumptions=job.workload.assumptions,
        parameters=dict(counts),
        capacity=job.target.chip.memory,
        needed=needed,
        fits=False,
        replicated=sorted(replicated, key=lambda each: -each["bytes"]),
        largest=sorted(arrays, key=lambda each: -each["bytes"])[:ARRAYS],
        method=method(job.target),
    )


def complete(job: Job, compiled: Compiled, module: Module, cost: Cost) -> Report:
    """A report of a program that compiled."""
    compute, kernels = cost.seconds("compute"), cost.seconds("kernel")
    collectives = cost.seconds(*COLLECTIVES)
    step = compute + kernels + collectives
    report = describe(job, compiled.needed)
    report = dataclasses.replace(
        report,
        fits=compiled.needed <= report.capacity,
        largest=report.largest + _made(cost, module),
        memory=compiled.memory,
        flops=float(sum(event.count * event.flops for event in cost.events)),
        seconds={
            "compute": compute,
            "kernels": kernels,
            "collectives": collectives,
            "step": step,
            "overlapped": cost.scheduled,
        },
        parts=_parts(cost, step),
        collectives=_collectives(cost, job.mesh),
        notes=cost.notes,
        compile_seconds=compiled.seconds,
        host_memory=compiled.host_memory,
    )
    if not step:
        return report
    return _with_training_rates(job, report) if job.trains else _with_generation_rates(job, report)


def _parts(cost: Cost, step: float) -> dict[str, dict[str, float]]:
    parts: dict[str, dict[str, float]] = {}
    for event in cost.events:
        part = parts.setdefault(event.part, {"seconds": 0.0, "collectives": 0.0, "flops": 0.0})
        part["seconds"] += event.total
        part["collectives"] += event.total if event.kind in COLLECTIVES else 0.0
        part["flops"] += event.count * event.flops
    for part in parts.values():
        part["share"] = part["seconds"] / step if step else 0.0
    order = [*(name for name, _ in PARTS), OTHER]
    return {name: parts[name] for name in order if name in parts}


def _with_training_rates(job: Job, report: Report) -> Report:
    config, workload, step = job.config, job.workload, report.seconds["step"]
    objective = objective_of(config)
    noise_levels = objective.noise_levels if objective else 0
    trained = {name for name, counts in report.parameters.items() if counts["trainable"]}
    spared = spared_components(config, report.cached)
    sizes = matrix_sizes(config.abstract_tree(job.mesh), logits=bool(config.text.weight))
    sizes = {path: size for path, size in sizes.items() if path.partition("/")[0] not in spared}
    useful = step_flops(config.model, sizes, trained, noise_levels, workload.tokens, workload.images)
    steps = math.ceil(workload.epoch / workload.conversations) if workload.epoch else None
    return dataclasses.replace(
        report,
        useful_flops=useful,
        mfu=useful / step / (job.target.chip.peak * job.mesh.size),
        rates={
            "tokens": workload.tokens / step,
            "images": workload.images / step,
            "conversations": workload.conversations / step,
        },
        steps_per_epoch=steps,
        hours_per_epoch=steps * step / 3600 if steps else None,
    )


def _with_generation_rates(job: Job, report: Report) -> Report:
    rows, new_tokens, total = job.workload.rows, job.options.new_tokens, report.seconds["step"]
    decode = report.parts["decode"]["seconds"] if "decode" in report.parts else 0.0
    return dataclasses.replace(
        report,
        seconds=report.seconds | {"prefill": total - decode, "decode": decode, "token": decode / new_tokens},
        rates={"new tokens": rows * new_tokens / decode if decode else 0.0, "answers": rows / total},
    )


def _made(cost: Cost, module: Module) -> list[dict[str, Any]]:
    """The largest arrays that the program makes in device memory, one line for each size and part."""
    parts = {event.instruction.name: event.part for event in cost.events}
    found: dict[tuple, dict[str, Any]] = {}
    for computation in module.computations.values():
        for each in computation:
            if each.name not in parts or each.opcode in _NOT_MADE or each.in_vmem:
                continue
            for shape in each.shapes:
                key = (parts[each.name], shape)
                line = {"name": f"{parts[each.name]}: {each.op_name.rpartition('/')[2]}", "array": str(shape)}
                found.setdefault(key, line | {"bytes": shape.bytes, "split": "made by the program"})
    return sorted(found.values(), key=lambda line: -line["bytes"])[:ARRAYS]


def _collectives(cost: Cost, mesh: Mesh) -> list[dict[str, Any]]:
    """A program's collectives, one line for each kind, mesh axes and part."""
    lines: dict[tuple, dict[str, Any]] = {}
    for event in cost.events:
        if event.kind in COLLECTIVES:
            key = (event.kind, axes_of(event.group, mesh), event.part)
            fresh = {"kind": key[0], "axes": key[1], "part": key[2], "count": 0, "bytes": 0, "seconds": 0.0}
            line = lines.setdefault(key, fresh)
            line["count"] += event.count
            line["bytes"] += event.count * event.bytes
            line["seconds"] += event.total
    return sorted(lines.values(), key=lambda line: -line["seconds"])


def method(target: Target) -> str:
    """Describes how times were estimated, and how large the error may be."""
    compiler = "libtpu" if target.is_tpu else "jax-cuda12-plugin"
    compiler = f"{compiler} {importlib.metadata.version(compiler)}"
    if not target.is_tpu:
        return (
            f"An estimate ({compiler}). XLA for GPU states no cycles: compute is matrix products and convolutions at "
            f"an assumed {GPU_UTILISATION:.0%} of the bfloat16 peak, nothing else counted; collectives are their "
            "bytes over NVLink or the network at full rate. Use it to compare meshes. Memory is the compiler's own, "
            f"against what JAX has with XLA_PYTHON_CLIENT_MEM_FRACTION={GPU_SHARE:g} (its default is 0.75)."
        )
    error = "The method was reported to predict four published TPU runs within +4% to +28%"
    if not target.chip.validated:
        error += ", none of them on this chip"
    return (
        f"An estimate ({compiler}): the compiler's cycles per operation times trip counts over the clock "
        f"({target.chip.clock / 1e9:g} GHz), kernels by their FLOPs at {KERNEL_UTILISATION:.0%} of the peak, "
        f"collectives by their bytes over the links ({target.chip.link / 1e9:g} GB/s per axis, half where it is not "
        f"closed; between slices {target.chip.network / 1e9:g} GB/s per device), added up as if nothing overlapped. "
        f"{error}."
    )
