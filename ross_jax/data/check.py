"""Checks all samples of a data set as training would read them: every record encoded, every image decoded.

sources ─► samples, read by all cores ─► Checked(status="broken", reason="...") ─► a table row for each source

ok              trained
broken          the record or an image cannot be used
dropped         exceeds a row, and `packing.too_long` is `drop`
cut             exceeds a row, and `truncate` cuts it
unsupervised    has no token to learn from
"""

import dataclasses
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from ross_jax.config import UserError
from ross_jax.data.encoders import ImageEncoder
from ross_jax.data.fields import turns_field
from ross_jax.data.images import ImageError, preprocess
from ross_jax.data.mixture import Mixture
from ross_jax.data.packing import PackingConfig
from ross_jax.data.reading import DataConfig, Preprocessing, expand_sample, read_in_order
from ross_jax.data.samples import Sample, SampleError, Source
from ross_jax.process import cores

PROBLEMS = ("broken", "dropped", "cut", "unsupervised")
_AT_ONCE = 32  # samples per message from a worker process
_MANY = 500  # samples; fewer are read before worker processes have started
_EXAMPLES = 5  # of each problem and source


@dataclass(frozen=True)
class Checked:
    """What was found of a sample.

    Attributes:
      index: of the sample in the data set.
      status: `ok` or one of `PROBLEMS`.
      reason: names the sample and says what is wrong; empty if nothing is.
      tokens, images, supervised: what it needs of a row, before it is cut.
    """

    index: int
    status: str
    reason: str = ""
    tokens: int = 0
    images: int = 0
    supervised: int = 0


@dataclass
class Findings:
    """What was found of a source.

    Attributes:
      counts: number of samples by status.
      examples: for each problem the first samples that have it.
      tokens: of each sample that can be used.
      epoch: samples of the source in an epoch.
    """

    name: str
    samples: int
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Checked]] = field(default_factory=lambda: {name: [] for name in PROBLEMS})
    tokens: array = field(default_factory=lambda: array("i"))
    images: int = 0
    text_only: int = 0
    epoch: int = 0

    def add(self, checked: Checked) -> None:
        self.counts[checked.status] += 1
        if checked.status in self.examples and len(self.examples[checked.status]) < _EXAMPLES:
            self.examples[checked.status].append(checked)
        if checked.status not in ("broken", "dropped"):
            self.tokens.append(checked.tokens)
            self.images += checked.images
            self.text_only += not checked.images

    @property
    def usable(self) -> int:
        return self.counts["ok"] + self.counts["cut"] + self.counts["unsupervised"]


class _Checks:
    """Chunks of samples: [chunk] -> what was found of each."""

    def __init__(self, source: Source, preprocessing: Preprocessing, packing: PackingConfig, chunks: Sequence[range]):
        self._source, self._preprocessing, self._packing, self._chunks = source, preprocessing, packing, chunks

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, chunk: int) -> list[Checked]:
        return [check_sample(self._source, index, self._preprocessing, self._packing) for index in self._chunks[chunk]]


def check_sample(source: Source, index: int, preprocessing: Preprocessing, packing: PackingConfig) -> Checked:
    """Reads one sample as training does, images included."""
    try:
        sample = source[index]
        whole = expand_sample(sample, preprocessing, dataclasses.replace(packing, too_long="drop"))
        for image in sample.images:
            preprocess(preprocessing.decode(image.read(), image.name), preprocessing.images, image.name)
    except (SampleError, ImageError) as error:
        reason = str(error) if isinstance(error, SampleError) else f"{sample}: {error}"
        return Checked(index, "broken", reason)
    sizes = len(whole.tokens), len(whole.image_start), whole.supervised
    exceeded = [
        f"{size} {name}, a row has {limit}"
        for name, size, limit in zip(
            ("tokens", "images", "supervised"), sizes, (packing.length, packing.images, packing.supervised), strict=True
        )
        if limit is not None and size > limit
    ]
    if exceeded and packing.too_long == "drop":
        return Checked(index, "dropped", f"{sample}: {', '.join(exceeded)}", *sizes)
    if exceeded:
        return Checked(index, *_cut(sample, preprocessing, packing, exceeded), *sizes)
    has_text = turns_field(sample.record) is not None and not isinstance(preprocessing.encode, ImageEncoder)
    if has_text and not whole.supervised:
        return Checked(index, "unsupervised", f"{sample}: no supervised token", *sizes)
    return Checked(index, "ok", "", *sizes)


