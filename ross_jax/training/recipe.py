"""The config of a run, which a recipe in `configs/` fills."""

import dataclasses
import typing
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from ross_jax.config import ConfigError, Count, Factor, Size, Whole, from_dict, nearest, to_dict, variant
from ross_jax.data.images import ImageConfig, encoder_image_config
from ross_jax.data.pipeline import DataConfig
from ross_jax.data.sources import SourceConfig
from ross_jax.lora import LoraConfig
from ross_jax.models.ross import HEADS, TARGET_ENCODERS, RossConfig
from ross_jax.objectives.objective import Sampling
from ross_jax.objectives.reconstruction import ReconstructionConfig, find_objective, reconstructor
from ross_jax.sharding import MeshConfig
from ross_jax.training.loop import LoopConfig
from ross_jax.training.optimizer import OptimizerConfig
from ross_jax.training.state import FreezeConfig, Tree, abstract_tree
from ross_jax.training.step import StepConfig


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """How conversations become ids, and the weight of their loss.

    Attributes:
      template: `plain`, `v1`, `qwen_2`, `llama3`, `qwen2_5`, `qwen3`, or `chatml`, which is the tokenizer's own.
      tokenizer: folder of the tokenizer, or its hub id `owner/name`.
      compat: `official` for the reference's ids and labels, labels that it loses included.
      weight: factor of the text loss in the sum. 0: there is no text loss, and a sample is its images alone, each
        behind an empty question.
    """

    template: str
    tokenizer: str
    compat: Literal["default", "official"] = "default"
    weight: Factor = 1.0

    def __post_init__(self):
        if self.weight < 0:
            raise ValueError(f"weight {self.weight} cannot be negative")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Reconstruction of held-out images every `loop.evaluate` steps, and benchmarks every `loop.benchmark` steps.

    Attributes:
      sources: where the images are, as `data.sources`; text in them is ignored.
      count: images, spread evenly over the sources.
      rows: images that are computed at once; rounded up to a multiple of the mesh's replicas.
      shown: images in TensorBoard.
      sampling: how a denoiser samples.
      benchmarks: (name, file or folder) of each benchmark of `ross_jax.evaluation.benchmarks`.
      benchmark_images: folders of their images, where the files' own folders do not have them.
      benchmark_limit: number of questions of each benchmark that are asked; None: all.
    """

    sources: tuple[SourceConfig, ...] = ()
    count: Count = 64
    rows: Size = 16
    shown: Size = 8
    sampling: Sampling = dataclasses.field(default_factory=lambda: Sampling("dpm", 20))
    benchmarks: tuple[tuple[str, str], ...] = ()
    benchmark_images: tuple[str, ...] = ()
    benchmark_limit: Count | None = None

    def __post_init__(self):
        for name in ("count", "rows", "shown"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


_COMPONENTS = ("vision", "projector", "language", *HEADS, *TARGET_ENCODERS)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that a training run depends on.

    Attributes:
      model: sizes of every component.
      init: model directories; each component's parameters come from the last one that has it, or are random.
      init_random: components that may be random although they are expected to have been trained before: all but the
        head and, while the language model is frozen, the projector.
      image_mode: how an image becomes square.
    """

    model: RossConfig
    text: TextConfig
    data: DataConfig
    freeze: FreezeConfig
    optimizer: OptimizerConfig
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    init: tuple[str, ...] = ()
    init_random: tuple[str, ...] = ()
    image_mode: Literal["pad", "square", "crop"] = "pad"
    reconstruction: ReconstructionConfig = dataclasses.field(default_factory=ReconstructionConfig)
    step: StepConfig = dataclasses.field(default_factory=StepConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    loop: LoopConfig = dataclasses.field(default_factory=LoopConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    seed: Whole = 0

    def __post_init__(self):
        missing = [name for name in ("vision", "projector", "language") if getattr(self.model, name) is None]
        if missing:
            raise ValueError(f"model has no {', '.join(missing)}, which every run needs")
        for name in self.init_random:
            if name not in _COMPONENTS:
                raise ValueError(
                    f"init_random: {name!r} is no component{nearest(name, _COMPONENTS)}; one of {list(_COMPONENTS)}"
                )
        self.reconstruction.check(self.model)
        self.freeze.with_updates(self.model, self.lora)  # names targets that match nothing
        if not self.text.weight and find_objective(self.reconstruction.kind) is None:
            raise ValueError("text.weight is 0 and reconstruction.kind 'none': there is no loss; set one of them")
        if self.reconstruction.compat == "official":
            packing = self.data.packing
            if packing.layout != "pad" or packing.images != 1 or self.data.precomputed is not None:
                raise ValueError(
                    "reconstruction.compat 'official' averages over rows of one conversation with at most one image, "
                    "computed from pixels; set data.packing.layout to 'pad', data.packing.images to 1 and "
                    f"data.precomputed to None, not {packing.layout!r}, {packing.images} and {self.data.precomputed!r}"
                )
        if self.loop.evaluate and not self.evaluation.sources:
            raise ValueError("loop.evaluate is set, but evaluation.sources is empty; name images, or set it to 0")
        if self.loop.evaluate and reconstructor(self.model) is None:
            raise ValueError("loop.evaluate is set, but the model makes no images; set it to 0")
        if self.loop.benchmark and not self.evaluation.benchmarks:
            raise ValueError("loop.benchmark is set, but evaluation.benchmarks is empty; name some, or set it to 0")

    @property
    def freezing(self) -> FreezeConfig:
        """`freeze` and what `lora` adds to it."""
        return self.freeze.with_updates(self.model, self.lora)

    def abstract_tree(self, mesh: Mesh) -> Tree:
        """Shapes of all parameters, with the dtype and sharding that training keeps them in."""
        return abstract_tree(self.model, self.freezing, mesh, self.mesh, self.lora)

    @property
    def images(self) -> ImageConfig:
        """How images are resized for the vision encoder."""
        model = self.model
        how = (model.image_mean, model.image_std, self.image_mode, model.image_resample)
        return encoder_image_config(model.vision.kind, model.vision.image_size, *how)


def relative_paths(config: RunConfig, more: Iterable[str | None] = ()) -> list[str]:
    """Paths of a config, and more paths, that count from the working directory. A tokenizer's hub id looks like one."""
    found = [config.text.tokenizer, config.data.cache, config.data.precomputed, *config.init, *more]
    for source in (*config.data.sources, *config.evaluation.sources):
        found += [] if source.kind == "tfds" else [source.path]
        found += [images.rpartition("=")[2] for images in source.images]
    found += [path for _, path in config.evaluation.benchmarks] + [*config.evaluation.benchmark_images]
    return [path for path in found if path and "://" not in path and not Path(path).is_absolute()]


def parse_parts(
    arguments: str | None, defaults: Mapping[str, str], choices: Mapping[str, Collection[str]]
) -> dict[str, str]:
    """The parts of a recipe, `name=value,...`, over their defaults.

    Args:
      choices: values that a part can have; a part without an entry takes any.

    Raises:
      ConfigError: an unknown part or value; names the nearest.
    """
    chosen = dict(defaults)
    for item in filter(None, (arguments or "").split(",")):
        name, _, value = item.partition("=")
        if name not in chosen:
            raise ConfigError(f"recipe part {name!r}: no such part{nearest(name, chosen)}; there are {list(chosen)}")
        if value not in choices.get(name, (value,)):
            known = list(choices[name])
            raise ConfigError(f"{name}={value!r}: unknown{nearest(value, known)}; one of {known}")
        chosen[name] = value
    return chosen


def complete(values: Mapping[str, Any]) -> ConfigDict:
    """A recipe with every field of `RunConfig`, defaults included, so that command-line flags can override any of them.

    Raises:
      ConfigError: values that make no run.
    """

    def with_tuples(value: Any) -> Any:  # flags override tuples, not lists
        if isinstance(value, dict):
            return {name: with_tuples(inner) for name, inner in value.items()}
        return tuple(with_tuples(inner) for inner in value) if isinstance(value, list) else value

    return ConfigDict(_with_types(RunConfig, with_tuples(to_dict(from_dict(RunConfig, values)))))


def _with_types(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """Fields that are None become typed placeholders: a flag can override these, but no plain None."""
    typed, hints = dict(values), typing.get_type_hints(cls)
    for name, value in values.items():
        options = [option for option in typing.get_args(hints[name]) or (hints[name],) if option is not type(None)]
        kind = typing.get_origin(options[0]) or options[0]
        if isinstance(value, dict):
            typed[name] = _with_types(variant(options, value, name), value)
        elif value is None and kind in (bool, int, float, str, tuple):
            typed[name] = placeholder(kind)
    return typed
