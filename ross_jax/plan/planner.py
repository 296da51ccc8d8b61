"""Makes a report from a recipe and a topology."""

from pathlib import Path

from ross_jax.plan.cost import estimate
from ross_jax.plan.hlo import parse
from ross_jax.plan.program import Compiled, DoesNotFit, Job, compile_program, make_job
from ross_jax.plan.report import Report, complete, describe
from ross_jax.plan.targets import Target
from ross_jax.plan.workload import Options
from ross_jax.training.recipe import RunConfig


def plan(config: RunConfig, target: Target, options: Options) -> Report:
    """Compiles the recipe's program for the topology and reads what it costs.

    Raises:
      ConfigError: a mesh, rows or a prompt that do not fit recipe or topology.
      UserError: the compiler failed other than for lack of memory. A program that lacks memory has a report.
    """
    job = make_job(config, target, options)
    try:
        compiled = compile_program(job.program, target)
    except DoesNotFit as error:
        return describe(job, int(error.needed) if error.needed else None)
    if options.dump is not None:
        dump(job, compiled, options.dump)
    module = parse(compiled.text)
    return complete(job, compiled, module, estimate(module, target.timing(job.mesh)))


def dump(job: Job, compiled: Compiled, folder: Path) -> None:
    """Writes the optimised HLO to a file whose name tells what was planned."""
    sizes = "x".join(str(size) for size in job.mesh.shape.values())
    topology = job.target.name.replace(":", "-")
    name = f"{job.options.objective}-{topology}-{sizes}-{job.config.step.remat}-{job.workload.rows}.hlo.txt"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(compiled.text)