def _cut(sample: Sample, preprocessing: Preprocessing, packing: PackingConfig, exceeded: list[str]) -> tuple[str, str]:
    """(status, reason) of a sample that is cut."""
    try:
        left = expand_sample(sample, preprocessing, packing)
    except SampleError as error:
        return "broken", str(error)
    if not left.supervised:
        return "unsupervised", f"{sample}: nothing supervised is left after the cut ({', '.join(exceeded)})"
    return "cut", f"{sample}: {', '.join(exceeded)}"


def check(source: Source, preprocessing: Preprocessing, config: DataConfig, mixture: Mixture) -> list[Findings]:
    """What was found of each source, with a progress bar on a terminal.

    Args:
      source: from `open_sources`.
    """
    findings = [Findings(part.name, part.samples) for part in mixture.parts]
    workers = max(config.workers, cores()) if len(source) >= _MANY else 0
    settings, ends = dataclasses.replace(config, workers=workers, prefetch=4), mixture.ends
    iterator = read_in_order(_Checks(source, preprocessing, config.packing, _chunks(mixture)), 0, settings)
    try:
        with tqdm(total=len(source), desc="checking", unit="sample", unit_scale=True, disable=None) as bar:
            for chunk in iterator:
                for checked in chunk:
                    findings[int(np.searchsorted(ends, checked.index, side="right"))].add(checked)
                bar.update(len(chunk))
    finally:
        iterator.close()
    return findings


def _chunks(mixture: Mixture) -> list[range]:
    """Ranges of samples that are read together: a row group, or a few samples."""
    chunks, start = [], 0
    for part in mixture.parts:
        sizes = [_AT_ONCE] * -(-part.samples // _AT_ONCE) if part.groups is None else part.groups[:, 0].tolist()
        end = start + part.samples
        for size in sizes:
            chunks.append(range(start, min(start + size, end)))
            start = chunks[-1].stop
    return chunks


def table(findings: Sequence[Findings]) -> list[list[str]]:
    """A header, a row for each source, and one for all of several."""
    header = ["source", "samples", "an epoch", *PROBLEMS, "text only", "images", "tokens", "longest"]
    rows = [_row(each) for each in findings]
    if len(findings) > 1:
        total = Findings("all", sum(each.samples for each in findings))
        for each in findings:
            total.counts.update(each.counts)
            total.tokens += each.tokens
            total.images, total.text_only = total.images + each.images, total.text_only + each.text_only
            total.epoch += each.epoch
        rows.append(_row(total))
    return [header, *rows]


def _row(found: Findings) -> list[str]:
    numbers = [found.samples, found.epoch, *(found.counts[name] for name in PROBLEMS), found.text_only, found.images]
    mean = f"{np.mean(found.tokens):.0f}" if found.tokens else "-"
    return [found.name, *map(str, numbers), mean, str(max(found.tokens, default=0))]


def stops_run(findings: Sequence[Findings], config: DataConfig, mixture: Mixture) -> str | None:
    """Why a run of this config would not begin, or would end early; None if it would train.

    Also sets the number of samples that each source has in an epoch.
    """
    unusable = None
    try:
        counts = mixture.counts([each.usable for each in findings])
    except UserError as error:
        unusable, counts = str(error), [0] * len(findings)
    for each, count in zip(findings, counts, strict=True):
        each.epoch = count
    samples = sum(each.samples for each in findings)
    for name, limit, setting in (
        ("broken", max(1, config.max_broken * samples), "max_broken"),
        ("dropped", config.max_dropped * samples, "max_dropped"),
    ):
        count = sum(each.counts[name] for each in findings)
        if count > limit or count == samples:
            share = getattr(config, setting)
            return f"{count} of {samples} samples are {name}, more than data.{setting} = {share:.1%} allows"
    return unusable
