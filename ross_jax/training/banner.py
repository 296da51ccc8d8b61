"""What a run says of itself when it starts: devices, components, data, and from which step it goes on.

runs/ross-7b: 64 x TPU v5 lite, 16 processes, mesh data=1 fsdp=64 tensor=1; 12 of 410 arrays (0.01 GB) replicated
  vision        428.2 M  bfloat16  frozen   <- models/start
  language    7,615.6 M  float32   trained  <- models/start
  denoiser       67.9 M  float32   trained  <- random
data: 737,000 conversations with 729,000 images; 0 do not fit, 0 broken
  5,757 steps (1 epoch) of 64 rows, about 128.0 conversations; rows are 97 % full
"""

import math
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from ross_jax.config import to_dict
from ross_jax.console import say
from ross_jax.data.pipeline import Pipeline
from ross_jax.data.precomputed import differences
from ross_jax.training.goodput import read_lines
from ross_jax.training.optimizer import learning_rates
from ross_jax.training.origin import Origin
from ross_jax.training.recipe import RunConfig
from ross_jax.training.state import FreezeConfig, Tree
from ross_jax.tree import flatten

_MOST = 8
"""Most differing fields that are listed."""


def say_start(config: RunConfig, folder: Path, mesh: Mesh, tree: Tree) -> None:
    """Says which devices train, and how parameters are split among them."""
    kind, processes = jax.devices()[0].device_kind, jax.process_count()
    axes = " ".join(f"{name}={size}" for name, size in mesh.shape.items())
    leaves = flatten(tree).values()
    whole = [leaf for leaf in leaves if leaf.sharding.is_fully_replicated]
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in whole) / 1e9
    split = f"; {len(whole)} of {len(leaves)} arrays ({size:.2f} GB) replicated" if mesh.size > 1 else ""
    plural = "" if processes == 1 else "es"
    say(f"{folder}: {mesh.size} x {kind}, {processes} process{plural}, mesh {axes}{split}")


def say_components(tree: Tree, freeze: FreezeConfig, origins: Mapping[str, str]) -> None:
    """Says of each component how large it is, whether it trains, and where its parameters come from."""
    for name in filter(tree.get, tree):
        flat = flatten({name: tree[name]})
        sizes = {path: math.prod(leaf.shape) for path, leaf in flat.items()}
        trained = sum(size for path, size in sizes.items() if freeze.trains(path))
        total = sum(sizes.values())
        share = "frozen" if not trained else "trained" if trained > 0.99 * total else f"{trained / total:.1%} trained"
        dtypes = " and ".join(sorted({str(leaf.dtype) for leaf in flat.values()}))
        say(f"  {name:<11} {total / 1e6:>9,.1f} M  {dtypes:<8}  {share:<7}  <- {origins.get(name, 'random')}")


def say_data(data: Pipeline) -> None:
    """Says what the data is, and how many steps it makes."""
    lengths, plan, epochs = data.lengths, data.plans[0], len(data.plans)
    figures = plan.statistics(lengths, data.config.packing)
    images = int(np.sum(lengths.images[plan.samples]))
    say(
        f"data: {len(plan.samples):,} conversations with {images:,} images; {plan.dropped:,} do not fit, "
        f"{plan.unusable:,} broken"
    )
    say(
        f"  {data.steps:,} steps ({epochs} epoch{'' if epochs == 1 else 's'}) of {data.rows_per_step} rows, about "
        f"{figures['conversations_per_step']:.1f} conversations; rows are {figures['efficiency']:.0%} full"
    )


def say_continued(folder: Path, step: int, steps: int) -> None:
    """Says from which step a run goes on, and what it does again. Called before its metrics are cut."""
    lines, _ = read_lines(folder / "metrics.jsonl")
    last = max((int(line["step"]) for line in lines), default=step)
    again = f"; steps {step + 1} to {last} are done again" if last > step else ""
    say(f"continues from step {step} of {steps}{again}" if step < steps else f"all {steps} steps are done")


def say_changes(before: RunConfig, config: RunConfig, step: int, data: Pipeline) -> None:
    """Says which fields differ from the last start's and, with other epochs, what becomes of the learning rate."""
    _say_lines("changed since the last start", differences(to_dict(before), to_dict(config)))
    if before.data.epochs == config.data.epochs or step >= data.steps:
        return
    old = data.steps_of(before.data.epochs)
    say(f"{data.steps} steps in all instead of {old}; the learning rate falls to 0 at step {data.steps}:")
    for name, rate in learning_rates(config.optimizer, data.steps)(np.int32(step)).items():
        then = learning_rates(config.optimizer, old)(np.int32(step))[name]
        say(f"  {name} of step {step + 1}: {float(rate):.3g}, was {float(then):.3g}")


def say_origin(origin: Origin, config: RunConfig, step: int, steps: int) -> None:
    """Says with which step of which run a run begins, and in which fields the two differ."""
    kept = "with a new optimizer" if "optimizer" in origin.reset else "with its optimizer"
    say(f"begins with step {origin.step} of {origin.folder} {kept}; step {step + 1} of {steps} is next")
    _say_lines(f"differs from {origin.folder}", origin.differences(config))


def _say_lines(title: str, lines: list[str]) -> None:
    if lines:
        more = [f"and {len(lines) - _MOST} more"] if len(lines) > _MOST else []
        say("\n  ".join([f"{title}:", *lines[:_MOST], *more]))
