"""Trains, or continues, a run.

  python launch/train.py --config=configs/ross.py:encoder=siglip,llm=qwen2_7b,stage=finetune --workdir=runs/ross-7b \
      --config.data.batch=64 --config.loop.save=1000

On several hosts start the same command on each with --distributed. Where JAX does not recognise the cluster (it knows
Cloud TPU, Slurm, Open MPI and Kubernetes), add --coordinator=HOST:PORT --processes=N --process=I, another I on each.
"""

import os
import sys
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import config_flags

from ross_jax.config import ConfigError, UserError, freeze
from ross_jax.evaluation.reconstruction import make_evaluator
from ross_jax.inference.reconstruct import PictureDrawer
from ross_jax.objectives.reconstruction import reconstructor
from ross_jax.training.recipe import RunConfig
from ross_jax.training.run import Run

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes import one another as configs.NAME

_CONFIG = config_flags.DEFINE_config_file("config", None, "A recipe of configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's directory, shared by all hosts.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Train together with the other processes of a cluster.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where JAX does not find it.")
_PROCESSES = flags.DEFINE_integer("processes", None, "Processes of the cluster, where JAX does not count them.")
_PROCESS = flags.DEFINE_integer("process", None, "Number of this one, from 0, where JAX does not know it.")


def join() -> None:
    """Finds the other processes; raises ConfigError if that fails."""
    try:
        jax.distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"--distributed: {error} Set --coordinator, --processes and --process") from error


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        print(f"error: unexpected arguments {argv[1:]}", file=sys.stderr)
        return 1
    # When one of tensorstore's writes fails, the others still in flight call back into a closed event loop, each with a
    # traceback on stderr.
    sys.unraisablehook = lambda _: None
    # On virtual CPU devices, steps that overlap may wait for one another's threads for ever.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        if _DISTRIBUTED.value:
            join()
        config = freeze(RunConfig, _CONFIG.value.to_dict())
        run = Run(config, Path(_WORKDIR.value))
        draws = config.reconstruction.kind != "none" and reconstructor(config.model) is not None
        draw = PictureDrawer(config.model, run.mesh, config.step.dtype) if draws else None
        done = run.train(draw=draw, evaluate=make_evaluator(config, run.mesh))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if _DISTRIBUTED.value:
            os._exit(1)  # at exit JAX waits, for minutes, until the others leave too; they wait for this one
        return 1
    skipped = f", {run.data.broken} broken samples skipped" if run.data.broken else ""
    print(f"{_WORKDIR.value}: {done} of {run.steps} steps{skipped}")
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
