"""What the planner tells: one record, which text, JSON and picture share."""

import collections
import dataclasses
import importlib.metadata
import math
from typing import Any

from jax.sharding import Mesh

from ross_jax.plan.cost import COLLECTIVES, PARTS, Cost
from ross_jax.plan.hlo import Module
from ross_jax.plan.program import Compiled, Program
from ross_jax.plan.targets import GIB, GPU_SHARE, GPU_UTILISATION, KERNEL_UTILISATION, Target, axes_of
from ross_jax.plan.workload import Workload
from ross_jax.sharding import LARGE, why_replicated
from ross_jax.training.cached import spared_components
from ross_jax.training.metrics import matrix_sizes, step_flops
from ross_jax.training.recipe import RunConfig
from ross_jax.training.state import abstract_tree
from ross_jax.tree import flatten

ARRAYS = 12
"""Lines of the lists of largest arrays."""
_MADE = ("parameter", "tuple", "get-tuple-element", "while", "bitcast", "conditional", "constant", "opt-barrier")


@dataclasses.dataclass(frozen=True)
class Report:
    """A plan. Bytes and FLOPs are per device unless said otherwise; times are of one step (or of one generation).

    Attributes:
      parameters: component -> {"trainable", "frozen"}.
      cached: parts that are read instead of computed.
      memory: kind -> bytes; `needed` of them together, `capacity` what a program can use; None: it did not compile.
      largest: arrays that come in, by path, and that the program makes, by operation.
      whole: parameters that every device holds in full, and why.
      seconds: `compute`, `kernels`, `collectives`; `step`, their sum; `overlapped`, with collectives beside compute as
        XLA scheduled them.
      parts: share of `step` of each part.
      rates: per second, of all devices together.
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
    whole: list[dict[str, Any]]
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


def describe(
    recipe: str,
    objective: str,
    config: RunConfig,
    target: Target,
    mesh: Mesh,
    workload: Workload,
    program: Program,
    cached: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The fields of a report that are known without compiling."""
    counts: dict[str, dict[str, int]] = collections.defaultdict(lambda: {"trainable": 0, "frozen": 0})
    whole = []
    used = {name.split("/")[1] for name in program.arguments if name.startswith(("parameters/", "frozen/"))}
    for path, leaf in flatten(abstract_tree(config.model, config.freeze, mesh)).items():
        if path.partition("/")[0] not in used:
            continue
        kind = "trainable" if objective == "train" and config.freeze.trains(path) else "frozen"
        size = math.prod(leaf.shape)
        counts[path.partition("/")[0]][kind] += size
        why = why_replicated(path, leaf.shape, mesh) if mesh.size > 1 else None
        if why:
            whole.append({"path": path, "shape": list(leaf.shape), "bytes": size * leaf.dtype.itemsize, "why": why})
    arrays = [
        {
            "name": name,
            "array": f"{leaf.dtype}{list(leaf.shape)}",
            "bytes": _held(leaf),
            "split": str(leaf.sharding.spec),
        }
        for name, leaf in program.arguments.items()
    ]
    return {
        "recipe": recipe,
        "objective": objective,
        "topology": target.name,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "remat": config.step.remat,
        "rows": workload.rows,
        "cached": list(cached),
        "assumptions": workload.assumptions,
        "parameters": dict(counts),
        "capacity": target.chip.memory,
        "whole": sorted(whole, key=lambda each: -each["bytes"]),
        "largest": sorted(arrays, key=lambda each: -each["bytes"])[:ARRAYS],
        "needed": None,
        "fits": False,
    }


