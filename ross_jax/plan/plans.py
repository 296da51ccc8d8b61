"""A folder of plans. Each plan is made once, so that a table of many goes on where it was cut off."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from ross_jax.plan.planner import plan
from ross_jax.plan.report import Report
from ross_jax.plan.targets import open_target
from ross_jax.plan.workload import Options
from ross_jax.training.recipe import RunConfig


@dataclasses.dataclass(frozen=True)
class Case:
    """A plan to make.

    Attributes:
      recipe: `NAME:ARGUMENTS` of a recipe in configs/.
      topology: as in `open_target`.
      rows: rows of a global batch. None: as many as the packing plan would have.
      cached: parts that the run reads from a cache.
      set: fields of the recipe to change, as `("mesh.tensor", 2)`.
    """

    recipe: str
    topology: str
    rows: int | None = None
    cached: tuple[str, ...] = ()
    set: tuple[tuple[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Plans:
    """Plans by case, one JSON file each.

    Attributes:
      folder: holds the files.
      source: names the code and the compilers. Plans of another source are not used.
      read: recipe -> its config.
      tell: is called with a line before a plan is made.
    """

    folder: Path
    source: str
    read: Callable[[str], RunConfig]
    tell: Callable[[str], None]

    def __call__(self, case: Case) -> Report:
        """The plan of a case: from its file if there is one, else made and written.

        Raises:
          UserError: the case cannot be planned. A program that does not fit has a plan.
        """
        key = hashlib.sha256(json.dumps([dataclasses.asdict(case), self.source]).encode()).hexdigest()[:16]
        path = self.folder / f"{case.topology.replace(':', '-')}-{case.recipe.partition(':')[0]}-{key}.json"
        if path.is_file():
            return Report(**json.loads(path.read_text()))
        changes = "".join(f", {field}={value}" for field, value in case.set)
        self.tell(f"{case.recipe} on {case.topology}, {case.rows or 'default'} rows{changes}")
        config = self.read(case.recipe)
        for field, value in case.set:
            section, name = field.split(".")
            section_config = dataclasses.replace(getattr(config, section), **{name: value})
            config = dataclasses.replace(config, **{section: section_config})
        report = plan(config, open_target(case.topology), Options(case.recipe, rows=case.rows, cached=case.cached))
        jax.clear_caches()  # the program of a 7B model takes gigabytes
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n")
        partial.replace(path)
        return report
