"""Searches the fastest mesh, remat policy and batch size on a topology: plans of each, ranked."""

import dataclasses
import typing
from collections.abc import Callable, Iterable, Iterator

import jax

from ross_jax.config import ConfigError, UserError
from ross_jax.models.layers import RematPolicy
from ross_jax.plan.planner import plan
from ross_jax.plan.report import Report
from ross_jax.plan.targets import Target
from ross_jax.plan.text import summary
from ross_jax.plan.workload import Options
from ross_jax.sharding import MeshConfig
from ross_jax.training.recipe import RunConfig

MOST_TENSOR = 8
"""Most devices along `tensor`. With more, the transfers between them dominate."""


def meshes(devices: int) -> list[MeshConfig]:
    """The meshes to compare: all devices along `fsdp`; 2, 4 and 8 along `tensor`; replicas of 8, 16, 32 and 64."""
    sizes = [size for size in (1, 2, 4, MOST_TENSOR) if devices % size == 0]
    found = [MeshConfig(1, devices // size, size) for size in sizes]
    replicas = [size for size in (8, 16, 32, 64) if devices % size == 0 and size < devices]
    found += [MeshConfig(devices // size, size, 1) for size in replicas]
    return found


def search(config: RunConfig, target: Target, options: Options, tell: Callable[[str], None]) -> list[Report]:
    """Plans, best first: plans that fit by conversations (or answers) per second, then plans that do not fit.

    First meshes are compared, then remat policies on the fastest mesh, then batch sizes with the fastest policy. Not
    every combination is tried, as compiling a 7B model takes minutes.

    Args:
      tell: is called with a heading and a line for each plan.

    Raises:
      ConfigError: no mesh takes these rows.
    """
    done: dict[tuple, Report] = {}

    def consider(mesh: MeshConfig, remat: RematPolicy, rows: int | None) -> None:
        changed = dataclasses.replace(
            config,
            mesh=dataclasses.replace(mesh, rules=config.mesh.rules),
            step=dataclasses.replace(config.step, remat=remat),
        )
        try:
            report = plan(changed, target, dataclasses.replace(options, rows=rows))
        except UserError as error:  # the rows do not divide among this mesh's devices
            tell(f"{_mesh(mesh)}: {error}")
            return
        jax.clear_caches()  # a program of a 7B model takes gigabytes
        done[(mesh, report.remat, report.rows)] = report
        tell(row(report))

    remat = config.step.remat
    tell(HEADER)
    for mesh in meshes(len(target.devices)):
        consider(mesh, remat, options.rows)
    if not done:
        raise ConfigError(f"--search: no mesh of {len(target.devices)} devices takes these rows")
    best = rank(done.values())[0]
    if options.objective == "train":
        mesh = MeshConfig(**best.mesh)
        for policy in typing.get_args(RematPolicy):
            if policy != remat:
                consider(mesh, policy, best.rows)
        best = rank(done.values())[0]
        for rows in _batches(best):
            consider(MeshConfig(**best.mesh), typing.cast(RematPolicy, best.remat), rows)
    return rank(done.values())


def _batches(report: Report) -> Iterator[int]:
    multiple = report.mesh["data"] * report.mesh["fsdp"]
    yield 2 * report.rows
    if report.rows % (2 * multiple) == 0:
        yield report.rows // 2


def largest_batch(at: Callable[[int], Report]) -> tuple[int, Report]:
    """The most rows per device that fit, and the plan with them. If no row fits: 0, and the plan with one row.

    Memory is nearly linear in the rows, so the first two plans tell where to look.

    Args:
      at: makes the plan with the given rows per device.
    """
    plans = [at(1)]
    if not plans[0].fits:
        return 0, plans[0]
    rows, plans = 1, [*plans, at(2)]
    if plans[1].fits:
        one, two = (typing.cast(int, each.needed) for each in plans)
        rows = max(2, 1 + (plans[0].capacity - one) // max(1, two - one))
    while not at(rows).fits:
        rows -= 1
    while at(rows + 1).fits:
        rows += 1
    return rows, at(rows)


def speed(report: Report) -> float:
    """Conversations, or answers, per second: plans are ranked by it."""
    return report.rates.get("conversations", report.rates.get("answers", 0.0))


def rank(reports: Iterable[Report]) -> list[Report]:
    """Sorts plans: all that fit before all that do not, and the faster before the slower."""
    return sorted(reports, key=lambda report: (report.fits, speed(report)), reverse=True)


def _mesh(mesh: MeshConfig) -> str:
    return f"data={mesh.data} fsdp={mesh.fsdp} tensor={mesh.tensor}"


HEADER = f"{'mesh':28} {'remat':6} {'rows':>5} {'step':>9} {'overlapped':>11} {'per s':>8}  memory"


def row(report: Report) -> str:
    """The line of a plan in the table."""
    mesh = _mesh(MeshConfig(**report.mesh))
    step, overlapped = report.seconds.get("step", 0.0), report.seconds.get("overlapped", 0.0)
    return (
        f"{mesh:28} {report.remat:6} {report.rows:5d} {step:7.3f} s {overlapped:9.3f} s {speed(report):8.2f}  "
        f"{summary(report)}"
    )


def table(reports: list[Report]) -> str:
    """All plans in their order, and what making them took."""
    what = "conversations" if reports[0].objective == "train" else "answers"
    lines = [f"{reports[0].recipe} on {reports[0].topology}, by {what} per second", HEADER, *map(row, reports)]
    seconds, memory = sum(each.compile_seconds for each in reports), max(each.host_memory for each in reports) / 1e9
    took = f"compiled in {seconds:.0f} s, with at most {memory:.1f} GB of this machine's memory"
    return "\n".join([*lines, "", reports[0].method, took])
