"""A recipe and a topology to a report."""

import dataclasses
from pathlib import Path
from typing import Literal

from ross_jax.config import ConfigError
from ross_jax.plan.cost import estimate
from ross_jax.plan.hlo import parse
from ross_jax.plan.program import DoesNotFit, compile_program, generate_program, train_program
from ross_jax.plan.report import Report, complete, describe, method
from ross_jax.plan.targets import Target
from ross_jax.plan.workload import Workload, assume
from ross_jax.sharding import make_mesh
from ross_jax.training.recipe import RunConfig

_STEPS = 5000
"""Steps of a run whose data set's size is unknown: they only shape the learning rate's schedule."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What a plan is asked for, beside recipe and topology.

    Attributes:
      recipe: its name in reports.
      rows, tokens, pictures, epoch: as in `assume`.
      cached: parts that the run reads from a cache: `targets`, `features`.
      prompt, new_tokens: of generation.
      dump: folder that keeps the optimised HLO.
    """

    recipe: str
    objective: Literal["train", "generate"] = "train"
    rows: int | None = None
    tokens: float | None = None
    images: float | None = None
    epoch: int | None = None
    cached: tuple[str, ...] = ()
    prompt: int = 1024
    new_tokens: int = 256
    dump: Path | None = None


def plan(config: RunConfig, target: Target, options: Options) -> Report:
    """Compiles the recipe's program for the topology and reads what it costs.

    Raises:
      ConfigError: a mesh or rows that do not fit the topology.
      UserError: the compiler failed other than for lack of memory, which is a report that says so.
    """
    mesh = make_mesh(config.mesh, target.devices)
    replicas = mesh.shape["data"] * mesh.shape["fsdp"]
    training = options.objective == "train"
    if training:
        multiple = replicas * config.step.accumulate
        workload = assume(config, multiple, options.rows, options.tokens, options.images, options.epoch)
        steps = int(workload.epoch / workload.conversations * config.data.epochs) if workload.epoch else _STEPS
        program = train_program(config, mesh, workload.rows, max(1, steps), options.cached)
    else:
        rows = options.rows or replicas
        if rows % replicas:
            raise ConfigError(f"--rows={rows}: must be a multiple of {replicas}, the devices that share a batch")
        if config.model.vision.num_tokens > options.prompt:
            raise ConfigError(f"--prompt={options.prompt}: a picture alone has {config.model.vision.num_tokens} tokens")
        lines = [f"{rows} prompts (--rows) of {options.prompt} tokens with a picture (--prompt)"]
        lines.append(f"{options.new_tokens} new tokens of each (--new_tokens)")
        workload = Workload(rows, float(rows), float(rows * options.prompt), float(rows), None, lines)
        program = generate_program(config, mesh, rows, options.prompt, options.new_tokens)
    known = describe(
        options.recipe, options.objective, config, target, mesh, workload, program, options.cached if training else ()
    )
    try:
        compiled = compile_program(program, target)
    except DoesNotFit as error:
        needed = int(error.needed) if error.needed else None
        return Report(**known | {"needed": needed}, method=method(target), notes=[])
    if options.dump is not None:
        options.dump.mkdir(parents=True, exist_ok=True)
        sizes = "x".join(str(size) for size in mesh.shape.values())
        name = (
            f"{options.objective}-{target.name.replace(':', '-')}-{sizes}-{config.step.remat}-{workload.rows}.hlo.txt"
        )
        (options.dump / name).write_text(compiled.text)
    module = parse(compiled.text)
    cost = estimate(module, target.timing(mesh))
    new_tokens = 0 if training else options.new_tokens
    return complete(known, config, target, mesh, workload, compiled, module, cost, new_tokens)
