"""Makes the tables of plans in launch/RESULTS.md: what recipes need, and how fast they would be on devices not at hand.

  python launch/tables.py --tables=costs,kinds                       two tables: hours on two cores
  python launch/tables.py --tables=costs --only=v5e:8x8              the rows whose names contain this text
  python launch/tables.py --tables=costs --only="v5e:8x8 Ross, live"

costs    the language model alone, LLaVA and Ross, on 64 chips     batches   the largest batch that fits
kinds    of reconstruction                                         scaling   more chips, the same rows on each
recipes  all of them compile, for a TPU and a GPU topology          small     stage 2 on one GPU, or on eight chips
paper    both stages of Ross-7B at the paper's batches

The figures are those of `launch/plan.py`. Rows that are not remade stay as they are, and so does everything else in the
file. Each plan is a file in --plans, named after recipe, topology, options, source code and compilers: the same command
goes on where it was cut off, and a change of the code makes all plans anew.
"""

import functools
import hashlib
import logging
import sys
from pathlib import Path

import jax
from absl import flags

from ross_jax import command_line
from ross_jax.config import UserError, nearest
from ross_jax.objectives.reconstruction import NONE, OBJECTIVES, ReconstructionConfig
from ross_jax.plan.plans import Case, Plans
from ross_jax.plan.report import Report
from ross_jax.plan.results import Table, origin, update
from ross_jax.plan.search import largest_batch
from ross_jax.plan.targets import GIB, open_target
from ross_jax.plan.text import summary
from ross_jax.storage import location
from ross_jax.training.recipe import RunConfig

ROOT = Path(__file__).parents[1]

_TABLES = flags.DEFINE_list(
    "tables", ["costs", "kinds", "batches", "scaling", "paper", "small", "recipes"], "Tables to make."
)
_ONLY = flags.DEFINE_string("only", "", "Make the rows whose names contain this text, as v5e:8x8.")
_OUTPUT = flags.DEFINE_string("output", str(ROOT / "launch" / "RESULTS.md"), "The Markdown file.")
_PLANS = flags.DEFINE_string("plans", "runs/plans", "The folder of plans.")

STAGES = ("pretrain", "finetune")
PARTS = "encoder=siglip,llm=qwen2_7b,stage=finetune"
PEER = {"v5e:8x8": 1.80, "v5p:4x4x4": 0.70, "v6e:8x8": 0.72}
"""Topology -> seconds that a step of a language model of this size was estimated to take elsewhere, in the same way."""
ROOM = (("step.text_chunk", 4096), ("reconstruction.remat", "attention"))
"""Settings where there is memory for all logits: nothing of these or of the denoiser's attention is computed again."""
SETTINGS = {
    "v5e:8x8": (("step.remat", "gate"), ("mesh.data", 2)),
    "v5p:4x4x4": (("step.remat", "none"), *ROOM),
    "v6e:8x8": (("step.remat", "attention"), ("mesh.data", 2), *ROOM),
}
"""Topology -> the fastest policies and mesh, of those tried, with which Ross fits."""


@functools.cache
def planned(case: Case) -> Report:
    """The plan of a case, kept in --plans."""
    files = sorted([*(ROOT / "ross_jax").rglob("*.py"), *(ROOT / "configs").glob("*.py")])
    code = hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()
    tell = functools.partial(print, file=sys.stderr, flush=True)
    return Plans(location(_PLANS.value), code + origin(ROOT).versions, read_recipe, tell)(case)


def read_recipe(recipe: str) -> RunConfig:
    """The recipe `NAME:ARGUMENTS` of configs/."""
    name, _, arguments = recipe.partition(":")
    return command_line.load_recipe(f"{ROOT}/configs/{name}.py:{arguments}")


def _seconds(report: Report, name: str = "step") -> float:
    return report.seconds.get(name, float("nan"))


def _memory(report: Report) -> str:
    return "does not compile" if report.needed is None else f"{report.needed / GIB:.2f} of {report.capacity / GIB:.2f}"


def _mesh(report: Report) -> str:
    return " ".join(f"{axis}={size}" for axis, size in report.mesh.items() if size > 1)


def _mfu(report: Report) -> str:
    return f"{report.mfu:.1%}" if report.mfu else "-"


