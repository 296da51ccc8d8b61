"""How the demo's launchers run recipes one after another."""

import sys
from pathlib import Path

from ross_jax.evaluation.reconstruction import make_evaluator
from ross_jax.training.recipe import RunConfig
from ross_jax.training.run import Run


class Interrupted(Exception):
    """A signal ended a run early; what it saved is continued from."""


def say(text: str) -> None:
    """Progress goes to stderr, so that stdout stays a result."""
    print(text, file=sys.stderr, flush=True)


def train(config: RunConfig, folder: Path) -> None:
    """Trains a recipe to its end, or continues it.

    Raises:
      Interrupted: a signal ended it before.
      UserError: as `Run`.
    """
    say(f"{folder}: training")
    run = Run(config, folder)
    if run.train(evaluate=make_evaluator(config, run.mesh)) < run.steps:
        raise Interrupted
