"""A report as a picture."""

from pathlib import Path

from ross_jax.config import UserError
from ross_jax.plan.report import Report
from ross_jax.plan.targets import GIB
from ross_jax.plan.text import summary
from ross_jax.storage import location

_MEMORY = ("arguments", "outputs", "temporaries", "code")


def draw(report: Report, path: str | Path) -> None:
    """Writes a PNG with two charts: memory by kind beside what a device has, and the time of each part.

    Raises:
      UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--png: matplotlib is not installed; bash launch/setup.sh") from error
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.6))
    mesh = " ".join(f"{axis}={size}" for axis, size in report.mesh.items())
    figure.suptitle(f"{report.recipe}\n{report.topology}, {mesh}, {report.rows} rows: {summary(report)}", fontsize=10)
    bottom = 0.0
    for kind in _MEMORY:
        size = report.memory.get(kind, 0)
        if kind == "outputs":
            size -= report.memory.get("aliased", 0)
        left.bar(["needed"], [size / GIB], 0.5, bottom=bottom, label=f"{kind} {size / GIB:.2f}")
        bottom += size / GIB
    capacity = report.capacity / GIB
    left.axhline(capacity, color="black", linestyle="--", linewidth=1, label=f"usable {capacity:.2f}")
    left.set(ylabel="GiB per device", ylim=(0, 1.15 * max(capacity, bottom)), xlim=(-0.5, 1.6))
    left.legend(loc="center right", fontsize=8)
    names = list(report.parts)[::-1]
    shared = [report.parts[name]["collectives"] for name in names]
    own = [report.parts[name]["seconds"] - report.parts[name]["collectives"] for name in names]
    right.barh(names, own, label="compute and kernels")
    right.barh(names, shared, left=own, label="collectives")
    right.set(xlabel="seconds (estimated, nothing overlapped)")
    for place, name in enumerate(names):
        part = report.parts[name]
        right.text(part["seconds"], place, f" {part['share']:.1%}", va="center", fontsize=8)
    right.margins(x=0.12)
    right.legend(loc="lower right", fontsize=8)
    right.grid(axis="x", alpha=0.3)
    with location(path).open("wb") as file:
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
