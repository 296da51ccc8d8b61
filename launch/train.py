"""Trains a run, or continues it.

  python launch/train.py --config=configs/ross.py:encoder=siglip,llm=qwen2_7b,stage=finetune --workdir=runs/ross-7b \
      --config.data.batch=64 --config.loop.save=1000

On several hosts, start the same command on each with --distributed. JAX recognises Cloud TPU, Slurm, Open MPI and
Kubernetes. Elsewhere, add --coordinator=HOST:PORT --processes=N --process=I, with another I on each host.
launch/cluster/ starts the command on pods, clusters and lists of hosts.
"""

import contextlib
import sys
from pathlib import Path

import jax
from absl import flags

from ross_jax import command_line
from ross_jax.config import UserError, from_dict
from ross_jax.console import talk, without_native_output
from ross_jax.evaluation.reconstruction import make_callbacks
from ross_jax.process import say
from ross_jax.storage import location
from ross_jax.training import agreement
from ross_jax.training.origin import begin_with
from ross_jax.training.profile import Tracer, parse_steps
from ross_jax.training.recipe import RunConfig, relative_paths
from ross_jax.training.run import Run, flatten_config, only_writer
from ross_jax.training.watch import StallWatch

_CONFIG = command_line.define_recipe()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run's directory, shared by all hosts, or gs://BUCKET/NAME.", required=True
)
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Train together with the other processes of a cluster.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where JAX does not find it.")
_PROCESSES = flags.DEFINE_integer(
    "processes", None, "Processes of the cluster, where JAX does not count them.", 1, 2**20
)
_PROCESS = flags.DEFINE_integer(
    "process", None, "Number of this process, from 0, where JAX does not know it.", 0, 2**20
)

_START_TIMEOUT = flags.DEFINE_integer(
    "start_timeout", 300, "Seconds that processes wait for one another to start.", 1, 10**6
)
_STOPPED_STATUS = flags.DEFINE_integer(
    "stopped_status", 0, "Exit status of a run that a signal ended before its end.", 0, 255
)
_LOST_HOST_TIMEOUT = flags.DEFINE_integer(
    "lost_host_timeout", 100, "Seconds within which all processes end, with status 75, after one is lost.", 20, 10**6
)
_STALL_TIMEOUT = flags.DEFINE_integer(
    "stall_timeout",
    0,
    "Seconds without a step after which the run ends with status 75. 0: 20 times the median step, at least 300.",
    0,
    10**6,
)
_ACCEPT = flags.DEFINE_bool("accept_changed_data", False, "Continue although the text of the data has changed.")
_ADOPT = flags.DEFINE_bool(
    "adopt", False, "Continue steps whose run.json is missing or damaged: it is rebuilt from this config."
)
_FROM = flags.DEFINE_string(
    "from", None, "RUN or RUN@STEP: a new run begins with this step of another run, its optimizer and its position."
)
_RESET = flags.DEFINE_list("reset", [], "What of --from begins anew: optimizer, step, or both.")
_PROFILE = flags.DEFINE_string("profile", None, "START:COUNT: writes an xprof trace of these steps to WORKDIR/profile.")
_CACHE = flags.DEFINE_string(
    "compilation_cache",
    None,
    "Directory of compiled programs, or none. Without it WORKDIR/compiled, on the CPU none: XLA's programs for one CPU "
    "may crash on another.",
)


def use_cache(folder: Path) -> None:
    """Keeps compiled programs, so that the same command need not compile them again, on other hosts either."""
    if _CACHE.value:
        jax.config.update("jax_compilation_cache_dir", None if _CACHE.value == "none" else str(location(_CACHE.value)))
    elif not jax.config.values["jax_compilation_cache_dir"] and jax.default_backend() != "cpu":
        jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))


def main() -> int:
    # On virtual CPU devices, overlapping steps may wait for each other's threads for ever.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    with without_native_output() if _DISTRIBUTED.value else contextlib.nullcontext():
        try:
            return train()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            if _DISTRIBUTED.value:
                agreement.leave(error)
            return 1
        except Exception as error:
            if _DISTRIBUTED.value:
                agreement.leave_unexpectedly(error, _LOST_HOST_TIMEOUT.value)
            raise


def train() -> int:
    """Opens the run and trains it. Returns the exit status."""
    traced = parse_steps(_PROFILE.value) if _PROFILE.value is not None else None
    config, folder = from_dict(RunConfig, _CONFIG.value.to_dict()), location(_WORKDIR.value)
    if _DISTRIBUTED.value:
        place = _COORDINATOR.value, _PROCESSES.value, _PROCESS.value
        agreement.join(*place, _START_TIMEOUT.value, _LOST_HOST_TIMEOUT.value)
        talk(agreement.is_first())
        agreement.enter_directory(relative_paths(config, [_WORKDIR.value, _FROM.value]), _START_TIMEOUT.value)
    facts = {f"config.{name}": value for name, value in flatten_config(config).items()}
    facts |= {"--from": _FROM.value, "--reset": _RESET.value}
    agreement.agree(facts | agreement.code_version(), _START_TIMEOUT.value)
    agreement.check_shared(folder, _START_TIMEOUT.value)
    use_cache(folder)
    if _RESET.value and not _FROM.value:
        raise UserError("--reset: only with --from, which names the run that is begun with")
    begin = begin_with(_FROM.value, _RESET.value, folder) if _FROM.value else None
    with contextlib.ExitStack() as stack:
        stack.enter_context(only_writer(folder))
        run = Run(config, folder, _START_TIMEOUT.value, _ACCEPT.value, _ADOPT.value, begin)
        stack.enter_context(StallWatch(run.clock, float(_STALL_TIMEOUT.value)))
        callbacks = make_callbacks(config, run.mesh, folder)
        if traced:
            callbacks.append(stack.enter_context(Tracer(folder / "profile", *traced, run.step, run.steps)))
        done = run.train(callbacks)
    if agreement.is_first():
        skipped = f", {run.data.broken} broken samples skipped" if run.data.broken else ""
        say(f"{_WORKDIR.value}: {done} of {run.steps} steps{skipped}: {run.ended}", sys.stdout)
    return 0 if done == run.steps else _STOPPED_STATUS.value


if __name__ == "__main__":
    command_line.run(main)
