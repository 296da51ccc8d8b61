"""Makes the tables of plans in the README: what recipes need and how fast they would be on devices not at hand.

  python launch/tables.py --tables=costs,kinds --output=tables.md --plans=plans

costs    the language model alone, LLaVA and Ross, on 64 chips     batches   the largest batch that fits
kinds    of reconstruction                                         scaling   more chips, the same rows on each
recipes  all of them compile, for a TPU and a GPU topology

All figures are those of `launch/plan.py`. Each plan is a file in --plans, named after recipe, topology, options and
source code: the same command goes on where it was cut off, and a change of the code makes all plans anew.
"""

import dataclasses
import functools
import hashlib
import importlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ross_jax.plan.environment import prepare

prepare()

import jax  # noqa: E402
from absl import flags  # noqa: E402

from ross_jax import command_line  # noqa: E402
from ross_jax.config import UserError, freeze, nearest  # noqa: E402
from ross_jax.plan.planner import Options, plan  # noqa: E402
from ross_jax.plan.report import Report, summary  # noqa: E402
from ross_jax.plan.targets import GIB, open_target  # noqa: E402
from ross_jax.training.recipe import RunConfig  # noqa: E402

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # recipes import one another as configs.NAME

_TABLES = flags.DEFINE_list("tables", ["costs", "kinds", "batches", "scaling", "recipes"], "Which.")
_OUTPUT = flags.DEFINE_string("output", "tables.md", "The Markdown file.")
_PLANS = flags.DEFINE_string("plans", "plans", "The folder of plans.")

PARTS = "encoder=siglip,llm=qwen2_7b,stage=finetune"
PEER = {"v5e:8x8": 1.80, "v5p:4x4x4": 0.70, "v6e:8x8": 0.72}
"""Seconds that a step of a language model of this size was estimated to take elsewhere, in the same way."""
REMAT = {"v5e:8x8": "attention", "v5p:4x4x4": "none", "v6e:8x8": "attention"}
"""The fastest policy with which Ross fits."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One plan.

    Attributes:
      recipe: `NAME:ARGUMENTS` of configs/.
      rows: of a global batch; None: what the packing plan would make.
      cached: what is read from a cache.
      remat: None: the recipe's.
    """

    recipe: str
    topology: str
    rows: int | None = None
    cached: tuple[str, ...] = ()
    remat: str | None = None


@functools.cache
def source_hash() -> str:
    """Of all that a plan depends on in this repository."""
    files = sorted([*(ROOT / "ross_jax").rglob("*.py"), *(ROOT / "configs").glob("*.py")])
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()[:12]


def planned(case: Case) -> Report:
    """The plan of a case, from its file if there is one.

    Raises:
      UserError: it cannot be planned; not that it does not fit.
    """
    key = hashlib.sha256(json.dumps([dataclasses.asdict(case), source_hash()]).encode()).hexdigest()[:16]
    name, _, arguments = case.recipe.partition(":")
    path = Path(_PLANS.value) / f"{case.topology.replace(':', '-')}-{name}-{key}.json"
    if path.is_file():
        return Report(**json.loads(path.read_text()))
    print(f"{case.recipe} on {case.topology}, {case.rows or 'default'} rows", file=sys.stderr, flush=True)
    values = importlib.import_module(f"configs.{name}").get_config(*filter(None, [arguments]))
    values.step.remat = case.remat or values.step.remat
    config = freeze(RunConfig, values.to_dict())
    report = plan(config, open_target(case.topology), Options(case.recipe, rows=case.rows, cached=case.cached))
    jax.clear_caches()  # a program of a 7B model takes gigabytes
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n")
    partial.replace(path)
    return report


def _step(report: Report) -> float:
    return report.seconds.get("step", float("nan"))


def _row(*cells: Any) -> str:
    return "| " + " | ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"


def _head(*cells: str) -> list[str]:
    return [_row(*cells), _row(*("---" for _ in cells))]


def _memory(report: Report) -> str:
    return "does not compile" if report.needed is None else f"{report.needed / GIB:.2f} of {report.capacity / GIB:.2f}"


def _gained(report: Report) -> str:
    """Parameters beside the language model's, the encoder's and the projector's."""
    added = {k: v for k, v in report.parameters.items() if k not in ("language", "vision", "projector")}
    return ", ".join(f"{name} {sum(counts.values()) / 1e6:.1f} M" for name, counts in added.items()) or "-"


def costs() -> Iterator[str]:
    """The cost of pictures and of reconstruction."""
    yield "SigLIP-SO400M + Qwen2-7B, stage 2, packed rows of 2048 tokens, two per chip, 64 chips"
    yield from _head("topology", "recipe", "remat", "step, s", "of the peer's", "of LLaVA's", "GiB per chip", "MFU")
    recipes = (
        ("language model alone", "language_only", ()),
        ("LLaVA", "llava", ()),
        ("Ross, cached targets", "ross", ("targets",)),
        ("Ross, live", "ross", ()),
    )
    for topology, peer in PEER.items():
        llava = _step(planned(Case(f"llava:{PARTS}", topology, 128, (), REMAT[topology])))
        for label, name, cached in recipes:
            found = planned(Case(f"{name}:{PARTS}", topology, 128, cached, REMAT[topology]))
            ratios = (f"{_step(found) / peer:.2f}", f"{_step(found) / llava:.3f}")
            yield _row(topology, label, found.remat, _step(found), *ratios, _memory(found), f"{found.mfu or 0:.1%}")


