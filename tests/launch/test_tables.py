"""Tables of plans: which rows are computed, and that the rest of the file stays."""

import dataclasses

import pytest

from launcher import load_script
from ross_jax.config import UserError
from ross_jax.plan.report import Report
from ross_jax.plan.results import Origin

tables = load_script("tables")

FILE = """# Results

Written by hand.

<!-- costs -->
`python launch/tables.py --tables=costs`; rows by commit:
`aaaaaaa` (jax 0.1), `bbbbbbb` (jax 0.2)

| topology | recipe | mesh | step, s | commit |
| --- | --- | --- | --- | --- |
| v5e:8x8 | LLaVA | fsdp=64 | 9.000 | aaaaaaa |
| v5e:8x8 | Ross, live | fsdp=64 | 9.500 | bbbbbbb |
| v6e:8x8 | LLaVA | fsdp=64 | 8.000 | aaaaaaa |
| v0:1x1 | a recipe that has gone | - | 1.000 | aaaaaaa |
<!-- /costs -->

<!-- kinds -->
<!-- /kinds -->
"""


@pytest.fixture
def cases(monkeypatch):
    """Stand-in for planning: the list of planned cases. A step takes 2 s for LLaVA and 3 s for other recipes."""
    found = []

    def planned(case):
        found.append(case)
        step = 2.0 if case.recipe.startswith("llava") or case.recipe.endswith("kind=none") else 3.0
        parameters = {"language": {"trainable": 7, "frozen": 0}, "denoiser": {"trainable": 64_000_000, "frozen": 0}}
        report = Report(
            recipe=case.recipe,
            objective="train",
            topology=case.topology,
            devices=64,
            mesh={"data": 2, "fsdp": 32, "tensor": 1},
            remat="gate",
            rows=128,
            cached=[],
            assumptions=[],
            parameters=parameters,
            capacity=16 * 2**30,
            needed=8 * 2**30,
            fits=True,
            replicated=[],
            largest=[],
            mfu=0.5,
        )
        return dataclasses.replace(report, seconds={"step": step, "overlapped": step - 0.5})

    monkeypatch.setattr(tables, "planned", planned)
    monkeypatch.setattr(tables, "origin", lambda _: Origin("ccccccc", "jax 0.3"))
    return found


def test_one_row(cases, tmp_path):
    path = tmp_path / "results.md"
    path.write_text(FILE)
    tables.make("costs", "v5e:8x8 Ross, live", path)
    assert {(case.recipe.partition(":")[0], case.topology) for case in cases} == {
        ("ross", "v5e:8x8"),
        ("llava", "v5e:8x8"),
    }
    lines = path.read_text().splitlines()
    assert "`bbbbbbb`" not in path.read_text() and "a recipe that has gone" not in path.read_text()
    assert "`aaaaaaa` (jax 0.1), `ccccccc` (jax 0.3)" in lines
    assert "| v5e:8x8 | LLaVA | fsdp=64 | 9.000 | aaaaaaa |" in lines
    made = next(line for line in lines if "Ross, live" in line)
    assert made.startswith("| v5e:8x8 | Ross, live | data=2 fsdp=32 | gate | 3.000 | 1.500 | 1.67; overlapped 1.39 |")
    assert made.endswith("| 8.00 of 16.00 | 50.0% | ccccccc |")
    before, after = FILE.split("<!-- costs -->")[0], FILE.split("<!-- /costs -->")[1]
    assert path.read_text().startswith(before) and path.read_text().endswith(after)


def test_a_whole_table(cases, tmp_path):
    path = tmp_path / "results.md"
    path.write_text(FILE)
    tables.make("kinds", "", path)
    rows = [line for line in path.read_text().splitlines() if line.startswith("| `")]
    assert len(rows) == 5 and all(line.endswith("ccccccc |") for line in rows)
    assert "| `denoise` | denoiser, 64.0 M | - | 8.00 of 16.00 | 3.000 | 50.0% | ccccccc |" in rows
    assert FILE.partition("<!-- kinds")[0] in path.read_text()


def test_what_is_not_there(cases, tmp_path):
    path = tmp_path / "results.md"
    path.write_text("# Results\n")
    with pytest.raises(UserError, match="no row of costs; there are v5e:8x8 language model alone, "):
        tables.make("costs", "v9", path)
    with pytest.raises(UserError, match="no section <!-- costs -->"):
        tables.make("costs", "v6e:8x8 LLaVA", path)
    with pytest.raises(UserError, match=r"none\.md: no such file"):
        tables.make("costs", "v6e:8x8 LLaVA", tmp_path / "none.md")
