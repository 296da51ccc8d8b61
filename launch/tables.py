"""Makes tables of plans: what recipes would need and how fast they would be, on hardware that is not at hand.

  python launch/tables.py --tables=A,B --output=tables.md --plans=plans

A  the language model alone, LLaVA and Ross, on 64 chips        C  the largest batch that fits
B  kinds of reconstruction                                      D  more chips, the same rows per chip
E  every recipe compiles for a TPU and a GPU topology

All figures are estimates of `launch/plan.py`. Each plan is a file in --plans, named after recipe, topology, options and
source code: the same command goes on where it was cut off, and a change of the code makes plans anew.
"""

import dataclasses
import functools
import hashlib
import importlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

from ross_jax.plan.environment import prepare

prepare()

import jax  # noqa: E402
from absl import app, flags  # noqa: E402

from ross_jax.config import UserError, freeze  # noqa: E402
from ross_jax.plan.planner import Options, plan  # noqa: E402
from ross_jax.plan.report import Report, summary  # noqa: E402
from ross_jax.plan.targets import GIB, open_target  # noqa: E402
from ross_jax.training.recipe import RunConfig  # noqa: E402

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # recipes import one another as configs.NAME

_TABLES = flags.DEFINE_list("tables", ["A", "B", "C", "D", "E"], "Which, by letter.")
_OUTPUT = flags.DEFINE_string("output", "tables.md", "The Markdown file.")
_PLANS = flags.DEFINE_string("plans", "plans", "The folder of plans.")

PARTS = "encoder=siglip,llm=qwen2_7b,stage=finetune"
PEER = {"v5e:8x8": 1.80, "v5p:4x4x4": 0.70, "v6e:8x8": 0.72}
"""Seconds of a language-model-only step of the same size elsewhere, estimated in the same way."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One plan.

    Attributes:
      recipe: `NAME:ARGUMENTS` of configs/.
      rows: of a global batch; None: what the packing plan would make.
      mesh: what differs from the recipe's.
    """

    label: str
    recipe: str
    topology: str
    rows: int | None = None
    cached: tuple[str, ...] = ()
    mesh: tuple[tuple[str, int], ...] = ()


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
    described = dataclasses.asdict(case) | {"label": None, "source": source_hash()}
    key = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]
    path = Path(_PLANS.value) / f"{case.topology.replace(':', '-')}-{case.recipe.partition(':')[0]}-{key}.json"
    if path.is_file():
        return Report(**json.loads(path.read_text()))
    print(f"{case.label} on {case.topology}", file=sys.stderr, flush=True)
    name, _, arguments = case.recipe.partition(":")
    values = importlib.import_module(f"configs.{name}").get_config(arguments or None)
    values.mesh.update(dict(case.mesh))
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


def costs():
    """Table A."""
    yield "A. SigLIP-SO400M + Qwen2-7B, stage 2, packed rows of 2048 tokens, two per chip, 64 chips"
    yield from _head("topology", "recipe", "step, s", "of the peer's", "GiB per chip", "MFU")
    recipes = (
        ("language model alone", "language_only", ()),
        ("LLaVA", "llava", ()),
        ("Ross, cached targets", "ross", ("targets",)),
        ("Ross, live", "ross", ()),
    )
    for topology, peer in PEER.items():
        for label, name, cached in recipes:
            report = planned(Case(label, f"{name}:{PARTS}", topology, 128, cached))
            ratio = f"{_step(report) / peer:.2f}"
            yield _row(topology, label, _step(report), ratio, _memory(report), f"{report.mfu or 0:.1%}")


def kinds():
    """Table B."""
    yield "B. kinds of reconstruction, v5e:8x8, two rows per chip"
    yield from _head("kind", "parameters added", "step, s", "of LLaVA's", "GiB per chip")
    base = None
    for kind in ("none", "pixel", "latent", "latent2pixel", "denoise"):
        report = planned(Case(kind, f"ross:{PARTS},kind={kind}", "v5e:8x8", 128))
        base = base or _step(report)
        yield _row(kind, _gained(report), _step(report), f"{_step(report) / base:.3f}", _memory(report))


def batches():
    """Table C."""
    yield "C. the largest batch that fits, rows of 2048 tokens per device, by doubling"
    yield from _head("model", "topology", "rows per device", "step, s", "GiB per device", "MFU")
    for llm, topology in (("vicuna_13b", "v5e:8x8"), ("qwen2_7b", "v5e:4x4"), ("qwen2_7b", "h100:1x1x8")):
        devices, rows, best = len(open_target(topology).devices), 1, None
        recipe = f"ross:encoder=siglip,llm={llm},stage=finetune"
        while (report := planned(Case(f"{llm}, {rows} rows", recipe, topology, rows * devices))).fits:
            best, rows = report, 2 * rows
        if best is None:
            yield _row(llm, topology, "none", "-", _memory(report), "-")
        else:
            yield _row(llm, topology, rows // 2, _step(best), _memory(best), f"{best.mfu or 0:.1%}")


def scaling():
    """Table D."""
    yield "D. Ross, two rows per chip, on more and more chips; fsdp up to 64, data beyond"
    yield from _head("topology", "chips", "mesh", "step, s", "of 16 chips'", "GiB per chip")
    base = None
    for topology, chips in (("v5p:2x2x4", 16), ("v5p:4x4x4", 64), ("v5p:4x8x8", 256), ("v5p:8x8x16", 1024)):
        mesh = (("data", max(1, chips // 64)), ("fsdp", min(chips, 64)))
        report = planned(Case(f"{chips} chips", f"ross:{PARTS}", topology, 2 * chips, ("targets",), mesh))
        base = base or _step(report)
        sizes = " ".join(f"{axis}={size}" for axis, size in report.mesh.items())
        yield _row(topology, chips, sizes, _step(report), f"{_step(report) / base:.3f}", _memory(report))


def recipes():
    """Table E."""
    yield "E. recipes compile for a TPU and a GPU topology"
    yield from _head("recipe", "topology", "result")
    names = [f"{name}:{PARTS}" for name in ("ross", "llava", "language_only")]
    names += [f"ross:encoder=siglip,llm=qwen2_7b,stage=pretrain,kind={kind}" for kind in ("pixel", "latent")]
    names += [f"ross:encoder=clip,llm={llm},stage=finetune" for llm in ("vicuna_7b", "vicuna_13b", "llama3_8b")]
    names += ["imagenet_denoiser:encoder=siglip,llm=qwen2_7b"]
    for name in names:
        for topology in ("v5p:4x4x4", "h100:1x1x8"):
            yield _row(name, topology, summary(planned(Case(name, name, topology))))


TABLES = {"A": costs, "B": kinds, "C": batches, "D": scaling, "E": recipes}


def main(argv: list[str]) -> int:
    logging.getLogger("ross_jax.sharding").setLevel(logging.WARNING)
    unknown = [name for name in _TABLES.value if name not in TABLES]
    if len(argv) > 1 or unknown:
        print(f"error: unexpected {argv[1:] or unknown}; tables are {', '.join(TABLES)}", file=sys.stderr)
        return 1
    lines = ["All figures are estimates of launch/plan.py; nothing was run.", ""]
    try:
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
    app.run(main)
