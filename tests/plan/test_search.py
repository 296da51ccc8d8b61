"""Searches for the fastest plan and for the largest batch that fits, with made-up plans."""

import pytest

from plan.test_planner import recipe
from ross_jax.plan import search
from ross_jax.plan.report import Report
from ross_jax.plan.search import largest_batch
from ross_jax.plan.targets import open_target
from ross_jax.plan.workload import Options


def test_the_fastest_of_meshes_policies_and_batches(monkeypatch):
    """Policies are tried on the fastest mesh, batches with the fastest policy; plans that do not fit come last."""

    def plan(config, target, options):
        mesh = {"data": config.mesh.data, "fsdp": config.mesh.fsdp, "tensor": config.mesh.tensor}
        rows, remat = options.rows or 8, config.step.remat
        rate = rows * (2 if mesh["tensor"] == 2 else 1) * (2 if remat == "gate" else 1)
        fits = rows <= 16 and remat != "none"
        made = ("ross", "train", "v5e:2x2", 4, mesh, remat, rows, [], [], {}, 100, None, fits, [], [])
        return Report(*made, rates={"conversations": float(rate)}, seconds={"step": 1.0, "overlapped": 1.0})

    pytest.importorskip("libtpu", reason="needs libtpu: bash launch/setup.sh tpu")
    target = open_target("v5e:2x2")
    monkeypatch.setattr(search, "plan", plan)
    lines = []
    found = search.search(recipe(), target, Options("tiny"), lines.append)
    assert len(found) == len(lines) - 1 == 3 + 6 + 2
    best = found[0]
    assert (best.mesh["tensor"], best.remat, best.rows) == (2, "gate", 16)
    assert [report.remat for report in found if not report.fits] == ["none"]
    assert found[-1].remat == "none"
    assert search.table(found).splitlines()[2:13] == [search.row(report) for report in found]


@pytest.mark.parametrize("bend", [0.0, 0.1, -0.1])
@pytest.mark.parametrize("fixed", [10.0, 60.0, 99.0, 120.0])
@pytest.mark.parametrize("each", [0.9, 7.0, 30.0])
def test_largest_batch(each, fixed, bend):
    """The result equals that of trying all batches, with fewer plans, also if memory is not linear in the rows."""
    asked = set()

    def needed(rows: int) -> int:
        return int(1000 * (fixed + each * rows ** (1 + bend)))

    def at(rows: int):
        asked.add(rows)
        fits = needed(rows) <= 100_000
        memory = needed(rows) if fits or rows % 2 else None  # the compiler reports no memory for some batches
        return Report("ross", "train", "v5e:2x4", 8, {}, "full", rows, [], [], {}, 100_000, memory, fits, [], [])

    rows, report = largest_batch(at)
    most = 0
    while needed(most + 1) <= 100_000:
        most += 1
    assert rows == most and report.rows == max(1, most)
    assert len(asked) <= (5 if bend == 0 else 60)
