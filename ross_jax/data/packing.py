"""The packing plan: which conversations share a row of S tokens and I image slots, settled before training.

    lengths of all samples ─► shuffle by (seed, epoch) ─► best fit into rows ─► shuffle rows ─► steps of equal rows

    row 0   | conversation 7        | conversation 2   |         |     each row: at most S tokens and I images
    row 1   | conversation 5 | conversation 9                  | |
    row 2   | conversation 1                     | conversation 4|

A plan is a pure function of the lengths, the settings and the epoch. So every process and every later run sees the same
rows, the number of steps is known before the first, and a step number is a position in the data. One process makes the
plan and caches it on disk, and the others read it.

The samples of an epoch are all samples once, or what a `Mixture` says.
"""

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from ross_jax.config import Range, Size, UserError, to_dict
from ross_jax.data.best_fit import OPEN_ROWS, best_fit
from ross_jax.data.cache import hash_arrays, load_arrays, save_arrays
from ross_jax.data.mixture import Mixture
from ross_jax.storage import location

logger = logging.getLogger(__name__)

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
      source: number of the source that it comes from.
    """

    start: int
    slot: int
    segment: int
    first_image_id: int
    source: int = 0


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


def make_plan(lengths: Lengths, settings: PlanSettings, mixture: Mixture | None = None) -> PackingPlan:
    """Plans one epoch. Samples of length 0 and samples that exceed a row are left out and counted.

    Args:
      mixture: which samples an epoch holds. None: each sample once.

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
    if mixture is None or mixture.is_plain:
        order, local = random.permutation(np.flatnonzero(fits)), False
    else:
        order, local = mixture.order(fits, settings.seed, settings.epoch, random), mixture.is_local
    if config.layout == "pad":
        rows_per_step = rows_per_step or _nearest_multiple(settings.batch, multiple)
        samples = _group_by_modality(order, lengths, rows_per_step, None if local else random)
        rows = len(samples)
        offsets = np.minimum(np.arange(rows + -rows % rows_per_step + 1), rows)
    else:
        row_of = _pack(order, lengths, config)
        rows = int(row_of.max()) + 1
        row_of = _shuffle_rows(rows, random, OPEN_ROWS if local else rows)[row_of]
        rows_per_step = rows_per_step or _nearest_multiple(settings.batch * rows / len(order), multiple)
        samples = order[np.argsort(row_of, kind="stable")]
        offsets = np.append(0, np.cumsum(_spread(np.bincount(row_of, minlength=rows), rows_per_step)))
    unfit = int(np.sum(usable & ~fits))
    return PackingPlan(offsets.astype(np.int32), samples.astype(np.int32), rows_per_step, unfit, int(np.sum(~usable)))


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


def report_sources(plan: PackingPlan, mixture: Mixture) -> None:
    """Logs how many conversations of an epoch come from each of several sources."""
    if len(mixture.parts) > 1:
        counts = np.bincount(np.searchsorted(mixture.ends, plan.samples, side="right"), minlength=len(mixture.parts))
        for part, count in zip(mixture.parts, counts.tolist(), strict=True):
            share = f"{count / len(plan.samples):.1%}"
            logger.info("packing plan: source %s: %d conversations of an epoch (%s)", part.name, count, share)


def _nearest_multiple(rows: int | float, multiple: int) -> int:
    return multiple * max(1, round(rows / multiple))


def _pack(order: np.ndarray, lengths: Lengths, config: PackingConfig) -> np.ndarray:
    """int32: the row of each sample of `order`."""
    limits = {"tokens": config.length, "images": config.images, "supervised": config.supervised}
    limits = {name: limit for name, limit in limits.items() if limit}  # without slots, no sample in `order` has images
    return best_fit(np.stack([getattr(lengths, name)[order] for name in limits]), list(limits.values()))


