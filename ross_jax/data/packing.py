"""The packing plan: which conversations share a row of S tokens and I image slots, settled before training.

    lengths of all samples ─► shuffle by (seed, epoch) ─► best fit into rows ─► shuffle rows ─► steps of equal rows

    row 0   | conversation 7        | conversation 2   |         |     each row: at most S tokens and I images
    row 1   | conversation 5 | conversation 9                  | |
    row 2   | conversation 1                     | conversation 4|

A plan is a pure function of the lengths, the settings and the epoch. So every process and every later run sees the same
rows, the number of steps is known before the first, and a step number is a position in the data. One process makes the
plan and caches it on disk, and the others read it.

Grain's `BestFitPackIterDataset` packs. It is made for arrays, so it is given views of one zero that are as long as the
samples, and only its choice of row for each sample is used.
"""

import functools
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import grain
import numpy as np
from grain.experimental import BestFitPackIterDataset

from ross_jax.config import Range, Size, UserError, to_dict
from ross_jax.data.cache import hash_arrays, load_arrays, save_arrays

logger = logging.getLogger(__name__)

_OPEN_ROWS = 512  # rows that a sample may still go into; more of them cost time and pack no better
_FORMAT = 1  # of the cached file; goes up when the same settings are to give another plan


@dataclass(frozen=True)
class PackingConfig:
    """How conversations are laid out in rows.

    Attributes:
      length: S, tokens per row, image tokens included.
      images: I, image slots per row.
      supervised: most supervised tokens per row; None: no limit. With a limit, the text loss gathers the supervised
        positions into a buffer of this size and computes no logits beyond it.
      layout: `pack` fills rows with several conversations, best fit. `pad` gives each conversation its own row, and the
        rows of a step either all have images or all have none (LLaVA's `group_by_modality_length`).
      too_long: what happens to a conversation that exceeds a row: `drop` it, or `truncate` it. An image at the cut is
        left out whole, with everything after it.
    """

    length: Size = 2048
    images: Annotated[int, Range(0, 4096)] = 2
    supervised: Size | None = None
    layout: Literal["pack", "pad"] = "pack"
    too_long: Literal["drop", "truncate"] = "drop"

    def __post_init__(self):
        if self.length < 1 or self.images < 0:
            row = f"a row of {self.length} tokens and {self.images} image slots"
            raise ValueError(f"length and images: {row} holds nothing")
        if self.supervised is not None and self.supervised < 1:
            raise ValueError(f"supervised is {self.supervised}; a row must have room for at least one target")


@dataclass(frozen=True)
class Lengths:
    """What each sample of the data set needs of a row; int32[samples] each.

    Attributes:
      tokens: number of tokens, N of them for each image. 0: the sample cannot be used.
      images: number of images.
      supervised: number of positions that have a target.
    """

    tokens: np.ndarray
    images: np.ndarray
    supervised: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def hash(self) -> str:
        return hash_arrays(self.tokens, self.images, self.supervised)

    @functools.cached_property
    def first_image_ids(self) -> np.ndarray:
        """uint32[samples]: the identity of each sample's first image; the sample's other images count on from it.

        Images are numbered from 1 in the order of the data set. So an image keeps its identity wherever shuffling,
        packing or the number of processes puts it. 0 is an empty slot.
        """
        return (1 + np.cumsum(self.images, dtype=np.int64) - self.images).astype(np.uint32)


@dataclass(frozen=True)
class Location:
    """Where a row holds a conversation.

        positions  0              start                            S
        tokens     | conversation 1 | this conversation | padding  |
        images     | slot 0 | slot 1 | slot 2 | empty |                  slot = 2, if the first has two images

    Attributes:
      start: position of its first token.
      slot: image slot of its first image.
      segment: its number in the row, from 1.
      first_image_id: identity of its first image.
    """

    start: int
    slot: int
    segment: int
    first_image_id: int