def _held(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def complete(
    known: dict[str, Any],
    config: RunConfig,
    target: Target,
    mesh: Mesh,
    workload: Workload,
    compiled: Compiled,
    module: Module,
    cost: Cost,
    new_tokens: int = 0,
) -> Report:
    """A report of a program that compiled.

    Args:
      known: of `describe`.
      new_tokens: that are generated; 0 for a training step.
    """
    compute, kernels = cost.seconds("compute"), cost.seconds("kernel")
    collectives = cost.seconds(*COLLECTIVES)
    step = compute + kernels + collectives
    parts: dict[str, dict[str, float]] = {}
    for event in cost.events:
        part = parts.setdefault(event.part, {"seconds": 0.0, "collectives": 0.0, "flops": 0.0})
        part["seconds"] += event.total
        part["collectives"] += event.total if event.kind in COLLECTIVES else 0.0
        part["flops"] += event.count * event.flops
    for part in parts.values():
        part["share"] = part["seconds"] / step if step else 0.0
    order = [name for name, _ in PARTS] + ["other"]
    report = Report(
        **known
        | {
            "needed": compiled.needed,
            "fits": compiled.needed <= target.chip.memory,
            "largest": known["largest"] + _made(cost, module),
        },
        memory=compiled.memory,
        flops=float(sum(event.count * event.flops for event in cost.events)),
        seconds={
            "compute": compute,
            "kernels": kernels,
            "collectives": collectives,
            "step": step,
            "overlapped": cost.scheduled,
        },
        parts={name: parts[name] for name in order if name in parts},
        collectives=_collectives(cost, mesh),
        method=method(target),
        notes=cost.notes,
        compile_seconds=compiled.seconds,
        host_memory=compiled.host_memory,
    )
    if not step:
        return report
    if new_tokens:
        decode = parts.get("decode", {"seconds": 0.0})["seconds"]
        return dataclasses.replace(
            report,
            seconds=report.seconds | {"prefill": step - decode, "decode": decode, "token": decode / new_tokens},
            rates={
                "new tokens": workload.rows * new_tokens / decode if decode else 0.0,
                "answers": workload.rows / step,
            },
        )
    draws = config.reconstruction.draws if config.reconstruction.kind == "denoise" else 0
    trained = {name for name, counts in report.parameters.items() if counts["trainable"]}
    spared = spared_components(config, report.cached)
    sizes = matrix_sizes(abstract_tree(config.model, config.freeze, mesh), logits=bool(config.text.weight))
    sizes = {path: size for path, size in sizes.items() if path.partition("/")[0] not in spared}
    useful = step_flops(config.model, sizes, trained, draws, workload.tokens, workload.images)
    steps = math.ceil(workload.epoch / workload.conversations) if workload.epoch else None
    return dataclasses.replace(
        report,
        useful_flops=useful,
        mfu=useful / step / (target.chip.peak * mesh.size),
        rates={
            "tokens": workload.tokens / step,
            "images": workload.images / step,
            "conversations": workload.conversations / step,
        },
        steps_per_epoch=steps,
        hours_per_epoch=steps * step / 3600 if steps else None,
    )


def _made(cost: Cost, module: Module) -> list[dict[str, Any]]:
    """The largest arrays that the program makes, in device memory, one line for each size and part."""
    parts = {event.instruction.name: event.part for event in cost.events}
    found: dict[tuple, dict[str, Any]] = {}
    for computation in module.computations.values():
        for each in computation:
            if each.name not in parts or each.opcode in _MADE or each.in_vmem:
                continue
            for shape in each.shapes:
                key = (parts[each.name], shape)
                line = {"name": f"{parts[each.name]}: {each.op_name.rpartition('/')[2]}", "array": str(shape)}
                found.setdefault(key, line | {"bytes": shape.bytes, "split": "made by the program"})
    return sorted(found.values(), key=lambda line: -line["bytes"])[:ARRAYS]


def _collectives(cost: Cost, mesh: Mesh) -> list[dict[str, Any]]:
    """One line for each kind, mesh axes and part."""
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
    """How times were estimated, and how wrong that may be."""
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


# Text.


def _count(number: float | int) -> str:
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.2f} {unit}"
    return f"{number:.0f} "


