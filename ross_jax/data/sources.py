"""Random-access sources of samples: LLaVA conversations, images without text, and TFDS data sets.

    source[index] ─► Sample: record {"id", "image", "conversations"}, lazy images ─ read() ─► bytes of a file

A source can be pickled to worker processes. Records and images are addressed by byte ranges, so a source holds offsets
and no data. A sample that cannot be used raises `SampleError`, or `ImageError` when its image is read. `BrokenSamples`
counts such samples, and ends the run when there are too many.
"""

import hashlib
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal

import numpy as np

from ross_jax.config import Factor, UserError
from ross_jax.console import LOCAL
from ross_jax.data.archives import MAX_IMAGE_BYTES, open_store, reading
from ross_jax.data.fields import Survey, record_images, turns_field
from ross_jax.data.images import ImageError
from ross_jax.data.mixture import Mixture, Part
from ross_jax.data.mounts import Mounts
from ross_jax.data.parquet import SHUFFLE_MEMORY, ParquetSource
from ross_jax.data.ranges import NO_CACHES, Caches
from ross_jax.data.records import RecordFile, Version
from ross_jax.data.samples import LazyImage, Sample, SampleError, Source
from ross_jax.data.spelling import briefly
from ross_jax.data.turns import no_conversations, sample_name
from ross_jax.data.webdataset import WebDataset
from ross_jax.storage import is_remote

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceConfig:
    """Where samples come from.

    Attributes:
      path: for kind `llava` a JSON or JSONL file of conversations, for `parquet` and `webdataset` a file or a folder of
        shards, for `images` a folder, .zip or .tar of images, for `tfds` the name of a TFDS data set.
      kind: format of the source.
      images: for `llava` and `parquet`: folders, .zip or .tar files that hold the images that records name, searched in
        this order. An entry `coco=/data/coco.zip` serves names that begin with `coco/`, and the archive holds them
        without that prefix.
      name: of the source in logs and metrics. None: the name of its file or folder.
      weight: share of an epoch's samples, relative to the weights of the other sources, which must have one too. An
        epoch has as many samples as all sources have that can be used. None: an epoch holds every sample.
      repeat: how often an epoch holds each sample, if there are no weights; 0.5 for half of the samples.
      where: for `parquet`: conditions such as `relevance_min >= 4`; rows that do not satisfy all of them are left out.
      split: for `tfds`: name of the split.
      data_dir: for `tfds`: folder of prepared data sets. None: TFDS's default folder.
      caption: for `tfds` and `parquet`: name of the text feature or column that becomes the answer. None: images
        without text, or with the turns of the records.
    """

    path: str
    kind: Literal["llava", "parquet", "webdataset", "images", "tfds"] = "llava"
    images: tuple[str, ...] = ()
    where: tuple[str, ...] = ()
    name: str | None = None
    weight: Factor | None = None
    repeat: Factor = 1.0
    split: str = "train"
    data_dir: str | None = None
    caption: str | None = None

    def __post_init__(self):
        if self.where and self.kind != "parquet":
            raise ValueError(
                f"where: {list(self.where)} filters columns of Parquet files, and the kind is {self.kind!r}"
            )
        if self.weight is not None and self.repeat != 1:
            raise ValueError(f"weight is {self.weight} and repeat {self.repeat}; set one of them")

    def open(self, max_image_bytes: int) -> "Source | None":
        """The source of a subclass outside the package, see `config.extends`; None for the kinds above."""


def check_mixture(configs: Sequence[SourceConfig]) -> None:
    """Raises ValueError if some sources have a weight and others have none, or nothing is left."""
    weights = [config.weight for config in configs]
    if None in weights and any(weight is not None for weight in weights):
        raise ValueError(f"sources have the weights {weights}; give all of them a weight, or none")
    if not any(config.repeat if config.weight is None else config.weight for config in configs):
        raise ValueError("sources: every weight or repeat is 0")


def source_names(configs: Sequence[SourceConfig]) -> tuple[str, ...]:
    """Names of sources for logs and metrics. Equal names are numbered."""
    names: list[str] = []
    for config in configs:
        name = config.name or PurePath(config.path).stem or config.path
        taken = sum(each == name or each.startswith(f"{name}-") for each in names)
        names.append(f"{name}-{taken + 1}" if name in names else name)
    return tuple(names)


@dataclass(frozen=True)
class Limits:
    """Bounds of what sources read.

    Attributes:
      image_bytes: most bytes of an image file.
      shuffle_memory: bytes of decoded row groups of Parquet files among which samples are shuffled.
      caches: what is kept of buckets.
    """

    image_bytes: int = MAX_IMAGE_BYTES
    shuffle_memory: int = SHUFFLE_MEMORY
    caches: Caches = NO_CACHES


