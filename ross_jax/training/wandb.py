"""A run's metrics on Weights & Biases. The only file that knows wandb, which the extra `wandb` installs."""

import os
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ross_jax.checkpoints import writing
from ross_jax.config import ConfigError
from ross_jax.storage import is_remote

_ID = "wandb_id"
"""File of a run's directory with the id under which later starts go on."""


class WandbRun:
    """Sends lines of metrics and images. WANDB_MODE=offline keeps them in `wandb/` of the run's directory.

    Raises:
      ConfigError: wandb is not installed, or cannot begin, as without a key.
    """

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any]):
        """Begins the W&B run of the run in `folder`, or goes on with it."""
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("config.loop.wandb: wandb is not installed; pip install -e '.[wandb]'") from error
        entity, _, name = project.rpartition("/")
        path = folder / _ID
        identity = path.read_text().strip() if path.is_file() else secrets.token_hex(4)
        with writing(path, folder):
            path.write_text(identity + "\n")
        os.environ.setdefault("WANDB_SILENT", "true")
        if is_remote(folder) and os.environ.get("WANDB_MODE") == "offline":
            raise ConfigError(f"config.loop.wandb: with WANDB_MODE=offline, {folder} must be on this machine")
        place = tempfile.gettempdir() if is_remote(folder) else str(folder)
        options = {"id": identity, "resume": "allow", "dir": place, "name": folder.name, "config": dict(config)}
        try:
            self._run = wandb.init(entity=entity or None, project=name, **options)
        except Exception as error:  # wandb raises errors of many kinds, of its own and of its HTTP library
            reason = str(error).partition("\n")[0][:300]
            raise ConfigError(
                f"config.loop.wandb: {project!r}: {reason}; log in with `wandb login`, or set WANDB_MODE=offline"
            ) from error
        self._image = wandb.Image
        # A start that does steps again writes them once more, under the same step.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Sends a line of numbers."""
        self._run.log({"step": step, **values})

    def image(self, name: str, step: int, grid: Any) -> None:
        """Sends an image, uint8[height, width, 3]."""
        self._run.log({"step": step, name: self._image(grid)})

    def close(self) -> None:
        """Sends what is left."""
        self._run.finish()
