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
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ross_jax.plan.environment import prepare

prepare()

from absl import flags  # noqa: E402

from ross_jax import command_line  # noqa: E402
from ross_jax.config import UserError, nearest  # noqa: E402
from ross_jax.plan.kept import Case, Plans  # noqa: E402
from ross_jax.plan.report import Report, summary  # noqa: E402
from ross_jax.plan.search import largest_batch  # noqa: E402
from ross_jax.plan.targets import GIB, open_target  # noqa: E402
from ross_jax.training.recipe import RunConfig  # noqa: E402

ROOT = Path(__file__).parents[1]

_TABLES = flags.DEFINE_list("tables", ["costs", "kinds", "batches", "scaling", "recipes"], "Which.")
_OUTPUT = flags.DEFINE_string("output", "tables.md", "The Markdown file.")
_PLANS = flags.DEFINE_string("plans", "plans", "The folder of plans.")

PARTS = "encoder=siglip,llm=qwen2_7b,stage=finetune"
PEER = {"v5e:8x8": 1.80, "v5p:4x4x4": 0.70, "v6e:8x8": 0.72}
"""Seconds that a step of a language model of this size was estimated to take elsewhere, in the same way."""
ROOM = (("step.text_chunk", 4096), ("reconstruction.remat", "attention"))
"""Where there is memory for all logits of a device, they are not computed again, nor is the denoiser's attention."""
SETTINGS = {
    "v5e:8x8": (("step.remat", "gate"), ("mesh.data", 2)),
    "v5p:4x4x4": (("step.remat", "none"), *ROOM),
    "v6e:8x8": (("step.remat", "attention"), ("mesh.data", 2), *ROOM),
}
"""The fastest policies and mesh, of those tried, with which Ross fits."""


@functools.cache
def planned(case: Case) -> Report:
    """The plan of a case, kept in --plans."""
    files = sorted([*(ROOT / "ross_jax").rglob("*.py"), *(ROOT / "configs").glob("*.py")])
    source = hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()
    tell = functools.partial(print, file=sys.stderr, flush=True)
    return Plans(Path(_PLANS.value), source, read_recipe, tell)(case)


def read_recipe(recipe: str) -> RunConfig:
    """`NAME:ARGUMENTS` of configs/."""
    name, _, arguments = recipe.partition(":")
    return command_line.load_recipe(f"{ROOT}/configs/{name}.py:{arguments}")


def _step(report: Report) -> float:
    return report.seconds.get("step", float("nan"))


def _row(*cells: Any) -> str:
    return "| " + " | ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"


def _head(*cells: str) -> list[str]:
    return [_row(*cells), _row(*("---" for _ in cells))]


def _memory(report: Report) -> str:
    return "does not compile" if report.needed is None else f"{report.needed / GIB:.2f} of {report.capacity / GIB:.2f}"


def _mesh(report: Report) -> str:
    return " ".join(f"{axis}={size}" for axis, size in report.mesh.items() if size > 1)


def _gained(report: Report) -> str:
    """Parameters beside the language model's, the encoder's and the projector's."""
    added = {k: v for k, v in report.parameters.items() if k not in ("language", "vision", "projector")}
    return ", ".join(f"{name} {sum(counts.values()) / 1e6:.1f} M" for name, counts in added.items()) or "-"


def costs() -> Iterator[str]:
    """The cost of pictures and of reconstruction."""
    yield "SigLIP-SO400M + Qwen2-7B, stage 2, packed rows of 2048 tokens, two per chip, 64 chips"
    yield from _head(
        *("topology", "recipe", "mesh", "remat", "step, s", "of LLaVA's", "of the peer's"),
        *("overlapped, s", "GiB per chip", "MFU"),
    )
    half, whole, tensor = ("reconstruction.dtype", "bfloat16"), ("mesh.data", 1), ("mesh.tensor", 2)
    recipes = (
        ("language model alone", "language_only", (), ()),
        ("LLaVA", "llava", (), ()),
        ("Ross, cached targets", "ross", ("targets",), ()),
        ("Ross, live", "ross", (), ()),
        ("Ross, cached targets, denoiser in bfloat16", "ross", ("targets",), (half,)),
        ("language model alone", "language_only", (), (whole,)),
        ("language model alone", "language_only", (), (whole, tensor)),
    )
    for topology, peer in PEER.items():
        settings = SETTINGS[topology]
        llava = _step(planned(Case(f"llava:{PARTS}", topology, 128, set=settings)))
        # Variants on one topology: a plan takes minutes.
        for label, name, cached, changes in recipes if topology == "v5e:8x8" else recipes[:4]:
            found = planned(Case(f"{name}:{PARTS}", topology, 128, cached, (*settings, *changes)))
            step, overlapped = _step(found), found.seconds.get("overlapped", float("nan"))
            beside = (f"{step / llava:.3f}", f"{step / peer:.2f}; overlapped {overlapped / peer:.2f}")
            mfu = f"{found.mfu or 0:.1%}"
            yield _row(topology, label, _mesh(found), found.remat, step, *beside, overlapped, _memory(found), mfu)


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
        devices = len(open_target(topology).devices)
        case = Case(f"ross:encoder=siglip,llm={llm},stage=finetune", topology, set=(("step.remat", "full"),))
        rows, found = largest_batch(functools.partial(_per_device, case, devices))
        mfu = f"{found.mfu:.1%}" if found.mfu else "-"
        yield _row(llm, topology, rows or "none fits", _step(found), _memory(found), mfu)


def _per_device(case: Case, devices: int, rows: int) -> Report:
    return planned(dataclasses.replace(case, rows=rows * devices))


def scaling() -> Iterator[str]:
    """More and more chips."""
    yield "Ross with cached targets, two rows per chip, on more and more chips"
    yield from _head("topology", "chips", "mesh", "step, s", "of 16 chips'", "GiB per chip")
    topologies = (("v5p:2x2x4", 16), ("v5p:4x4x4", 64), ("v5p:4x8x8", 256), ("v5p:8x8x16", 1024))
    base = _step(planned(Case(f"ross:{PARTS}", "v5p:2x2x4", 32, ("targets",))))
    for topology, chips in topologies:
        found = planned(Case(f"ross:{PARTS}", topology, 2 * chips, ("targets",)))
        yield _row(topology, chips, _mesh(found), _step(found), f"{_step(found) / base:.3f}", _memory(found))


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