def open_source(config: SourceConfig, known: Version | None = None, limits: Limits = Limits()) -> Source:
    """Opens one source.

    Args:
      known: the version that the run recorded. Its fingerprint is taken if sizes and times of the files are equal.

    Raises:
      UserError: the source does not exist, is empty, or is corrupt (with line and column).
    """
    if (own := config.open(limits.image_bytes)) is not None:
        return own
    if config.kind == "images":
        return ImageSource(config.path, limits.image_bytes, limits.caches)
    if config.kind == "tfds":
        return TfdsSource(config.path, config.split, config.data_dir, config.caption)
    if config.kind == "webdataset":
        return WebDataset(config.path, known, limits.image_bytes, limits.caches)
    if config.kind == "parquet":
        columns = config.images, config.where, config.caption
        return ParquetSource(config.path, *columns, known, limits.image_bytes, limits.shuffle_memory, limits.caches)
    return LlavaSource(config.path, config.images, known, limits.image_bytes, limits.caches)


def open_sources(
    configs: Sequence[SourceConfig], known: Sequence[Version] = (), limits: Limits = Limits()
) -> tuple[Source, list[Version]]:
    """Opens sources as one data set, and tells what is to be remembered of each.

    Args:
      known: the version of each source that the run recorded; may be empty.

    Raises:
      UserError: as in `open_source`.
    """
    pairs = zip(configs, known or [None] * len(configs), strict=True)
    sources = [open_source(*pair, limits) for pair in pairs]
    versions = [
        getattr(source, "version", None) or Version(config.path, len(source), source.fingerprint)
        for config, source in zip(configs, sources, strict=True)
    ]
    return sources[0] if len(sources) == 1 else Concatenated(sources), versions


def report_fields(source: Source, max_share: float) -> None:
    """Warns of fields of records that are not read. Arguments and errors are those of `found_in_fields`."""
    for finding in found_in_fields(source, max_share):
        logger.warning(finding)


def found_in_fields(source: Source, max_share: float) -> list[str]:
    """Sentences about fields of records that are not read.

    Args:
      max_share: share of the records of a source without images that may have marks of images.

    Raises:
      UserError: more have. Their images must be in fields that are not read.
    """
    if isinstance(source, Concatenated):
        return [finding for each in source.sources for finding in found_in_fields(each, max_share)]
    if isinstance(source, ParquetSource):
        return list(source.findings())
    if not isinstance(source, LlavaSource):
        return []
    findings = list(source.survey.findings(source.version.path))
    if source.survey.is_blind(max_share):
        raise UserError(findings[0])
    return findings


class LlavaSource:
    """Conversations in LLaVA's format: `{"id", "image", "conversations": [{"from", "value"}, ...]}`.

    `image` (or `images`) is a file name, a list of file names, or absent. `id` may be absent and need not be unique, as
    in published mixes. Messages are checked when they are encoded.

    Attributes:
      version: the file as it was read.
      survey: what of its records is not read.
    """

    def __init__(
        self,
        path: str | Path,
        images: Sequence[str] = (),
        known: Version | None = None,
        max_image_bytes: int = MAX_IMAGE_BYTES,
        caches: Caches = NO_CACHES,
    ):
        self.survey = Survey()
        self._records = RecordFile(path, known, self.survey.add, caches)
        self._images = Mounts(images, max_image_bytes, caches)
        self.version = self._records.version
        self.fingerprint = self.version.fingerprint

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        record, place = self._records[index], self._records.place(index)
        if turns_field(record) is None:
            raise SampleError(f"{place}: {sample_name(record)}: {no_conversations(record)}")
        name = f"{Path(self._records.path).name}[{index}]" if record.get("id") is None else str(record["id"])
        try:
            images = tuple(self._images.image(value, k) for k, value in enumerate(record_images(record)))
        except UserError as error:
            raise SampleError(f"{place}: {sample_name(record)}: {error}") from error
        return Sample(name, record, images, place)


class ImageSource:
    """Images without text: every image file below a folder or in an archive, ordered by name."""

    def __init__(self, path: str | Path, max_image_bytes: int = MAX_IMAGE_BYTES, caches: Caches = NO_CACHES):
        self._store = open_store(path, max_image_bytes, caches)
        self._names = self._store.names()
        if not self._names:
            raise UserError(f"{path}: no image in it")
        self.fingerprint = _hash("pictures", *self._names)  # caches hold it, so its first word stays

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Sample:
        name = self._names[index]
        return Sample(name, {"id": name, "image": name}, (LazyImage(briefly(name), lambda: self._store.read(name)),))