def _shuffle_rows(rows: int, random: np.random.RandomState, block: int) -> np.ndarray:
    """int64[rows]: where each row goes, which is inside its block of rows."""
    places = np.empty(rows, np.int64)
    for start in range(0, rows, block):
        moved = start + random.permutation(min(block, rows - start))
        places[moved] = np.arange(start, start + len(moved))
    return places


def _spread(sizes: np.ndarray, rows_per_step: int) -> np.ndarray:
    """Sizes of rows, with empty rows between them: the steps of `rows_per_step` rows differ by at most one real row."""
    rows = len(sizes)
    steps = -(-rows // rows_per_step)
    first = np.arange(steps + 1) * rows // steps
    step = np.repeat(np.arange(steps), np.diff(first))
    spread = np.zeros(steps * rows_per_step, np.int64)
    spread[step * rows_per_step + np.arange(rows) - first[step]] = sizes
    return spread


def _group_by_modality(
    order: np.ndarray, lengths: Lengths, size: int, random: np.random.RandomState | None
) -> np.ndarray:
    """Samples in groups of `size`: all of a group have images or all have none, and the longest come first.

    The groups are shuffled. The remainders of both kinds come last (LLaVA's `get_modality_length_grouped_indices`).

    Args:
      random: shuffles the groups. None: they stay in the order of their first samples.
    """
    groups, starts, rest = [], [], []
    for kind in (lengths.images[order] > 0, lengths.images[order] == 0):
        samples = order[kind]
        whole = len(samples) // size * size
        groups += [_longest_first(group, lengths) for group in samples[:whole].reshape(-1, size)]
        starts += np.flatnonzero(kind)[:whole:size].tolist()
        rest.append(samples[whole:])
    groups = [groups[i] for i in (random.permutation(len(groups)) if random else np.argsort(starts))]
    return np.concatenate([*groups, _longest_first(np.concatenate(rest), lengths)])


def _longest_first(samples: np.ndarray, lengths: Lengths) -> np.ndarray:
    return samples[np.argsort(-lengths.tokens[samples], kind="stable")]


def cached_plan(
    folder: str | Path, lengths: Lengths, settings: PlanSettings, writer: bool = True, mixture: Mixture | None = None
) -> PackingPlan:
    """`make_plan`, cached in `folder` under a name that hashes the lengths, every setting and the mixture.

    A file that is damaged or belongs to another plan is replaced. A plan that settles the number of rows per step is
    also kept under the settings of a run that continues and knows this number.

    Args:
      writer: whether this process may make the plan. One of several processes does; the others call with False after
        it has.

    Raises:
      UserError: as in `make_plan`; the folder cannot be written; or the plan is absent and this process is no writer.
    """
    path, described = _cache_file(folder, lengths, settings, mixture)
    arrays = load_arrays(path, described)
    if arrays is not None:
        return PackingPlan(arrays["offsets"], arrays["samples"], *(int(count) for count in arrays["counts"]))
    if not writer:
        raise UserError(f"{path}: the packing plan is not there; is {folder} shared between all processes?")
    plan = make_plan(lengths, settings, mixture)
    counts = np.array([plan.rows_per_step, plan.dropped, plan.unusable], np.int64)
    for each in {settings, dataclasses.replace(settings, rows_per_step=plan.rows_per_step)}:
        file = _cache_file(folder, lengths, each, mixture)
        save_arrays(*file, {"offsets": plan.offsets, "samples": plan.samples, "counts": counts})
    return plan


def _cache_file(
    folder: str | Path, lengths: Lengths, settings: PlanSettings, mixture: Mixture | None
) -> tuple[Path, str]:
    """Path of a cached plan, and the description that the file must have."""
    values = to_dict(settings) | ({"multiple": 1} if settings.rows_per_step else {})  # the rows per step are settled
    if mixture is not None and not mixture.is_plain:
        values["mixture"] = mixture.hash
    described = json.dumps(
        {"format": _FORMAT, "lengths": lengths.hash, "row": values.pop("packing"), **values}, sort_keys=True
    )
    return location(folder) / f"plan-{hashlib.sha256(described.encode()).hexdigest()[:20]}.npz", described
