"""Plans that are kept in a folder, so that a table of many is made once and goes on where it was cut off."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from ross_jax.plan.planner import Options, plan
from ross_jax.plan.report import Report
from ross_jax.plan.targets import open_target
from ross_jax.training.recipe import RunConfig


@dataclasses.dataclass(frozen=True)
class Case:
    """What is planned.

    Attributes:
      recipe: `NAME:ARGUMENTS` of configs/.
      rows: of a global batch; None: what the packing plan would make.
      cached: what is read from a cache.
      set: fields of the recipe, as `("mesh.tensor", 2)`.
    """

    recipe: str
    topology: str
    rows: int | None = None
    cached: tuple[str, ...] = ()
    set: tuple[tuple[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Plans:
    """Plans by case.

    Attributes:
      folder: one JSON file per plan.
      source: stands for all else that plans depend on; another one makes them anew.
      read: recipe of a name.
      tell: is called with a line before a plan is made.
    """

    folder: Path
    source: str
    read: Callable[[str], RunConfig]
    tell: Callable[[str], None]

    def __call__(self, case: Case) -> Report:
        """The plan of a case, from its file if there is one.

        Raises:
          UserError: it cannot be planned; not that it does not fit.
        """
        key = hashlib.sha256(json.dumps([dataclasses.asdict(case), self.source]).encode()).hexdigest()[:16]
        path = self.folder / f"{case.topology.replace(':', '-')}-{case.recipe.partition(':')[0]}-{key}.json"
        if path.is_file():
            return Report(**json.loads(path.read_text()))
        told = "".join(f", {field}={value}" for field, value in case.set)
        self.tell(f"{case.recipe} on {case.topology}, {case.rows or 'default'} rows{told}")
        config = self.read(case.recipe)
        for field, value in case.set:
            section, name = field.split(".")
            config = dataclasses.replace(
                config, **{section: dataclasses.replace(getattr(config, section), **{name: value})}
            )
        report = plan(config, open_target(case.topology), Options(case.recipe, rows=case.rows, cached=case.cached))
        jax.clear_caches()  # a program of a 7B model takes gigabytes
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n")
        partial.replace(path)
        return report
