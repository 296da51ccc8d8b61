"""A report as text for a terminal."""

import collections
import math

from ross_jax.plan.report import ARRAYS, Report
from ross_jax.plan.targets import GIB
from ross_jax.sharding import LARGE


def _count(number: float | int) -> str:
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.2f} {unit}"
    return f"{number:.0f} "


def _time(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 0.1 else f"{seconds * 1e3:.2f} ms"


def summary(report: Report) -> str:
    """Whether the program fits, and the memory that it needs, in one line."""
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
    lines += _replicated_lines(report) or ["  none"]
    lines += ["", "assumed", *(f"  {line}" for line in report.assumptions)]
    lines += ["", "method", f"  {report.method}", *(f"  not counted: {note}" for note in report.notes)]
    if report.compile_seconds:
        memory = report.host_memory / 1e9
        lines.append(
            f"  compiled in {report.compile_seconds:.0f} s, with at most {memory:.1f} GB of this machine's memory"
        )
    return "\n".join(lines)


def _replicated_lines(report: Report) -> list[str]:
    """A line for each large array, and a line for each component and reason for all others."""
    lines, rest = [], collections.defaultdict(list)
    for line in report.replicated:
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