@dataclass(frozen=True)
class PlanSettings:
    """What a plan depends on besides the lengths.

    Attributes:
      packing: the row.
      batch: conversations per step, on average.
      multiple: the rows of a step are a multiple of this: devices that share a batch, times accumulation splits.
      rows_per_step: fixed number of rows, which later epochs take from the first. None: the multiple that comes nearest
        to `batch` conversations.
      seed, epoch: settle the order of samples and rows.
    """

    packing: PackingConfig
    batch: int
    multiple: int = 1
    rows_per_step: int | None = None
    seed: int = 0
    epoch: int = 0


@dataclass(frozen=True)
class PackingPlan:
    """The rows of one epoch.

    Row r holds the samples `samples[offsets[r]:offsets[r + 1]]`, in this order. Step s consists of the rows
    `s * rows_per_step` to `(s + 1) * rows_per_step`, some of which may be empty.

    Attributes:
      offsets: int32[rows + 1].
      samples: int32[packed samples], indices into the data set.
      rows_per_step: rows of a global batch.
      dropped: number of usable samples that exceed a row.
      unusable: number of samples of length 0.
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
        """int32[conversations]: the samples of one row."""
        return self.samples[self.offsets[index] : self.offsets[index + 1]]

    def locations(self, index: int, lengths: Lengths) -> Iterator[tuple[int, Location]]:
        """(sample, where the row holds it) for each sample of a row."""
        start = slot = 0
        for segment, sample in enumerate(self.row(index).tolist(), start=1):
            yield sample, Location(start, slot, segment, int(lengths.first_image_ids[sample]))
            start += int(lengths.tokens[sample])
            slot += int(lengths.images[sample])

    def statistics(self, lengths: Lengths, config: PackingConfig) -> dict[str, int | float]:
        """Figures for the log.

        `efficiency` is the share of positions that hold a token, `slots_used` the share of image slots in use.
        """
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


def make_plan(lengths: Lengths, settings: PlanSettings) -> PackingPlan:
    """Plans one epoch. Samples of length 0 and samples that exceed a row are left out and counted.

    Raises:
      UserError: no sample can be used, or none fits into a row.
    """
    config, multiple, rows_per_step = settings.packing, settings.multiple, settings.rows_per_step
    usable = lengths.tokens > 0
    fits = usable & (lengths.tokens <= config.length) & (lengths.images <= config.images)
    if config.supervised is not None:
        fits &= lengths.supervised <= config.supervised
    if not fits.any():
        raise UserError(
            f"none of {len(lengths)} samples fits a row of {config.length} tokens and {config.images} image slots "
            f"({int(np.sum(~usable))} are broken or empty); the longest usable one has {lengths.tokens.max(initial=0)} "
            f"tokens and the most images are {lengths.images.max(initial=0)}; set packing.length and packing.images"
        )
    # NumPy guarantees that RandomState's streams never change (NEP 19), so a later NumPy makes the same plan.
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence((settings.seed, settings.epoch))))
    order = random.permutation(np.flatnonzero(fits))
    if config.layout == "pad":
        rows_per_step = rows_per_step or _nearest_multiple(settings.batch, multiple)
        rows = [[sample] for sample in _group_by_modality(order, lengths, rows_per_step, random)]
        rows += [[]] * (-len(rows) % rows_per_step)
    else:
        packed = _best_fit(order, lengths, config)
        packed = [packed[i] for i in random.permutation(len(packed))]
        rows_per_step = rows_per_step or _nearest_multiple(settings.batch * len(packed) / len(order), multiple)
        rows = _spread(packed, rows_per_step)
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    samples = np.concatenate(rows, dtype=np.int32, casting="unsafe")
    return PackingPlan(offsets, samples, rows_per_step, int(np.sum(usable & ~fits)), int(np.sum(~usable)))


def explain_dropped(plan: PackingPlan, lengths: Lengths, packing: PackingConfig) -> str | None:
    """How many conversations exceed a row, why, and which settings would take them. None: none does."""
    if not plan.dropped:
        return None
    reasons = []
    for setting, limit, counts in (
        ("images", packing.images, lengths.images),
        ("length", packing.length, lengths.tokens),
        ("supervised", packing.supervised, lengths.supervised),
    ):
        if limit is not None and (over := int(np.sum(counts > limit))):
            reasons.append(f"{over} exceed packing.{setting} = {limit} (the largest has {counts.max()})")
    return (
        f"{plan.dropped} of {len(lengths)} conversations do not fit a row and are left out: {'; '.join(reasons)}. "
        "Raise these settings, or set packing.too_long to 'truncate'"
    )


def report_plan(plan: PackingPlan, lengths: Lengths, packing: PackingConfig, max_dropped: float = 1.0) -> None:
    """Warns of conversations that exceed a row.

    Args:
      max_dropped: largest share of the samples that may exceed a row.

    Raises:
      UserError: more do.
    """
    dropped = explain_dropped(plan, lengths, packing)
    if plan.dropped > max_dropped * len(lengths):
        raise UserError(f"{dropped}; or allow a larger share than data.max_dropped = {max_dropped:.1%}")
    if dropped:
        logger.warning(dropped)


def _nearest_multiple(rows: int | float, multiple: int) -> int:
    return multiple * max(1, round(rows / multiple))


def _best_fit(order: np.ndarray, lengths: Lengths, config: PackingConfig) -> list[Sequence[int]]:
    """Rows of samples. Each sample goes, in `order`, into the fullest open row that has room for it."""
    limits = {"tokens": config.length, "images": config.images, "supervised": config.supervised}
    limits = {name: limit for name, limit in limits.items() if limit}  # without slots, no sample in `order` has images
    counts = {name: getattr(lengths, name) for name in limits}
    zero = np.int8(0)

    def needs(sample: np.int64) -> dict[str, np.ndarray]:
        arrays = {name: np.broadcast_to(zero, count[sample]) for name, count in counts.items()}
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
    """Inserts empty rows, so that every step has `rows_per_step` rows and the steps differ by at most one real row."""
    steps = -(-len(rows) // rows_per_step)
    spread = []
    for step in range(steps):
        some = rows[step * len(rows) // steps : (step + 1) * len(rows) // steps]
        spread += some + [[]] * (rows_per_step - len(some))
    return spread


def _group_by_modality(order: np.ndarray, lengths: Lengths, size: int, random: np.random.RandomState) -> np.ndarray:
    """Samples in groups of `size`: all of a group have images or all have none, and the longest come first.

    The groups are shuffled. The remainders of both kinds come last (LLaVA's `get_modality_length_grouped_indices`).
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


def cached_plan(folder: str | Path, lengths: Lengths, settings: PlanSettings, writer: bool = True) -> PackingPlan:
    """`make_plan`, cached in `folder` under a name that hashes the lengths and every setting.

    A file that is damaged or belongs to another plan is replaced.

    Args:
      writer: whether this process may make the plan. One of several processes does; the others call with False after
        it has.

    Raises:
      UserError: as in `make_plan`; the folder cannot be written; or the plan is absent and this process is no writer.
    """
    values = to_dict(settings)
    described = json.dumps(
        {"format": _FORMAT, "lengths": lengths.hash, "row": values.pop("packing"), **values}, sort_keys=True
    )
    path = Path(folder) / f"plan-{hashlib.sha256(described.encode()).hexdigest()[:20]}.npz"
    arrays = load_arrays(path, described)
    if arrays is not None:
        return PackingPlan(arrays["offsets"], arrays["samples"], *(int(count) for count in arrays["counts"]))
    if not writer:
        raise UserError(f"{path}: the packing plan is not there; is {folder} shared between all processes?")
    plan = make_plan(lengths, settings)
    counts = np.array([plan.rows_per_step, plan.dropped, plan.unusable], np.int64)
    save_arrays(path, described, {"offsets": plan.offsets, "samples": plan.samples, "counts": counts})
    return plan
