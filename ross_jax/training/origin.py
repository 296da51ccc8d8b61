"""Where a run's first parameters come from: model directories, chance, or a step of another run (`--from`)."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ross_jax import checkpoints
from ross_jax.config import ConfigError, UserError, nearest, to_dict
from ross_jax.data.precomputed import differences
from ross_jax.directories import CheckpointError, DamagedError
from ross_jax.models.ross import HEADS
from ross_jax.storage import location
from ross_jax.training.recipe import RunConfig
from ross_jax.training.record import RECORD, parse_record, recorded_config
from ross_jax.training.state import TrainState
from ross_jax.tree import flatten

RESETS = ("optimizer", "step")
_STATE = ("freeze.", "optimizer.groups", "optimizer.algorithm", "model.", "lora.")
"""Beginnings of the fields that settle which moments an optimizer has."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """A step of another run, with which a run begins.

    Attributes:
      folder: the other run's directory.
      step: number of its steps that count.
      reset: what begins anew: `optimizer` (its moments), `step` (number of the step, and with it the position in the
        data and the schedule of the learning rate).
      record: the other run's record.
    """

    folder: Path
    step: int
    reset: tuple[str, ...]
    record: Mapping[str, Any]

    @property
    def first_step(self) -> int:
        """Number of steps that count as done in the run that begins here."""
        return 0 if "step" in self.reset else self.step

    @property
    def config(self) -> RunConfig:
        return recorded_config(self.record, self.folder / RECORD)

    def describe(self) -> dict[str, Any]:
        """What the new run's record says of its ancestors, the nearest one outermost."""
        names = {"run": str(self.folder.resolve()), "step": self.step, "reset": list(self.reset)}
        return names | ({"from": self.record["from"]} if "from" in self.record else {})

    def differences(self, config: RunConfig) -> list[str]:
        """A line for each field in which a run of this config differs."""
        return differences(to_dict(self.config), to_dict(config))

    def same_rows(self, config: RunConfig) -> bool:
        """Whether a run of this config reads the same conversations in the same order."""
        fields = ("data.sources", "data.packing", "data.batch", "data.seed", "text.", "image_mode", "model.vision.")
        return not any(line.startswith(fields) for line in self.differences(config))

    def optimizer_state(self, config: RunConfig, state: TrainState) -> Any:
        """The optimizer's state of the other run, for a run of this config.

        Args:
          state: shapes, dtypes and shardings of the new run's state.

        Raises:
          UserError: it is of other parameters or another algorithm, or cannot be read.
        """
        differing = [line for line in self.differences(config) if line.startswith(_STATE)]
        if differing:
            listed = "\n  ".join(differing)
            raise UserError(
                f"--from: the optimizer's state of {self.folder} does not fit this config:\n  {listed}\n"
                "Add --reset=optimizer, which begins with a new one"
            )
        return checkpoints.restore_optimizer(self.folder / "steps" / str(self.step), state)["opt_state"]


def find_origin(text: str, reset: Sequence[str] = ()) -> Origin:
    """The origin that `--from=RUN` or `--from=RUN@STEP`, and `--reset`, name. Without a step it is the newest one.

    Raises:
      UserError: no such run or step, or nothing that can be reset.
    """
    for name in reset:
        if name not in RESETS:
            raise ConfigError(f"--reset={name}: cannot be reset{nearest(name, RESETS)}; one of {list(RESETS)}")
    folder, wanted = _split(text)
    record = parse_record(folder / RECORD)
    if record is None:
        raise CheckpointError(f"--from={text}: no {RECORD} in {folder}; give the directory of a run")
    steps = checkpoints.sound_steps(folder)
    if not steps or wanted not in (None, *steps):
        there = f"there are steps {steps}" if steps else "no step is complete"
        raise CheckpointError(f"--from={text}: no step {'' if wanted is None else wanted} in {folder}; {there}")
    return Origin(folder, steps[-1] if wanted is None else wanted, tuple(reset), record)


def _split(text: str) -> tuple[Path, int | None]:
    """Directory and step of `RUN@STEP` or `RUN`."""
    path, _, number = text.rpartition("@")
    return (location(path), int(number)) if path and number.isdecimal() else (location(text), None)


def begin_with(text: str, reset: Sequence[str], folder: Path) -> Origin | None:
    """`find_origin` for a new run in `folder`; None for one that has begun with this origin and continues by itself.

    So the same command continues a run although the other one has gone on, or has gone.

    Raises:
      UserError: as `find_origin`; or the run in `folder` has another origin.
    """
    try:
        record = parse_record(folder / RECORD)
    except DamagedError:
        return None  # the run names it
    if not record:
        return find_origin(text, reset)
    (other, step), recorded = _split(text), record.get("from")
    if recorded is None or recorded["run"] != str(other.resolve()) or step not in (None, recorded["step"]):
        raise _another_origin(recorded, folder)
    if recorded["reset"] != list(reset):
        raise _another_origin(recorded, folder)
    return None


def _another_origin(recorded: Mapping[str, Any] | None, folder: Path) -> UserError:
    reset = f", --reset={','.join(recorded['reset'])}" if recorded and recorded["reset"] else ""
    was = f"began with step {recorded['step']} of {recorded['run']}{reset}" if recorded else "did not begin with a run"
    return UserError(f"--from: the run in {folder} {was}; use another directory, or leave --from out to continue it")


def recorded_origin(record: Mapping[str, Any], given: Origin | None, folder: Path) -> Origin | None:
    """The origin of a run that has begun before, or that begins now.

    Args:
      record: of the run; empty for a new one.
      given: from the command line.

    Raises:
      UserError: the run in `folder` has another origin than the one that is given.
    """
    if not record:
        return given
    recorded = record.get("from")
    if given is not None and (recorded is None or given.describe() != recorded):
        raise _another_origin(recorded, folder)
    if given is None and recorded and checkpoints.latest_step(folder) is None:
        return find_origin(f"{recorded['run']}@{recorded['step']}", recorded["reset"])
    return given


def at_step(opt_state: Any, step: int) -> Any:
    """An optimizer's state whose learning rates are those after `step` steps."""

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, optax.ScaleByScheduleState):
            return leaf
        return leaf._replace(count=jnp.full_like(leaf.count, step))

    return jax.tree.map(place, opt_state, is_leaf=lambda leaf: isinstance(leaf, optax.ScaleByScheduleState))


def refuse_random(config: RunConfig, tree: Mapping[str, Any], random: Collection[str]) -> None:
    """Refuses a run in which a component would be random that is expected to have been trained before.

    Those are all but the head that learns to reconstruct and, where the language model is frozen, the projector.

    Args:
      tree: parameters by component, or their shapes.
      random: components that no model directory has.

    Raises:
      ConfigError: `init_random` does not name them.
    """
    trains = any(config.freeze.trains(f"language/{path}") for path in flatten(tree["language"]))
    allowed = {*config.init_random, *HEADS, *([] if trains else ["projector"])}
    found = [name for name in tree if tree[name] and name in random and name not in allowed]
    if found:
        listed = ", ".join(map(repr, [*config.init_random, *found]))
        raise ConfigError(
            f"config.init: no model directory has {' and '.join(found)}, which would be random. Name one that has: "
            "what launch/convert.py import made and, in stage 2, also the run of stage 1. If random is what you want: "
            f'--config.init_random="({listed},)"'
        )