def costs() -> Table:
    """What images and reconstruction cost."""
    half, data, tensor = ("reconstruction.dtype", "bfloat16"), ("mesh.data", 1), ("mesh.tensor", 2)
    recipes = {
        "language model alone": ("language_only", (), ()),
        "LLaVA": ("llava", (), ()),
        "Ross, cached targets": ("ross", ("targets",), ()),
        "Ross, live": ("ross", (), ()),
        "Ross, cached targets, denoiser in bfloat16": ("ross", ("targets",), (half,)),
        "language model alone, data=1": ("language_only", (), (data,)),
        "language model alone, data=1, tensor=2": ("language_only", (), (data, tensor)),
    }

    def plan(topology: str, label: str) -> Report:
        name, cached, changes = recipes[label]
        return planned(Case(f"{name}:{PARTS}", topology, 128, cached, (*SETTINGS[topology], *changes)))

    def row(topology: str, label: str) -> tuple[str, ...]:
        found = plan(topology, label)
        step, overlapped = _seconds(found), _seconds(found, "overlapped")
        peer = PEER[topology]
        return (
            *(_mesh(found), found.remat, f"{step:.3f}", f"{step / _seconds(plan(topology, 'LLaVA')):.3f}"),
            *(f"{step / peer:.2f}; overlapped {overlapped / peer:.2f}", f"{overlapped:.3f}"),
            *(_memory(found), _mfu(found)),
        )

    head = ("topology", "recipe", "mesh", "remat", "step, s", "of LLaVA's", "of the peer's", "overlapped, s")
    # Variants on one topology only, as a plan takes minutes.
    keys = [(where, label) for where in PEER for label in (recipes if where == "v5e:8x8" else list(recipes)[:4])]
    return Table("costs", (*head, "GiB per chip", "MFU"), keys, row)


def kinds() -> Table:
    """What each kind of reconstruction costs."""

    def plan(kind: str) -> Report:
        return planned(Case(f"ross:{PARTS},kind={kind}", "v5e:8x8", 64))

    def added(report: Report, how: str) -> str:
        counts = {name: each[how] for name, each in report.parameters.items() if each[how]}
        beside = {name: count for name, count in counts.items() if name not in ("language", "vision", "projector")}
        return ", ".join(f"{name}, {count / 1e6:.1f} M" for name, count in beside.items()) or "-"

    def row(kind: str) -> tuple[str, ...]:
        name = kind.strip("`")
        found = plan(name)
        step = _seconds(found)
        over = "-" if name == NONE else f"{step / _seconds(plan(NONE)) - 1:.1%}"
        return added(found, "trainable"), added(found, "frozen"), _memory(found), f"{step:.3f}", over

    head = ("kind", "trained beside LLaVA's", "frozen beside LLaVA's", "GiB per chip", "step, s", "over `none`")
    return Table("kinds", head, [(f"`{kind}`",) for kind in (NONE, *OBJECTIVES)], row)


def batches() -> Table:
    """The largest batch that fits."""
    models = {"Vicuna-13B": "vicuna_13b", "Qwen2-7B": "qwen2_7b"}

    def row(model: str, topology: str) -> tuple[str, ...]:
        devices = len(open_target(topology).devices)
        recipe = f"ross:encoder=siglip,llm={models[model]},stage=finetune"

        def at(rows: int) -> Report:
            return planned(Case(recipe, topology, rows * devices, set=(("step.remat", "full"),)))

        rows, found = largest_batch(at)
        return str(rows) if rows else "none fits", f"{_seconds(found):.3f}", _memory(found), _mfu(found)

    keys = [("Vicuna-13B", "v5e:8x8"), ("Qwen2-7B", "v5e:4x4"), ("Qwen2-7B", "h100:1x1x8")]
    head = ("model", "topology", "rows per device", "step, s", "GiB per device", "MFU")
    return Table("batches", head, keys, row)


def scaling() -> Table:
    """More and more chips, two rows on each."""
    chips = {"v5p:2x2x4": 16, "v5p:4x4x4": 64, "v5p:4x8x8": 256, "v5p:8x8x16": 1024}

    def plan(topology: str) -> Report:
        return planned(Case(f"ross:{PARTS}", topology, 2 * chips[topology], ("targets",)))

    def row(topology: str) -> tuple[str, ...]:
        found = plan(topology)
        step, base = _seconds(found), _seconds(plan("v5p:2x2x4"))
        return str(chips[topology]), _mesh(found), f"{step:.3f}", f"{step / base:.3f}", _memory(found)

    head = ("topology", "chips", "mesh", "step, s", "of 16 chips'", "GiB per chip")
    return Table("scaling", head, [(topology,) for topology in chips], row)


def paper() -> Table:
    """Both stages of Ross-7B at the paper's batches of conversations."""
    policies = {"v5e:8x8": "full", "v6e:4x4": "full", "h100:1x1x8": "attention"}

    def row(topology: str, stage: str) -> tuple[str, ...]:
        name = f"ross:encoder=siglip,llm=qwen2_7b,stage={stage}"
        return _hours(planned(Case(name, topology, set=(("step.remat", policies[topology]),))))

    return Table("paper", ("topology", "stage", *_HOURS), [(at, stage) for at in policies for stage in STAGES], row)


