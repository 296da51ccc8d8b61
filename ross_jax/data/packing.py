"""The packing plan: which conversations share a row of S tokens and I picture slots, settled before training.

    lengths of all samples ─► shuffle by (seed, epoch) ─► best fit into rows ─► shuffle rows ─► steps of equal rows

A plan is a pure function of the lengths, the settings and the epoch. So every process and every later run sees the
same rows, the number of steps is known before the first, and a step number is a position in the data. It is made by
one process, cached on disk and read by all.

The packing algorithm is grain's (`BestFitPackIterDataset`). It packs arrays; here it packs arrays of nothing that are
as long as the samples, and what is kept is which sample went where.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import grain
import numpy as np
from grain.experimental import BestFitPackIterDataset

from ross_jax.config import UserError, to_dict
from ross_jax.data.cache import hash_arrays, load_arrays, save_arrays

_OPEN_ROWS = 512  # rows that a sample may still go into: more of them pack no better, and cost time
_FORMAT = 1  # of the cached file; goes up when the same settings should give another plan


@dataclass(frozen=True)
class PackingConfig:
    """How conversations are laid out in rows.

    Attributes:
      length: S, tokens per row, picture tokens included.
      images: I, picture slots per row.
      supervised: most supervised tokens in a row; None: as many as fit. A text loss that gathers the supervised
        positions into a buffer of this size cannot overflow.
      layout: `pack` fills rows with several conversations, best fit; `pad` has one conversation a row, and the rows of
        a step are all with pictures or all without (`group_by_modality_length` of LLaVA).
      too_long: what happens to a conversation that exceeds a row: `drop` it, or `truncate` its text. Pictures are
        never cut: what comes after the cut, a picture included, is left out whole.
    """

    length: int = 2048
    images: int = 2
    supervised: int | None = None
    layout: Literal["pack", "pad"] = "pack"
    too_long: Literal["drop", "truncate"] = "drop"

    def __post_init__(self):
        if self.length < 1 or self.images < 0:
            raise ValueError(f"a row of {self.length} tokens and {self.images} picture slots holds nothing")
        if self.supervised is not None and self.supervised < 1:
            raise ValueError(f"supervised is {self.supervised}; a row must have room for at least one target")


@dataclass(frozen=True)
class Lengths:
    """What each sample of the data set needs of a row; int32 arrays [samples].

    Attributes:
      tokens: its tokens, with N for each picture. 0: the sample cannot be used.
      images: its pictures.
      supervised: positions that have a target.
    """

    tokens: np.ndarray
    images: np.ndarray
    supervised: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def hash(self) -> str:
        return hash_arrays(self.tokens, self.images, self.supervised)

    def first_image_ids(self) -> np.ndarray:
        """uint32 [samples]: the identity of each sample's first picture; the next ones count on from it.

        Numbered through the data set in its own order, so a picture keeps its identity wherever shuffling, packing or
        the number of processes puts it. Identities begin at 1; 0 is an empty slot.
        """
        return (1 + np.cumsum(self.images, dtype=np.int64) - self.images).astype(np.uint32)


@dataclass(frozen=True)
class PackingPlan:
    """The rows of one epoch.

    Row r holds the samples `samples[offsets[r]:offsets[r + 1]]`, in this order; step s consists of the rows
    `s * rows_per_step` to `(s + 1) * rows_per_step`. Rows that fill up the last steps are empty.

    Attributes:
      offsets: int32 [rows + 1].
      samples: int32 [packed samples], indices into the data set.
      rows_per_step: rows of a global batch.
      dropped: usable samples that exceed a row.
      unusable: samples of length 0.
      hash: of all of the above.
    """

    offsets: np.ndarray
    samples: np.ndarray
    rows_per_step: int
    dropped: int
    unusable: int

    @property
    def rows(self) -> int:
        return len(self.offsets) - 1

    @property
    def steps(self) -> int:
        return self.rows // self.rows_per_step

    @property
    def hash(self) -> str:
        counts = np.array([self.rows_per_step, self.dropped, self.unusable], np.int64)
        return hash_arrays(self.offsets, self.samples, counts)

    def row(self, index: int) -> np.ndarray:
        """int32: the samples of one row."""
        return self.samples[self.offsets[index] : self.offsets[index + 1]]

    def statistics(self, lengths: Lengths, config: PackingConfig) -> dict[str, int | float]:
        """Figures for the log. `efficiency` is the share of all positions that hold a token, `slots_used` of slots."""
        used = lengths.tokens[self.samples].sum(dtype=np.int64)
        images = lengths.images[self.samples].sum(dtype=np.int64)
        return {
            "steps": self.steps,
            "rows": self.rows,
            "rows_per_step": self.rows_per_step,
            "empty_rows": int(np.sum(np.diff(self.offsets) == 0)),
            "conversations": len(self.samples),
            "conversations_per_step": len(self.samples) / self.steps,
            "efficiency": float(used) / (self.rows * config.length),
            "slots_used": float(images) / max(1, self.rows * config.images),
            "dropped": self.dropped,
            "unusable": self.unusable,
        }


def make_plan(
    lengths: Lengths,
    config: PackingConfig,
    *,
    batch: int,
    multiple: int = 1,
    rows_per_step: int | None = None,
    seed: int = 0,
    epoch: int = 0,
) -> PackingPlan:
    """Plans one epoch.

    Args:
      lengths: of all samples; those of length 0 and those that exceed a row are left out and counted.
      config: the row.
      batch: conversations per step, on average.
      multiple: rows per step are a multiple of this (the devices that share a batch, times accumulation splits).
      rows_per_step: fixed, as later epochs must have it; None: the multiple that comes nearest to `batch`.
      seed, epoch: the order of samples and rows is a function of both.

    Raises:
      UserError: no sample can be used, or none fits into a row.
    """
    usable = lengths.tokens > 0
    fits = usable & (lengths.tokens <= config.length) & (lengths.images <= config.images)
    if config.supervised is not None:
        fits &= lengths.supervised <= config.supervised
    if not fits.any():
        raise UserError(
            f"none of {len(lengths)} samples fits a row of {config.length} tokens and {config.images} picture slots "
            f"({int(np.sum(~usable))} are broken or empty); the longest usable one has {lengths.tokens.max(initial=0)} "
            f"tokens and the most pictures are {lengths.images.max(initial=0)}"
        )
    # RandomState: NumPy guarantees its streams for ever (NEP 19), so a later NumPy makes the same plan.
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence((seed, epoch))))
    order = random.permutation(np.flatnonzero(fits))
    if config.layout == "pad":
        rows_per_step = rows_per_step or _nearest_multiple(batch, multiple)
        rows = [[sample] for sample in _group_by_modality(order, lengths, rows_per_step, random)]
        rows += [[]] * (-len(rows) % rows_per_step)
    else:
        packed = _best_fit(order, lengths, config)
        packed = [packed[i] for i in random.permutation(len(packed))]
        rows_per_step = rows_per_step or _nearest_multiple(batch * len(packed) / len(order), multiple)
        rows = _spread(packed, rows_per_step)
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    samples = np.concatenate(rows, dtype=np.int32, casting="unsafe")
    return PackingPlan(offsets, samples, rows_per_step, int(np.sum(usable & ~fits)), int(np.sum(~usable)))


def _nearest_multiple(rows: int | float, multiple: int) -> int:
    return multiple * max(1, round(rows / multiple))


def _best_fit(order: np.ndarray, lengths: Lengths, config: PackingConfig) -> list[Sequence[int]]:
    """Rows of samples: each sample goes, in `order`, into the fullest open row that has room for it."""
    limits = {"tokens": config.length, "images": config.images, "supervised": config.supervised}
    limits = {name: limit for name, limit in limits.items() if limit}  # no slots: no sample here has a picture
    counts = {name: getattr(lengths, name) for name in limits}
    nothing = np.int8(0)

    def needs(sample: np.int64) -> dict[str, np.ndarray]:
        arrays = {name: np.broadcast_to(nothing, count[sample]) for name, count in counts.items()}
        return {**arrays, "sample": int(sample)}

    in_this_thread = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    packed = BestFitPackIterDataset(
        grain.MapDataset.source(order).map(needs).to_iter_dataset(in_this_thread),
        length_struct=limits,
        num_packing_bins=min(_OPEN_ROWS, len(order)),
        shuffle_bins=False,
        meta_features=("sample",),
    )
    return [row["sample"] for row in packed]


def _spread(rows: list[Sequence[int]], rows_per_step: int) -> list[Sequence[int]]:
    """Inserts empty rows so that all steps are full in shape and hold equally many real rows, within one."""
    steps = -(-len(rows) // rows_per_step)
    spread = []
    for step in range(steps):
        some = rows[step * len(rows) // steps : (step + 1) * len(rows) // steps]
        spread += some + [[]] * (rows_per_step - len(some))
    return spread


def _group_by_modality(order: np.ndarray, lengths: Lengths, size: int, random: np.random.RandomState) -> np.ndarray:
    """Samples in groups of `size`, all with pictures or all without, each sorted by length, the groups shuffled.

    What is left of both kinds makes up the end, as in LLaVA's `get_modality_length_grouped_indices`.
    """
    groups, rest = [], []
    for kind in (lengths.images[order] > 0, lengths.images[order] == 0):
        samples = order[kind]
        whole = len(samples) // size * size
        groups += [_longest_first(group, lengths) for group in samples[:whole].reshape(-1, size)]
        rest.append(samples[whole:])
    groups = [groups[i] for i in random.permutation(len(groups))]
    return np.concatenate([*groups, _longest_first(np.concatenate(rest), lengths)])


def _longest_first(samples: np.ndarray, lengths: Lengths) -> np.ndarray:
    return samples[np.argsort(-lengths.tokens[samples], kind="stable")]


def cached_plan(
    folder: str | Path,
    lengths: Lengths,
    config: PackingConfig,
    *,
    batch: int,
    multiple: int = 1,
    rows_per_step: int | None = None,
    seed: int = 0,
    epoch: int = 0,
    writer: bool = True,
) -> PackingPlan:
    """`make_plan`, kept in `folder` under a name that hashes the lengths and every setting.

    A file that is damaged, or is of another plan, is made anew.

    Args:
      writer: whether this process may make the plan. Of several processes one does, and the others call with False
        once it has.

    Raises:
      UserError: as in `make_plan`; the folder cannot be written; or the plan is absent and this process is no writer.
    """
    settings = dict(batch=batch, multiple=multiple, rows_per_step=rows_per_step, seed=seed, epoch=epoch)
    described = json.dumps(
        {"format": _FORMAT, "lengths": lengths.hash, "row": to_dict(config), **settings}, sort_keys=True
    )
    path = Path(folder) / f"plan-{hashlib.sha256(described.encode()).hexdigest()[:20]}.npz"
    arrays = load_arrays(path, described)
    if arrays is not None:
        return PackingPlan(arrays["offsets"], arrays["samples"], *(int(count) for count in arrays["counts"]))
    if not writer:
        raise UserError(f"{path}: the packing plan is not there; is {folder} shared between all processes?")
    plan = make_plan(lengths, config, **settings)
    counts = np.array([plan.rows_per_step, plan.dropped, plan.unusable], np.int64)
    save_arrays(path, described, {"offsets": plan.offsets, "samples": plan.samples, "counts": counts})
    return plan
