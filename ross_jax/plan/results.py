"""Measured tables in a Markdown file, each in a section of its own.

    <!-- costs -->
    `python launch/tables.py --tables=costs`; rows by commit:
    `1a2b3c4` (jax 0.10.2, libtpu 0.0.42.1)

    | topology | recipe | step, s | commit |
    | --- | --- | --- | --- |
    | v5e:8x8 | LLaVA | 1.805 | 1a2b3c4 |
    <!-- /costs -->

Remaking a table replaces what stands between its marks. Everything else in the file is written by hand and stays.
"""

import dataclasses
import importlib.metadata
import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ross_jax.config import UserError

PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin")
"""Packages whose versions change the figures."""

Key = tuple[str, ...]
"""A row's first cells, which name it."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where rows come from: the code's commit, and the versions of the packages that compiled it."""

    commit: str
    versions: str


@dataclasses.dataclass(frozen=True)
class Table:
    """A table that a program makes.

    Attributes:
      name: the table's name, as in its marks.
      head: names of the columns. One more, `commit`, follows.
      keys: the rows, by their first cells. A row with another key goes with the next change.
      row: makes the other cells of a row from its key.
      command: the command that makes it, if it is not launch/tables.py.
    """

    name: str
    head: tuple[str, ...]
    keys: Sequence[Key]
    row: Callable[..., tuple[str, ...]]
    command: str = ""


def origin(repository: Path) -> Origin:
    """The origin of rows that are made now. A `+` after the commit means that the code has changed since."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(repository), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    commit = git("rev-parse", "--short=7", "HEAD") or "unknown"
    changed = git("status", "--porcelain", "--", "ross_jax", "configs")
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Origin(commit + "+" * bool(changed), ", ".join(f"{name} {version}" for name, version in versions.items()))


def update(text: str, table: Table, key: Key, cells: Sequence[str], origin: Origin) -> str:
    """The file with one row of a table remade.

    Args:
      text: the file.
      cells: the row's cells after its key.
      origin: where the row comes from.

    Raises:
      UserError: the file has no section for the table.
    """
    name, head = table.name, table.head
    found = re.search(rf"(<!-- {name} -->\n)(.*?)(<!-- /{name} -->)", text, re.DOTALL)
    if found is None:
        raise UserError(f"no section <!-- {name} --> ... <!-- /{name} --> in the file of results")
    rows, versions = _parse(found[2], len(key))
    rows[key] = [*key, *cells, origin.commit]
    versions[origin.commit] = origin.versions
    kept = [rows[key] for key in table.keys if key in rows]
    commits = dict.fromkeys(row[-1] for row in kept)
    lines = [
        f"`{table.command or f'python launch/tables.py --tables={name}'}`; rows by commit:",
        ", ".join(f"`{commit}` ({versions.get(commit, 'unknown versions')})" for commit in commits),
        "",
        *(_line(cells) for cells in ([*head, "commit"], ["---"] * (len(head) + 1), *kept)),
    ]
    return text[: found.end(1)] + "\n".join(lines) + "\n" + text[found.start(3) :]


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _parse(section: str, key: int) -> tuple[dict[Key, list[str]], dict[str, str]]:
    """Rows by their first `key` cells, and versions by commit."""
    table = [line.strip().strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in cells] for cells in table[2:]]
    versions = dict(re.findall(r"`(\w+\+?)` \(([^)]*)\)", section))
    return {tuple(row[:key]): row for row in rows}, versions