def small() -> Table:
    """Stage 2 on one GPU, and on eight chips."""
    settings = {
        ("rtx4090:1x1x1", "qwen3_0_6b"): (4, "full"),
        ("a100:1x1x1", "qwen2_5_3b"): (8, "full"),
        ("v5e:2x4", "qwen2_5_3b"): (16, "full"),
        ("v6e:2x4", "qwen2_5_7b"): (16, "full"),
    }

    def row(topology: str, llm: str) -> tuple[str, ...]:
        rows, remat = settings[topology, llm.strip("`")]
        name = f"ross:encoder=siglip2,llm={llm.strip('`')},stage=finetune"
        return _hours(planned(Case(name, topology, rows, set=(("step.remat", remat),))))

    return Table("small", ("topology", "llm", *_HOURS), [(at, f"`{llm}`") for at, llm in settings], row)


_HOURS = ("rows", "remat", "mesh", "step, s", "GiB per device", "conversations/s", "hours per epoch")


def _hours(report: Report) -> tuple[str, ...]:
    each, hours = report.rates.get("conversations"), report.hours_per_epoch
    told = (f"{each:.1f}" if each else "-", f"{hours:.1f}" if hours else "-")
    return str(report.rows), report.remat, _mesh(report), f"{_seconds(report):.3f}", _memory(report), *told


def recipes() -> Table:
    """All recipes compile; whether they fit."""
    llms = ("qwen2_7b", "vicuna_7b", "vicuna_13b", "llama3_8b")
    full = [f"encoder={encoder},llm={llm}" for encoder in ("siglip", "clip") for llm in llms]
    names = [f"ross:{parts},stage={stage}" for parts in full for stage in ("pretrain", "finetune")]
    newer = ("qwen2_5_0_5b", "qwen2_5_1_5b", "qwen2_5_3b", "qwen2_5_7b", "qwen3_0_6b", "qwen3_1_7b", "qwen3_4b")
    newer += ("qwen3_8b", "llama3_1_8b", "llama3_2_1b", "llama3_2_3b")
    names += [f"ross:encoder=siglip2,llm={llm},stage=finetune" for llm in newer]
    names += [f"ross:{PARTS},kind={kind}" for kind in OBJECTIVES if kind != ReconstructionConfig.kind]
    names += [f"ross:{PARTS},kind=latent,teacher={teacher}" for teacher in ("siglip", "clip", "dinov2")]
    names += [f"ross:{PARTS},vision=trained", f"llava:{PARTS}", f"language_only:{PARTS}"]
    names += ["imagenet_denoiser:encoder=siglip,llm=qwen2_7b"]

    def row(topology: str, name: str) -> tuple[str, ...]:
        return (summary(planned(Case(name.strip("`"), topology))),)

    keys = [(topology, f"`{name}`") for topology in ("v5p:4x4x4", "h100:1x1x8") for name in names]
    return Table("recipes", ("topology", "recipe", "memory"), keys, row)


TABLES = {table.name: table for table in (costs(), kinds(), batches(), scaling(), paper(), small(), recipes())}


def make(name: str, only: str, output: Path) -> None:
    """Remakes the rows of a table whose names contain `only`, and writes each as soon as it is made.

    Raises:
      UserError: no row has such a name; there is no such file.
    """
    if not output.is_file():
        raise UserError(f"{output}: no such file; tables replace those of a file of results")
    table = TABLES[name]
    chosen = [key for key in table.keys if only in " ".join(key)]
    if not chosen:
        raise UserError(f"--only={only}: no row of {name}; there are {', '.join(' '.join(key) for key in table.keys)}")
    for key in chosen:
        cells = table.row(*key)
        print(" | ".join([*key, *cells]), flush=True)
        output.write_text(update(output.read_text(), table, key, cells, origin(ROOT)))


def main() -> int:
    jax.config.update("jax_platforms", "cpu")  # a TPU or GPU of this machine has no part in it
    logging.getLogger("ross_jax.sharding").setLevel(logging.WARNING)
    try:
        output = location(_OUTPUT.value)
        for name in _TABLES.value:
            if name not in TABLES:
                raise UserError(f"--tables={name}: no such table{nearest(name, TABLES)}; there are {', '.join(TABLES)}")
        for name in _TABLES.value:
            make(name, _ONLY.value, output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    command_line.run(main)