def _time(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 0.1 else f"{seconds * 1e3:.2f} ms"


def summary(report: Report) -> str:
    """One line: does it fit, and how fast is it."""
    if report.needed is None:
        return f"does not fit: more than the {report.capacity / GIB:.2f} GiB of a device"
    share = report.needed / report.capacity
    sizes = f"{report.needed / GIB:.2f} of {report.capacity / GIB:.2f} GiB per device, {share:.0%}"
    return f"fits, {sizes}" if report.fits else f"does not fit: needs {sizes}"


def text(report: Report) -> str:
    """The report for a terminal."""
    mesh = " ".join(f"{axis}={size}" for axis, size in report.mesh.items())
    cached = f", {' and '.join(report.cached)} from a cache" if report.cached else ""
    lines = [
        f"{report.recipe} on {report.topology}: {report.devices} devices",
        f"  {mesh}, remat {report.remat}, {report.rows} rows{cached}",
        f"  {summary(report)}",
        "",
        "parameters            trainable      frozen",
    ]
    for name, counts in report.parameters.items():
        lines.append(f"  {name:16} {_count(counts['trainable']):>12} {_count(counts['frozen']):>12}".rstrip())
    totals = [sum(counts[kind] for counts in report.parameters.values()) for kind in ("trainable", "frozen")]
    lines.append(f"  {'all':16} {_count(totals[0]):>12} {_count(totals[1]):>12}")
    if report.memory:
        lines += ["", f"memory per device, GiB ({report.capacity / GIB:.2f} usable)"]
        lines += [f"  {kind:16} {size / GIB:12.3f}" for kind, size in report.memory.items()]
        lines.append(f"  {'needed':16} {report.needed / GIB:12.3f}   (outputs less aliased)")
    if report.seconds:
        lines += _time_lines(report)
    lines += ["", "largest arrays per device, MiB"]
    lines += [
        f"  {line['bytes'] / 2**20:9.1f}  {line['array']}  {line['name']}  {line['split']}" for line in report.largest
    ]
    lines += ["", "parameters that every device holds in full, MiB"]
    lines += _whole_lines(report) or ["  none"]
    lines += ["", "assumed", *(f"  {line}" for line in report.assumptions)]
    if report.method:
        lines += ["", "method", f"  {report.method}", *(f"  not counted: {note}" for note in report.notes)]
        memory = report.host_memory / 1e9
        lines.append(
            f"  compiled in {report.compile_seconds:.0f} s, with at most {memory:.1f} GB of this machine's memory"
        )
    return "\n".join(lines)


def _whole_lines(report: Report) -> list[str]:
    """Large arrays each, the others by component and reason."""
    lines, rest = [], collections.defaultdict(list)
    for line in report.whole:
        if math.prod(line["shape"]) >= LARGE:
            lines.append(f"  {line['bytes'] / 2**20:9.1f}  {line['path']} {line['shape']}: {line['why']}")
        else:
            rest[line["path"].partition("/")[0], line["why"]].append(line["bytes"])
    for (component, why), sizes in rest.items():
        lines.append(
            f"  {sum(sizes) / 2**20:9.1f}  {component}: {len(sizes)} arrays of at most {max(sizes) / 2**20:.1f}: {why}"
        )
    return lines


def _time_lines(report: Report) -> list[str]:
    seconds, training = report.seconds, report.objective == "train"
    what = "step" if training else "generation"
    lines = ["", f"one {what}, estimated"]
    lines += [f"  {kind:16} {_time(seconds[kind]):>12}" for kind in ("compute", "kernels", "collectives")]
    overlapped = f"{_time(seconds['overlapped'])} if collectives overlap as scheduled"
    lines.append(f"  {what:16} {_time(seconds['step']):>12}   {overlapped}")
    if not training:
        lines += [f"  {kind:16} {_time(seconds[kind]):>12}" for kind in ("prefill", "decode", "token")]
    lines.append(f"  {'FLOPs':16} {_count(report.flops):>12}   per device, loops and recomputation counted")
    if report.mfu is not None:
        lines.append(f"  {'MFU':16} {report.mfu:12.1%}   of {_count(report.useful_flops)}FLOPs that the step needs")
    lines += [f"  {name + '/s':16} {_count(rate):>12}" for name, rate in report.rates.items()]
    if report.hours_per_epoch is not None:
        lines.append(f"  {'hours per epoch':16} {report.hours_per_epoch:12.2f}   {report.steps_per_epoch} steps")
    lines += ["", "part                    time  share  in collectives       FLOPs"]
    for name, part in report.parts.items():
        lines.append(
            f"  {name:16} {_time(part['seconds']):>9} {part['share']:6.1%} {_time(part['collectives']):>15} "
            f"{_count(part['flops']):>11}"
        )
    lines += ["", "collectives         mesh axes        part               runs       GB       time"]
    lines += [
        f"  {line['kind']:17} {line['axes']:16} {line['part']:16} {line['count']:6d} {line['bytes'] / 1e9:8.2f} "
        f"{_time(line['seconds']):>10}"
        for line in report.collectives[:ARRAYS]
    ]
    return lines
