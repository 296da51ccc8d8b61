"""A folder of plans computes each plan once."""

import json

import pytest

from configs import ross
from ross_jax.config import UserError, from_dict
from ross_jax.plan import plans as module
from ross_jax.plan.plans import Case, Plans
from ross_jax.plan.report import Report
from ross_jax.training.recipe import RunConfig


@pytest.fixture
def planned(monkeypatch):
    """Stand-in for the planner: the list of plans that were computed, in order. Nothing is compiled."""
    found = []

    def plan(config, target, options):
        found.append((config.step.remat, target, options.rows, options.cached))
        if options.rows == 13:
            raise UserError("unlucky")
        return Report(
            options.recipe, "train", target, 8, {"data": 8}, config.step.remat, 8, [], [], {}, 9, 5, True, [], []
        )

    monkeypatch.setattr(module, "plan", plan)
    monkeypatch.setattr(module, "open_target", lambda name: name)
    return found


def test_planned_once(planned, tmp_path):
    config, told = read("ross"), []
    plans = Plans(tmp_path / "plans", "1", lambda _: config, told.append)
    case = Case("ross:llm=qwen2_7b", "v5e:2x4", rows=8)
    first = plans(case)
    assert plans(case) == first and planned == [("full", "v5e:2x4", 8, ())]
    assert told == ["ross:llm=qwen2_7b on v5e:2x4, 8 rows"]
    for other in (
        Case("ross:llm=vicuna_7b", "v5e:2x4", rows=8),
        Case("ross:llm=qwen2_7b", "v5e:4x4", rows=8),
        Case("ross:llm=qwen2_7b", "v5e:2x4"),
        Case("ross:llm=qwen2_7b", "v5e:2x4", 8, ("targets",)),
        Case("ross:llm=qwen2_7b", "v5e:2x4", 8, set=(("mesh.tensor", 2), ("step.remat", "dots"))),
        Case("ross:llm=qwen2_7b", "v5e:2x4", 8, set=(("step.remat", "mlp"),)),
    ):
        count = len(planned)
        plans(other)
        assert len(planned) == count + 1, other
    assert planned[-2:] == [("dots", "v5e:2x4", 8, ()), ("mlp", "v5e:2x4", 8, ())]
    assert told[-2] == "ross:llm=qwen2_7b on v5e:2x4, 8 rows, mesh.tensor=2, step.remat=dots"
    Plans(tmp_path / "plans", "2", lambda _: config, told.append)(case)  # with another version of the source code
    assert len(planned) == 8
    assert all(json.loads(path.read_text())["fits"] for path in (tmp_path / "plans").iterdir())


def test_a_plan_that_fails_is_not_kept(planned, tmp_path):
    plans = Plans(tmp_path, "1", read, lambda _: None)
    for _ in range(2):
        with pytest.raises(UserError, match="unlucky"):
            plans(Case("ross", "v5e:2x4", rows=13))
    assert len(planned) == 2 and not list(tmp_path.iterdir())


def read(_: str) -> RunConfig:
    return from_dict(RunConfig, ross.get_config("").to_dict())
