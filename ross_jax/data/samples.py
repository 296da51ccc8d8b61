"""Samples, and what every source of them has."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ross_jax.config import UserError
from ross_jax.data.spelling import briefly


class SampleError(UserError):
    """A sample that cannot be used. The text names its id."""


@dataclass(frozen=True)
class LazyImage:
    """An image that is read when it is needed.

    Attributes:
      name: file name for errors.
      read: gives the bytes of the file, or a uint8 array [H, W, channels].
    """

    name: str
    read: Callable[[], bytes | np.ndarray]


@dataclass(frozen=True)
class Sample:
    """One training example.

    Attributes:
      id: the record's id, or else the place of the record in its source.
      record: turns and images in a layout that `turns` and `fields` read. Without turns if there is no text.
      images: the images that the record names, in order.
      place: file and number of the record; empty if `id` says it.
    """

    id: str
    record: dict[str, Any]
    images: tuple[LazyImage, ...]
    place: str = ""

    def __str__(self) -> str:
        """How errors name the sample."""
        name = f"sample {briefly(self.id)!r}"
        return f"{self.place}: {name}" if self.place else name


@runtime_checkable
class Source(Protocol):
    """A sequence of samples. `fingerprint` changes when the texts do, and caches of lengths are keyed by it."""

    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...
