"""Trains, or continues, a run.

  python launch/train.py --config=configs/ross.py:encoder=siglip,llm=qwen2_7b,stage=finetune --workdir=runs/ross-7b \
      --config.data.batch=64 --config.loop.save=1000

On several hosts start the same command on each with --distributed (or JAX's environment variables of the cluster).
"""

import sys
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import config_flags

from ross_jax.config import UserError, freeze
from ross_jax.training.recipe import RunConfig
from ross_jax.training.run import Run

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes import one another as configs.NAME

_CONFIG = config_flags.DEFINE_config_file("config", None, "A recipe of configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's directory, shared by all hosts.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other hosts of a cluster that JAX recognises.")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        print(f"error: unexpected arguments {argv[1:]}", file=sys.stderr)
        return 1
    try:
        if _DISTRIBUTED.value:
            jax.distributed.initialize()
        run = Run(freeze(RunConfig, _CONFIG.value.to_dict()), Path(_WORKDIR.value))
        done = run.train()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{_WORKDIR.value}: {done} of {run.steps} steps")
    return 0


def parse(argv: list[str]) -> list[str]:
    """Reads the flags, which runs the recipe's file too; whatever is wrong with either ends in one line."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, UserError, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
        print(f"error: {' '.join(map(str, error.args)) or error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse)
