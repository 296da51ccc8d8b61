"""The conversion engine: one table of (their key, our path, transform) per component, for import and export."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from ross_jax.config import UserError


class ConversionError(UserError):
    """A checkpoint that cannot be converted; lists every problem found."""

    def __init__(self, where: str, problems: Iterable[str]):
        self.problems = list(problems)
        lines = "".join(f"\n  {problem}" for problem in self.problems)
        super().__init__(f"{where}: {len(self.problems)} problem(s){lines}")


@contextlib.contextmanager
def collecting(errors: list[UserError]) -> Iterator[None]:
    """Keeps a UserError for later, so that one run names all that is wrong."""
    try:
        yield
    except UserError as error:
        errors.append(error)


def raise_all(where: str, errors: Sequence[UserError]) -> None:
    """Raises what was collected, if anything, as one error."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ConversionError(where, [p for error in errors for p in getattr(error, "problems", [str(error)])])


@dataclasses.dataclass(frozen=True)
class Transform:
    """A change of layout and its inverse. Both return views, so they also serve to compute shapes at no cost."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


COPY = Transform(lambda x: x, lambda x: x)
LINEAR = Transform(lambda x: x.T, lambda x: x.T)
"""torch Linear [out, in] <-> [in, out]."""
CONV = Transform(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
"""torch Conv2d [out, in, height, width] <-> [height, width, in, out]."""
POINTWISE = Transform(lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None])
"""torch 1x1 Conv2d [out, in, 1, 1] <-> [in, out]."""
BATCHED = Transform(lambda x: x[0], lambda x: x[None])
"""[1, ...] <-> [...]."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
      theirs: key; `{}` stands for the number of a stacked layer.
      ours: path in the component's parameters; a stacked leaf has the layer as its leading axis.
      alias: another key that older checkpoints use.
    """

    theirs: str
    ours: str
    transform: Transform = COPY
    alias: str | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """How one component's foreign keys map to its parameters.

    Attributes:
      rows: cover every parameter exactly once.
      unused: patterns of keys that belong to the component but that we never compute with.
      copies: key -> the row's key that it duplicates when present (a tied head that was stored all the same).
    """

    rows: tuple[Row, ...]
    unused: tuple[str, ...] = ()
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Piece:
    """One foreign tensor's place: the whole of a leaf, or one layer of it."""

    key: str
    alias: str | None
    path: str
    layer: int | None
    transform: Transform
    shape: tuple[int, ...]
    """Theirs."""


def dense(theirs: str, ours: str, bias: bool = True) -> tuple[Row, ...]:
    """Rows of a linear layer: `weight` <-> `kernel` and, if it has one, `bias`."""
    rows = (Row(f"{theirs}.weight", f"{ours}/kernel", LINEAR), Row(f"{theirs}.bias", f"{ours}/bias"))
    return rows if bias else rows[:1]


def conv(theirs: str, ours: str, bias: bool = True) -> tuple[Row, ...]:
    """Rows of a convolution: `weight` <-> `kernel` and, if it has one, `bias`."""
    rows = (Row(f"{theirs}.weight", f"{ours}/kernel", CONV), Row(f"{theirs}.bias", f"{ours}/bias"))
    return rows if bias else rows[:1]


def norm(theirs: str, ours: str) -> tuple[Row, ...]:
    """Rows of an affine norm with bias."""
    return (Row(f"{theirs}.weight", f"{ours}/scale"), Row(f"{theirs}.bias", f"{ours}/bias"))


def expand(table: Table, shapes: Mapping[str, tuple[int, ...]]) -> list[Piece]:
    """Every foreign tensor that fills the leaves of `shapes` (our path -> shape).

    Raises:
      ValueError: the table and the leaves do not cover each other exactly; a mistake in the table.
    """
    paths = [row.ours for row in table.rows]
    if sorted(paths) != sorted(shapes):
        raise ValueError(f"table and parameters differ: {sorted(set(paths) ^ set(shapes)) or 'duplicate rows'}")
    pieces = []
    for row in table.rows:
        shape = shapes[row.ours]
        stacked = "{}" in row.theirs
        inner = np.broadcast_to(np.int8(0), shape[1:] if stacked else shape)
        theirs = row.transform.to_theirs(inner).shape
        for layer in range(shape[0]) if stacked else (None,):
            alias = row.alias and row.alias.format(layer)
            pieces.append(Piece(row.theirs.format(layer), alias, row.ours, layer, row.transform, theirs))
    return pieces


@dataclasses.dataclass(frozen=True)
class Match:
    """A component's table held against the keys that are there.

    Attributes:
      pieces: (piece, the key found for it).
      unused: keys kept aside under their own names.
      copies: (key, the key found that it duplicates).
      problems: what does not fit, one line each.
    """

    pieces: list[tuple[Piece, str]]
    unused: list[str]
    copies: list[tuple[str, str]]
    problems: list[str]


def match(table: Table, shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> Match:
    """Assigns foreign keys (key -> shape) to leaves, and lists everything that does not fit."""
    stacked = max((shapes[row.ours][0] for row in table.rows if "{}" in row.theirs), default=0)
    if stacked > len(found):  # a mistyped number of layers would be listed key by key
        return Match([], [], [], [f"the config has {stacked} layers, more than there are tensors ({len(found)})"])
    pieces, problems, names = [], [], {}
    left = dict(found)
    for piece in expand(table, shapes):
        key = piece.key if piece.key in left or piece.alias is None else piece.alias
        if key not in left:
            problems.append(f"missing: {piece.key}, expected shape {list(piece.shape)}")
            continue
        shape = left.pop(key)
        names[piece.key] = key
        if shape != piece.shape:
            problems.append(f"wrong shape: {key}, expected {list(piece.shape)}, found {list(shape)}")
        else:
            pieces.append((piece, key))
    copies = [(key, names[of]) for key, of in table.copies.items() if left.pop(key, None) is not None and of in names]
    unused = [key for key in left if any(re.fullmatch(pattern, key) for pattern in table.unused)]
    problems += [f"unmapped: {key}, shape {list(left[key])}" for key in left if key not in set(unused)]
    return Match(pieces, unused, copies, problems)
