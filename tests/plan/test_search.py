"""Search for the largest batch that fits."""

import pytest

from ross_jax.plan.report import Report
from ross_jax.plan.search import largest_batch


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
