"""`--minutes`: how long each test of this folder injects faults. Without it they inject a fixed number.

With it, the reliability table of launch/RESULTS.md gets the numbers.
"""

from collections import Counter

import pytest

from launcher import REPOSITORY, write_recipe
from ross_jax.plan.results import Table, origin, update

RESULTS = REPOSITORY / "launch" / "RESULTS.md"
OUTCOMES = ("detected", "recovered", "harmless", "wrong")
KEYS = [
    ("training and its restarts: SIGKILL",),
    ("files of a run: bits, lengths, presence",),
    ("files of a model: bits, lengths, presence",),
    *((f"input of parsers: {group}",) for group in ("data", "tokenizers", "checkpoints", "recipes")),
]


def pytest_addoption(parser):
    parser.addoption("--minutes", type=float, default=None, help="inject faults for this many minutes")


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture
def reliability(request):
    """Function: what was injected, number of injections by outcome -> None. Any other outcome counts as wrong."""

    def report(name: str, outcomes: Counter) -> None:
        numbers = {each: outcomes[each] for each in OUTCOMES[:-1]}
        cells = [outcomes.total(), *numbers.values(), outcomes.total() - sum(numbers.values())]
        print(f"{name}: {dict(zip(('injected', *OUTCOMES), cells, strict=True))}")
        if request.config.getoption("minutes", default=None) is not None:
            table = Table(
                "reliability", ("what", "injected", *OUTCOMES), KEYS, tuple, "pytest tests/faults --minutes 30"
            )
            RESULTS.write_text(update(RESULTS.read_text(), table, (name,), list(map(str, cells)), origin(REPOSITORY)))

    return report
