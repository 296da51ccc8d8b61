"""Training of one recipe after another, as the demo's launchers do it."""

from pathlib import Path

from ross_jax.console import say
from ross_jax.evaluation.reconstruction import make_callbacks
from ross_jax.training.recipe import RunConfig
from ross_jax.training.run import Run, only_writer


class Interrupted(Exception):
    """A signal ended a run early. The run has saved a checkpoint and can be continued."""


def train(config: RunConfig, folder: Path) -> None:
    """Trains a run to its end in `folder`, continuing what is there.

    Raises:
      Interrupted: a signal ended the run before its last step.
      UserError: whatever `Run` raises.
    """
    say(f"{folder}: training")
    with only_writer(folder):
        run = Run(config, folder)
        if run.train(make_callbacks(config, run.mesh, folder)) < run.steps:
            raise Interrupted