class TfdsSource:
    """A prepared split of a TensorFlow Datasets data set with an `image` feature, read through `tfds.data_source`.

    Images stay encoded until they are read. TensorFlow is neither needed nor imported.
    """

    def __init__(self, name: str, split: str, data_dir: str | None = None, caption: str | None = None):
        if data_dir is not None and is_remote(data_dir):
            raise UserError(
                f"{data_dir}: TFDS data sets are read from disks alone; copy it to this machine: `gcloud storage cp -r`"
            )
        import tensorflow_datasets as tfds  # takes a second, which other sources need not wait for

        try:
            decoders = {"image": tfds.decode.SkipDecoding()}
            self._data = tfds.data_source(name, split=split, data_dir=data_dir, decoders=decoders, download=False)
        except (ValueError, KeyError, AssertionError, FileNotFoundError, NotImplementedError) as error:
            # str() of a KeyError gives the repr of its argument.
            reason = str(error.args[0] if isinstance(error, KeyError) else error).split("\n")[0]
            folder = f" and `--data_dir={data_dir}`" if data_dir else ""
            raise UserError(
                f"TFDS data set {name!r}, split {split!r}, in {data_dir or 'the default folder'}: {reason} "
                f"Prepare it with `tfds build {name} --file_format=array_record`{folder}"
            ) from error
        features = self._data.dataset_info.features
        for feature in filter(None, ("image", caption)):
            if feature not in features:
                raise UserError(f"TFDS data set {name!r} has no feature {feature!r}; it has {sorted(features)}")
        self._prefix = f"{name}/{split}"
        self._caption = caption
        version = str(self._data.dataset_info.version)
        self.fingerprint = _hash("tfds", name, version, split, str(caption), str(len(self._data)))

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Sample:
        name = f"{self._prefix}/{index}"
        sample = {"id": name, "image": name}
        if not self._caption:  # nothing is read here, so measuring lengths takes no pass over the data
            return Sample(name, sample, (LazyImage(name, lambda: reading(name, lambda: self._data[index]["image"])),))
        try:
            record = reading(name, lambda: self._data[index])
            caption = record[self._caption]
            caption = caption.decode() if isinstance(caption, bytes) else str(caption)
        except (ImageError, UnicodeDecodeError) as error:
            raise SampleError(f"sample {name!r}: {error}") from error
        sample["conversations"] = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption}]
        return Sample(name, sample, (LazyImage(name, lambda: record["image"]),))


def make_mixture(configs: Sequence[SourceConfig], source: Source, window: int) -> Mixture:
    """What each source contributes to an epoch.

    Args:
      source: from `open_sources`.
      window: bytes of row groups of Parquet files whose samples are shuffled together.
    """
    sources = source.sources if isinstance(source, Concatenated) else [source]
    parts = zip(source_names(configs), configs, sources, strict=True)
    return Mixture(
        tuple(
            Part(name, len(each), config.weight, config.repeat, getattr(each, "groups", None), window)
            for name, config, each in parts
        )
    )


class Concatenated:
    """Several sources one after the other, as one."""

    def __init__(self, sources: Sequence[Source]):
        self.sources = list(sources)
        self._ends = np.cumsum([len(source) for source in sources])
        self.fingerprint = _hash("concatenated", *(source.fingerprint for source in sources))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Sample:
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self.sources[which][index - (int(self._ends[which - 1]) if which else 0)]


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode(errors="surrogatepass")).hexdigest()


_LOGGED = 10  # broken samples that the log names


class BrokenSamples:
    """Counts broken samples, logs the first of them, and ends the run when there are too many.

    `max(1, max_share * max(seen, min(total, 1000)))` broken samples are allowed. So one broken sample never ends a run,
    two at the start do not end a large one, and a wrong image folder ends it within a few steps.

    Args:
      total: number of samples in the data set, or in this process's part of it.
      max_share: largest share of broken samples, from 0 to 1.
    """

    def __init__(self, total: int, max_share: float = 0.01):
        self._total, self._max_share = total, max_share
        self._seen = 0
        self._broken: dict[int, str] = {}

    @property
    def count(self) -> int:
        return len(self._broken)

    def update(self, seen: int, broken: Sequence[tuple[int, str]]) -> None:
        """Counts `seen` more samples as read, and `broken` ones (index, reason) among them.

        Raises:
          UserError: too many samples are broken, or all of them. The text lists the first few.
        """
        self._seen = min(self._seen + seen, self._total)
        new = {index: reason for index, reason in broken if index not in self._broken}
        logged = dict(itertools.islice(new.items(), max(0, _LOGGED - self.count)))
        self._broken |= new
        allowed = max(1, self._max_share * max(self._seen, min(self._total, 1000)))
        if self.count > allowed or self.count == self._total:
            first = "\n".join(f"  {reason}" for reason in list(self._broken.values())[:5])
            raise UserError(
                f"{self.count} of {self._seen} samples read are broken, more than the allowed share of "
                f"{self._max_share:.1%}. The first of them:\n{first}\n"
                "Repair the data (do the image folder and the template fit it?), or raise max_broken"
            )
        for index, reason in logged.items():
            logger.warning("broken sample skipped (index %d): %s", index, reason, **LOCAL)
        if self.count > _LOGGED >= self.count - len(new):
            said = "more broken samples are skipped and only counted; launch/inspect_data.py lists bad records"
            logger.warning(said, **LOCAL)

    def summarise(self) -> None:
        """Logs how many samples are broken, if the log does not name them all."""
        if self.count > _LOGGED:
            logger.warning("%d of %d samples cannot be used", self.count, self._total)
