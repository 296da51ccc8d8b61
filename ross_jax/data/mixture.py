"""The samples of an epoch and their order: shares of several sources, and windows of row groups.

    source 0   5 usable samples, weight 1    ─ passes over the source, one after the other ─► 4 4 1 ...
    source 1   3 usable samples, weight 3                                                  ─► 2 0 1 2 1 ...
    epoch      8 samples, of which 2 from source 0 and 6 from source 1, in random order

Counts are exact in every epoch. A source goes through all of its samples before it repeats one, across epochs too. Each
pass has its own order. The order is a function of the seed and the epoch, so any epoch can be planned alone.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ross_jax.config import UserError


@dataclass(frozen=True)
class Part:
    """What a source contributes to an epoch.

    Attributes:
      name: of the source, for messages.
      samples: number of samples.
      weight: its share of the epoch's samples, relative to the other sources' weights. None: `repeat` counts.
      repeat: how often an epoch holds each sample; 0.5 for half of the samples.
      groups: int64[groups, 2]: samples of each row group, and their bytes in memory. None: samples are read at random.
      window: bytes of row groups whose samples are shuffled together.
    """

    name: str
    samples: int
    weight: float | None = None
    repeat: float = 1.0
    groups: np.ndarray | None = None
    window: int = 0

    @property
    def windows(self) -> int:
        """Number of windows; 1 if samples are shuffled freely."""
        return 1 if self.groups is None else 1 + int(self.groups[:, 1].sum() // max(1, self.window))

    def shuffled(self, usable: np.ndarray, random: np.random.RandomState) -> np.ndarray:
        """The usable samples in random order, window by window."""
        if self.groups is None or self.windows == 1:
            return random.permutation(usable)
        order = random.permutation(len(self.groups))
        window = np.empty(len(self.groups))
        window[order] = np.cumsum(self.groups[order, 1]) // self.window
        of_sample = np.repeat(window, self.groups[:, 0])[usable]
        return usable[np.argsort(of_sample + random.random_sample(len(usable)), kind="stable")]


@dataclass(frozen=True)
class Mixture:
    """All sources of a data set, in its order."""

    parts: tuple[Part, ...]

    @property
    def is_plain(self) -> bool:
        """Whether an epoch holds each sample once, in an order without windows."""
        return not self.is_local and all(part.weight is None and part.repeat == 1 for part in self.parts)

    @property
    def is_local(self) -> bool:
        """Whether neighbours in the order lie near one another on disk, and should stay near."""
        return any(part.windows > 1 for part in self.parts)

    @property
    def hash(self) -> str:
        digest = hashlib.sha256()
        for part in self.parts:
            digest.update(str((part.samples, part.weight, part.repeat, part.windows > 1 and part.window)).encode())
            digest.update(b"" if part.windows == 1 or part.groups is None else part.groups.tobytes())
        return digest.hexdigest()

    @property
    def ends(self) -> np.ndarray:
        """int64[parts]: index of the sample after the last one of each part."""
        return np.cumsum([part.samples for part in self.parts])

    def counts(self, usable: Sequence[int]) -> list[int]:
        """Samples of each part in an epoch.

        Args:
          usable: number of usable samples of each part.

        Raises:
          UserError: a part has no usable sample.
        """
        if any(part.weight is not None for part in self.parts):
            weights = np.array([part.weight or 0.0 for part in self.parts])
            exact = sum(usable) * weights / weights.sum()
            counts = np.floor(exact).astype(np.int64)
            largest = np.argsort(counts - exact, kind="stable")[: sum(usable) - int(counts.sum())]
            counts[largest] += 1
        else:
            counts = np.array([round(part.repeat * n) for part, n in zip(self.parts, usable, strict=True)])
        for part, count, available in zip(self.parts, counts, usable, strict=True):
            if count and not available:
                raise UserError(
                    f"source {part.name}: none of its {part.samples} samples can be used, and the mixture wants {count}"
                )
        if not counts.any():
            raise UserError("the weights or repeats of all sources are 0, or so small that an epoch has no sample")
        return counts.tolist()

    def order(self, fits: np.ndarray, seed: int, epoch: int, random: np.random.RandomState) -> np.ndarray:
        """int64: the samples of an epoch in random order.

        Args:
          fits: bool[samples]: which samples can be used.
          random: shuffles the parts among one another.
        """
        starts = self.ends - [part.samples for part in self.parts]
        usable = [np.flatnonzero(fits[at:end]) for at, end in zip(starts, self.ends, strict=True)]
        counts = self.counts([len(each) for each in usable])
        labels = random.permutation(np.repeat(np.arange(len(self.parts)), counts))
        order = np.empty(len(labels), np.int64)
        for number, (part, available, count) in enumerate(zip(self.parts, usable, counts, strict=True)):
            found, position = [], epoch * count
            while (left := count - sum(map(len, found))) > 0:
                turn, skip = divmod(position, len(available))
                seeds = np.random.SeedSequence((seed, 1 + number, turn))
                shuffled = part.shuffled(available, np.random.RandomState(np.random.MT19937(seeds)))
                found.append(shuffled[skip : skip + left])
                position += len(found[-1])
            order[labels == number] = starts[number] + np.concatenate([np.empty(0, np.int64), *found])
        return order