def kinds() -> Iterator[str]:
    """What each kind of reconstruction costs."""
    yield "Kinds of reconstruction, v5e:8x8, one row per chip"
    yield from _head("kind", "parameters added", "step, s", "of LLaVA's", "GiB per chip")
    base = _step(planned(Case(f"ross:{PARTS},kind=none", "v5e:8x8", 64)))
    for kind in ("none", "pixel", "latent", "latent2pixel", "denoise"):
        found = planned(Case(f"ross:{PARTS},kind={kind}", "v5e:8x8", 64))
        yield _row(kind, _gained(found), _step(found), f"{_step(found) / base:.3f}", _memory(found))


def batches() -> Iterator[str]:
    """How many rows fit."""
    yield "The largest batch that fits, rows of 2048 tokens, everything recomputed"
    yield from _head("model", "topology", "rows per device", "step, s", "GiB per device", "MFU")
    for llm, topology in (("vicuna_13b", "v5e:8x8"), ("qwen2_7b", "v5e:4x4"), ("qwen2_7b", "h100:1x1x8")):
        rows, found = largest(f"ross:encoder=siglip,llm={llm},stage=finetune", topology)
        mfu = f"{found.mfu:.1%}" if found.mfu else "-"
        yield _row(llm, topology, rows or "none fits", _step(found), _memory(found), mfu)


def largest(recipe: str, topology: str) -> tuple[int, Report]:
    """Rows per device of the largest batch that fits, 0 if none does, and its plan.

    Memory is nearly a straight line in the rows, so that the first two plans tell where to look.
    """
    devices = len(open_target(topology).devices)

    def at(rows: int) -> Report:
        return planned(Case(recipe, topology, rows * devices, (), "full"))

    one = at(1)
    if not one.fits:
        return 0, one
    two = at(2)
    if not two.fits or two.needed is None or one.needed is None:
        return 1, one
    rows = max(2, int(1 + (two.capacity - one.needed) / max(1, two.needed - one.needed)))
    while not at(rows).fits:
        rows -= 1
    while at(rows + 1).fits:
        rows += 1
    return rows, at(rows)


def scaling() -> Iterator[str]:
    """More and more chips."""
    yield "Ross with cached targets, two rows per chip, on more and more chips"
    yield from _head("topology", "chips", "mesh", "step, s", "of 16 chips'", "GiB per chip")
    topologies = (("v5p:2x2x4", 16), ("v5p:4x4x4", 64), ("v5p:4x8x8", 256), ("v5p:8x8x16", 1024))
    base = _step(planned(Case(f"ross:{PARTS}", "v5p:2x2x4", 32, ("targets",))))
    for topology, chips in topologies:
        found = planned(Case(f"ross:{PARTS}", topology, 2 * chips, ("targets",)))
        sizes = " ".join(f"{axis}={size}" for axis, size in found.mesh.items())
        yield _row(topology, chips, sizes, _step(found), f"{_step(found) / base:.3f}", _memory(found))


def recipes() -> Iterator[str]:
    """That they compile; whether they fit."""
    yield "Recipes compile for a TPU and a GPU topology"
    yield from _head("recipe", "v5p:4x4x4", "h100:1x1x8")
    full = [
        f"encoder={e},llm={m}" for e in ("siglip", "clip") for m in ("qwen2_7b", "vicuna_7b", "vicuna_13b", "llama3_8b")
    ]
    names = [f"ross:{parts},stage={stage}" for parts in full for stage in ("pretrain", "finetune")]
    names += [f"ross:{PARTS},kind={kind}" for kind in ("pixel", "latent", "latent2pixel")]
    names += [f"ross:{PARTS},kind=latent,teacher={teacher}" for teacher in ("siglip", "clip", "dinov2")]
    names += [f"ross:{PARTS},vision=trained", f"llava:{PARTS}", f"language_only:{PARTS}"]
    names += ["imagenet_denoiser:encoder=siglip,llm=qwen2_7b"]
    for name in names:
        cells = [summary(planned(Case(name, topology))) for topology in ("v5p:4x4x4", "h100:1x1x8")]
        yield _row(f"`{name}`", *cells)


TABLES: dict[str, Callable[[], Iterator[str]]] = {
    "costs": costs,
    "kinds": kinds,
    "batches": batches,
    "scaling": scaling,
    "recipes": recipes,
}


def main() -> int:
    logging.getLogger("ross_jax.sharding").setLevel(logging.WARNING)
    lines = ["All figures are estimates of launch/plan.py; nothing was run.", ""]
    try:
        for name in _TABLES.value:
            if name not in TABLES:
                raise UserError(f"--tables={name}: no such table{nearest(name, TABLES)}; there are {', '.join(TABLES)}")
        for name in _TABLES.value:
            for line in TABLES[name]():
                lines.append(line if line.startswith("|") else f"**{line}**\n")
                Path(_OUTPUT.value).write_text("\n".join(lines) + "\n")
            lines.append("")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    command_line.run(main, [])
