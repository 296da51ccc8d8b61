"""Stored files that are older than the code: one table of old names and what they are called now.

`upgrade` is called wherever such a file is read:

    run.json        config of a run, in its directory
    ross_jax.json   manifest of a model directory
    cache.json      manifest of a cache of `launch/cache.py`

Files do not say how old they are, so an old name must not come back with another meaning.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Keys = tuple[str | int, ...]
"""Where a value is: keys of objects and indices of lists, from the outside in."""


@dataclass(frozen=True)
class Change:
    """A field of a stored file that has another name or other values now, or is gone.

    Attributes:
      file: the file's name.
      old: path of the field or section, its parts joined by `/`. `*` stands for any one key or index of a list.
      new: its path now. Each `*` stands for what the same one of `old` was. Empty: the path has not changed.
      values: old value -> value now. Values that are not in it have not changed.
      gone: the field had one value only, and is left out.
    """

    file: str
    old: str
    new: str = ""
    values: Mapping[Any, Any] = field(default_factory=dict)
    gone: bool = False

    def matches(self, path: Keys) -> bool:
        """Whether the change is about the leaf at `path`."""
        old = self.old.split("/")
        return len(path) >= len(old) and all(part in ("*", str(key)) for part, key in zip(old, path, strict=False))

    def apply(self, path: Keys, value: Any) -> tuple[Keys, Any]:
        """Today's path and value of a leaf that the change is about."""
        old = self.old.split("/")
        if len(path) == len(old):
            value = next((new for each, new in self.values.items() if each == value), value)
        if self.new:
            stars = (key for part, key in zip(old, path, strict=False) if part == "*")
            path = tuple(next(stars) if part == "*" else part for part in self.new.split("/")) + path[len(old) :]
        return path, value


CHANGES = (
    Change("run.json", "config/loop/pictures", "config/loop/images"),
    Change("run.json", "config/data/sources/*/kind", values={"pictures": "images"}),
    Change("run.json", "config/evaluation/sources/*/kind", values={"pictures": "images"}),
    Change("cache.json", "parts/*/picture_features", "parts/*/image_features"),
    Change("cache.json", "parts/*/picture_targets", "parts/*/image_targets"),
    Change("cache.json", "parts/*/picture_targets_mean", "parts/*/image_targets_mean"),
    Change("cache.json", "parts/*/picture_targets_logvar", "parts/*/image_targets_logvar"),
    Change("cache.json", "made_of/pictures", "made_of/images"),
    Change("cache.json", "made_of/images/image/rescale_factor", gone=True),
)


def upgrade(file: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The content of the stored file in today's names.

    Args:
      file: the file's name, as in `CHANGES`.
      values: what it holds, as JSON has it. The order of fields stays: arrays of a cache lie in it.
    """
    leaves = list(_leaves(values)) if values else []
    for change in CHANGES:
        if change.file == file:
            kept = [leaf for leaf in leaves if not (change.gone and change.matches(leaf[0]))]
            leaves = [change.apply(*leaf) if change.matches(leaf[0]) else leaf for leaf in kept]
    return _nested(leaves)


def _leaves(value: Any, path: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Everything that holds nothing else, by path: keys of objects, indices of lists."""
    if not value or not isinstance(value, (Mapping, list)):
        yield path, value
        return
    for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
        yield from _leaves(inner, (*path, key))


def _nested(leaves: Iterable[tuple[Keys, Any]]) -> dict[str, Any]:
    """The inverse of `_leaves`."""
    tree: dict[Any, Any] = {}
    for (*parents, key), value in leaves:
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[key] = value
    return _with_lists(tree)


def _with_lists(value: Any) -> Any:
    """Dictionaries whose keys are indices become lists."""
    if not isinstance(value, dict):
        return value
    inner = {key: _with_lists(each) for key, each in value.items()}
    return list(inner.values()) if inner and all(isinstance(key, int) for key in inner) else inner
