"""READMEs name each config field with its default and each launcher with its flags; their links exist."""

import ast
import dataclasses
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ross_jax.training.recipe import RunConfig

REPOSITORY = Path(__file__).parents[1]
READMES = [path for path in REPOSITORY.rglob("*.md") if ".venv" not in str(path) and "golden" not in path.parts]
LAUNCHERS = sorted((REPOSITORY / "launch").glob("*.py"))


def dataclasses_in(hint: Any) -> list[type]:
    """Config classes inside unions and tuples: `tuple[SourceConfig, ...]` gives `[SourceConfig]`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType, tuple):
        return [found for inner in typing.get_args(hint) for found in dataclasses_in(inner)]
    return [hint] if dataclasses.is_dataclass(hint) else []


def rows(cls: type, path: str = "", default: Any = None, seen: set[type] | None = None) -> Iterator[str]:
    """Yields the beginning of each field's row, such as "| `data.batch` | `128` |". Each config class is visited once.

    Args:
      cls: a config class.
      path: path of `cls` in `RunConfig`, with a dot at the end.
      default: the instance of `cls` in its parent's defaults. None: fields have the defaults of `cls`.
      seen: classes that were visited before.
    """
    seen = set() if seen is None else seen
    if cls in seen:
        return
    seen.add(cls)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name, inner = f"{path}{field.name}", dataclasses_in(hints[field.name])
        value = field.default if default is None else getattr(default, field.name)
        if field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        section = len(inner) == 1 and (inner[0] is hints[field.name])
        if not section:
            yield f"| `{name}` | " + ("required |" if value is dataclasses.MISSING else f"`{value!r}` |")
        for each in inner:
            yield from rows(each, f"{name}.", value if isinstance(value, each) else None, seen)


def test_every_config_field_is_documented():
    text = (REPOSITORY / "configs" / "README.md").read_text()
    assert [row for row in rows(RunConfig) if row not in text] == []


def flags_of(script: Path) -> set[str]:
    """Flags that a launcher defines through argparse or absl, such as `--dump-hlo`."""
    found = set()
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value} if re.fullmatch(r"--[a-z][a-z-]*", node.value) else set()
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "").startswith("DEFINE_"):
            found.add(f"--{ast.literal_eval(node.args[0])}")
    return found


@pytest.mark.parametrize("script", LAUNCHERS, ids=lambda path: path.name)
def test_every_launcher_is_documented(script):
    """Each launcher has a section in launch/README.md that names all of its flags."""
    text = (REPOSITORY / "launch" / "README.md").read_text()
    heading = f"\n## {script.name}\n"
    assert heading in text
    section = text.split(heading, 1)[1].split("\n## ", 1)[0]
    assert {flag for flag in flags_of(script) if flag not in section} == set()


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_lead_somewhere(path):
    targets = [target for target in re.findall(r"\]\(([^)#\s]+)", path.read_text()) if "://" not in target]
    assert [target for target in targets if not (path.parent / target).exists()] == []


def test_the_front_page_stays_short():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 180


def test_one_version_of_ruff():
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())
    assert f'"ruff=={hooks["repos"][0]["rev"].removeprefix("v")}"' in (REPOSITORY / "setup.py").read_text()


def test_the_example_of_an_objective_is_the_tested_one():
    readme = (REPOSITORY / "ross_jax" / "objectives" / "README.md").read_text()
    example = ast.parse(re.search(r"```python\n# my_objective\.py\n(.*?)```", readme, re.DOTALL).group(1))
    tested = ast.parse((REPOSITORY / "tests" / "objectives" / "encoder_features.py").read_text())
    assert [ast.unparse(node) for node in example.body] == [ast.unparse(node) for node in tested.body[1:]]
