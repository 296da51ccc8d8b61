"""The registry of objectives, their config, and the objective of a run.

kind            head            target                                   distance
denoise         denoiser        latents                                  MSE of what it predicts
pixel           MLP             RGB pixels                               MSE, cosine
latent          MLP             latents, or a vision encoder's features  MSE, cosine
latent2pixel    MLP, decoder    RGB pixels                               MSE
none            -               -                                        - (LLaVA)
"""

import dataclasses
from typing import Annotated, Any, Literal

from jax.typing import DTypeLike

from ross_jax.config import Factor, Range, Share, from_dict, nearest, required
from ross_jax.models.denoiser import DenoiserConfig
from ross_jax.models.language import tap_number
from ross_jax.models.layers import RematPolicy
from ross_jax.models.regressor import RegressorConfig
from ross_jax.models.ross import RossConfig
from ross_jax.objectives.denoise import DenoiseObjective
from ross_jax.objectives.objective import Objective
from ross_jax.objectives.regress import Distance, Latent2PixelObjective, LatentObjective, PixelObjective

NONE = "none"
"""The kind without an objective: LLaVA."""
OBJECTIVES: dict[str, type[Objective]] = {
    cls.kind: cls for cls in (DenoiseObjective, PixelObjective, LatentObjective, Latent2PixelObjective)
}
"""Kind -> objective."""


def register(cls: type[Objective]) -> type[Objective]:
    """Adds an objective of its own kind; a class decorator.

    Raises:
      ValueError: another class has the kind already.
    """
    found = OBJECTIVES.setdefault(cls.kind, cls)
    if cls.kind == NONE or f"{found.__module__}.{found.__qualname__}" != f"{cls.__module__}.{cls.__qualname__}":
        raise ValueError(f"reconstruction kind {cls.kind!r} is taken; give {cls.__name__} another")
    OBJECTIVES[cls.kind] = cls
    return cls


def kinds() -> tuple[str, ...]:
    """Every kind, `none` last."""
    return (*OBJECTIVES, NONE)


def find_objective(kind: str) -> type[Objective] | None:
    """The objective of a kind; None for `none`.

    Raises:
      ValueError: no such kind; names the nearest.
    """
    if kind not in kinds():
        raise ValueError(f"kind {kind!r} is none of {list(kinds())}{nearest(kind, kinds())}")
    return OBJECTIVES.get(kind)


@dataclasses.dataclass(frozen=True)
class ReconstructionConfig:
    """The second loss. Its head, and the head's sizes, are `model.denoiser` or `model.regressor`.

    Attributes:
      kind: an objective of the registry, or `none`.
      weight: factor of the loss in the sum.
      draws: (t, epsilon) draws per image, of `denoise`.
      distance: of `pixel` and `latent`.
      condition_dropout: share of draws in which `denoise` is not told the visual outputs; guidance needs some, such as
        0.1.
      dtype: of the denoiser's activations; the reference's are float32.
      remat: what the backward pass through the denoiser recomputes. On TPU `full` is faster than `none`, since
        recomputing costs less than reading back.
      compat: `official` averages as the reference does, over text-only rows too.
      options: (name, value) settings of an objective that the fields above do not have.
    """

    kind: str = DenoiseObjective.kind
    weight: Factor = 1.0
    draws: Annotated[int, Range(1, 1024)] = 4
    distance: Distance = "mse"
    condition_dropout: Share = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: RematPolicy = "full"
    compat: Literal["default", "official"] = "default"
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self):
        objective = find_objective(self.kind)
        if self.draws < 1:
            raise ValueError(f"draws {self.draws} must be at least 1")
        if not 0.0 <= self.condition_dropout < 1.0:
            raise ValueError(f"condition_dropout {self.condition_dropout} must be in [0, 1)")
        declared = objective.settings() if objective else set()
        chosen = {"condition_dropout": self.condition_dropout != 0.0, "distance": self.distance != "mse"}
        for name in (*(name for name, set_ in chosen.items() if set_), *dict(self.options)):
            if name not in declared:
                raise ValueError(f"{name} is no setting of kind {self.kind!r}{nearest(name, declared)}")

    def check(self, model: RossConfig) -> None:
        """Raises ValueError if the model lacks what this kind needs."""
        objective = find_objective(self.kind)
        if objective is None:
            return
        problems = unmet(objective, model)
        if problems:
            raise ValueError(f"reconstruction.kind {self.kind!r} {'; '.join(problems)}")
        for tap in make_objective(model, self).taps:
            tap_number(required(model.language), tap)


def unmet(objective: type[Objective], model: RossConfig) -> list[str]:
    """What a model lacks for an objective, one phrase each."""
    problems = []
    for name, fields in objective.requires(model).items():
        component = getattr(model, name)
        if component is None:
            problems.append(f"needs model.{name}, which is not there")
            continue
        problems += [
            f"needs model.{name}.{field} {value!r}, not {getattr(component, field)!r}"
            for field, value in fields.items()
            if value is not None and getattr(component, field) != value
        ]
    return problems


def add_heads(model: RossConfig, kind: str, denoiser: dict[str, Any], regressor: dict[str, Any]) -> RossConfig:
    """A model with the heads that a kind needs; a recipe brings the target encoder itself.

    Args:
      denoiser, regressor: fields of a head that its objective leaves open, such as its width.
    """
    objective = find_objective(kind)
    needed = objective.requires(model) if objective else {}
    heads: dict[str, Any] = {}
    if "denoiser" in needed:
        heads["denoiser"] = from_dict(DenoiserConfig, {**needed["denoiser"], **denoiser}, "model.denoiser")
    if "regressor" in needed:
        heads["regressor"] = RegressorConfig(**needed["regressor"], **regressor)
    return dataclasses.replace(model, **heads)


def make_objective(model: RossConfig, settings: ReconstructionConfig, dtype: DTypeLike = "float32") -> Objective | None:
    """The objective of a run; None for `none`.

    Args:
      dtype: of a teacher's activations.
    """
    objective = find_objective(settings.kind)
    if objective is None:
        return None
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return objective.build(model, fields | dict(settings.options) | {"teacher_dtype": dtype})


def reconstructor(model: RossConfig) -> Objective | None:
    """An objective for its `reconstruct` alone, by the components that a model has; None if it makes no images."""
    for objective in OBJECTIVES.values():
        if objective.reconstruct is not Objective.reconstruct and not unmet(objective, model):
            made = objective.build(model, {})
            if type(made).reconstruct is not Objective.reconstruct:
                return made
    return None
