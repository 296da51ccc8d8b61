"""Parameter trees as flat tables, and back.

{"projector": {"linear_0": {"kernel": x}}}  ◄─ unflatten ─ flatten ─►  {"projector/linear_0/kernel": x}
"""

from collections.abc import Mapping
from typing import Any


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by path, after `prefix`. Everything that is not a mapping is a leaf."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}/")
        else:
            flat[prefix + name] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`, without empty branches."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def merge(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """One tree with the leaves of all; a later tree's leaf replaces an earlier one's."""
    flat: dict[str, Any] = {}
    for tree in trees:
        flat |= flatten(tree)
    return unflatten(flat)
