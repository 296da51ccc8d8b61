"""Conversion engine: one table of (Hugging Face key, path, transform) per component serves import and export.

    Row("model.layers.{}.mlp.up_proj.weight", "layers/up/kernel", LINEAR)

says that the tensors `model.layers.0.mlp.up_proj.weight`, `model.layers.1...` of a checkpoint, transposed and stacked,
are the parameter `layers/up/kernel`.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from ross_jax.config import UserError


class ConversionError(UserError):
    """A checkpoint that cannot be converted. The message lists all `problems`."""

    def __init__(self, where: str, problems: Iterable[str]):
        self.problems = list(problems)
        lines = "".join(f"\n  {problem}" for problem in self.problems)
        super().__init__(f"{where}: {len(self.problems)} problem(s){lines}")


@contextlib.contextmanager
def collecting(errors: list[UserError]) -> Iterator[None]:
    """Collects a UserError of the block instead of raising it, so that one run names everything that is wrong."""
    try:
        yield
    except UserError as error:
        errors.append(error)


def raise_all(where: str, errors: Sequence[UserError]) -> None:
    """Raises the collected errors, if there are any, as one."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ConversionError(where, [p for error in errors for p in getattr(error, "problems", [str(error)])])


@dataclasses.dataclass(frozen=True)
class Transform:
    """A change of layout and its inverse. Both return views, so they also compute shapes at no cost."""

    from_hf: Callable[[np.ndarray], np.ndarray]
    to_hf: Callable[[np.ndarray], np.ndarray]


COPY = Transform(lambda x: x, lambda x: x)
LINEAR = Transform(lambda x: x.T, lambda x: x.T)
"""Kernel of a torch Linear: [out, in] <-> [in, out]."""
CONV = Transform(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
"""Kernel of a torch Conv2d: [out, in, height, width] <-> [height, width, in, out]."""
POINTWISE = Transform(lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None])
"""Kernel of a torch 1x1 Conv2d: [out, in, 1, 1] <-> [in, out]."""
BATCHED = Transform(lambda x: x[0], lambda x: x[None])
"""[1, ...] <-> [...]."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
      hf_key: key in the checkpoint. `{}` stands for the number of a layer.
      path: path of the component's parameter. If `hf_key` has a `{}`, the parameter's leading axis is the layer.
      transform: change of layout.
      alias: key in older checkpoints, if they have another.
    """

    hf_key: str
    path: str
    transform: Transform = COPY
    alias: str | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """Keys of one component, and the parameters that they map to.

    Attributes:
      rows: one row for each parameter.
      unused: regular expressions of keys that belong to the component but are not needed to compute it. Import keeps
        these tensors aside for export.
      copies: key -> key of the row whose tensor it repeats, in checkpoints that store a tied head twice.
    """

    rows: tuple[Row, ...]
    unused: tuple[str, ...] = ()
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Piece:
    """One tensor of a checkpoint: a parameter, or one layer of it.

    Attributes:
      hf_key: key in the checkpoint.
      alias: key in older checkpoints, if they have another.
      path: path of the parameter.
      layer: index along the parameter's leading axis. None if the tensor is the whole parameter.
      transform: change of layout between the two.
      shape: shape in the checkpoint.
    """

    hf_key: str
    alias: str | None
    path: str
    layer: int | None
    transform: Transform
    shape: tuple[int, ...]


def dense(hf_key: str, path: str, bias: bool = True) -> tuple[Row, ...]:
    """Rows of a linear layer: `weight` <-> `kernel` and, if it has one, `bias`."""
    rows = (Row(f"{hf_key}.weight", f"{path}/kernel", LINEAR), Row(f"{hf_key}.bias", f"{path}/bias"))
    return rows if bias else rows[:1]


def conv(hf_key: str, path: str, bias: bool = True) -> tuple[Row, ...]:
    """Rows of a convolution: `weight` <-> `kernel` and, if it has one, `bias`."""
    rows = (Row(f"{hf_key}.weight", f"{path}/kernel", CONV), Row(f"{hf_key}.bias", f"{path}/bias"))
    return rows if bias else rows[:1]


def norm(hf_key: str, path: str) -> tuple[Row, ...]:
    """Rows of an affine norm with bias."""
    return (Row(f"{hf_key}.weight", f"{path}/scale"), Row(f"{hf_key}.bias", f"{path}/bias"))


def expand(table: Table, shapes: Mapping[str, tuple[int, ...]]) -> list[Piece]:
    """Lists the tensors of a checkpoint that fill all parameters.

    Args:
      table: the component's table.
      shapes: path -> shape of each parameter.

    Raises:
      ValueError: table and parameters do not cover each other exactly, which is a mistake in the table.
    """
    paths = [row.path for row in table.rows]
    if sorted(paths) != sorted(shapes):
        raise ValueError(f"table and parameters differ: {sorted(set(paths) ^ set(shapes)) or 'duplicate rows'}")
    pieces = []
    for row in table.rows:
        shape = shapes[row.path]
        stacked = "{}" in row.hf_key
        inner = np.broadcast_to(np.int8(0), shape[1:] if stacked else shape)
        hf_shape = row.transform.to_hf(inner).shape
        for layer in range(shape[0]) if stacked else (None,):
            alias = row.alias and row.alias.format(layer)
            pieces.append(Piece(row.hf_key.format(layer), alias, row.path, layer, row.transform, hf_shape))
    return pieces


@dataclasses.dataclass(frozen=True)
class Match:
    """Result of comparing a component's table with the keys of a checkpoint.

    Attributes:
      pieces: (piece, its key or alias, whichever the checkpoint has).
      unused: keys to keep aside.
      copies: (key, the other key that it repeats).
      problems: what does not fit, one line each.
    """

    pieces: list[tuple[Piece, str]]
    unused: list[str]
    copies: list[tuple[str, str]]
    problems: list[str]


def match(table: Table, shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> Match:
    """Assigns the keys of a checkpoint to parameters, and lists everything that does not fit.

    Args:
      table: the component's table.
      shapes: path -> shape of each parameter.
      found: key -> shape of each tensor in the checkpoint.
    """
    stacked = max((shapes[row.path][0] for row in table.rows if "{}" in row.hf_key), default=0)
    if stacked > len(found):  # else a mistyped number of layers would be listed key by key
        return Match([], [], [], [f"the config has {stacked} layers, more than there are tensors ({len(found)})"])
    pieces, problems, names = [], [], {}
    left = dict(found)
    for piece in expand(table, shapes):
        key = piece.hf_key if piece.hf_key in left or piece.alias is None else piece.alias
        if key not in left:
            problems.append(f"missing: {piece.hf_key}, expected shape {list(piece.shape)}")
            continue
        shape = left.pop(key)
        names[piece.hf_key] = key
        if shape != piece.shape:
            problems.append(f"wrong shape: {key}, expected {list(piece.shape)}, found {list(shape)}")
        else:
            pieces.append((piece, key))
    copies = [(key, names[of]) for key, of in table.copies.items() if left.pop(key, None) is not None and of in names]
    unused = [key for key in left if any(re.fullmatch(pattern, key) for pattern in table.unused)]
    problems += [f"unmapped: {key}, shape {list(left[key])}" for key in left if key not in set(unused)]
    return Match(pieces, unused, copies, problems)
