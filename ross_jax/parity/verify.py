"""Compares a checkpoint's numbers with a golden file, tensor by tensor."""

import dataclasses
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from ross_jax.config import UserError
from ross_jax.convert.importing import load, plan_import
from ross_jax.convert.sources import read_json
from ross_jax.models.denoiser import NUM_HEADS
from ross_jax.parity.golden import Golden
from ross_jax.parity.quantities import GROUPS, Params, Reference

CLIPPED_TOLERANCE = 10.0
"""Absolute tolerance of clipped samples, in multiples of the relative tolerance."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      name: name of the tensor in the golden file.
      shape: shape of the tensor in the golden file.
      error: largest difference, relative to the golden tensor's largest value. Integers and clipped samples: the
        largest absolute difference. Infinite if shapes differ, NaN if a value is NaN, None if nothing was
        compared.
    """

    name: str
    shape: tuple[int, ...]
    error: float | None
    verdict: Literal["ok", "FAIL", "not covered"]


def load_reference(checkpoint: Path, facts: dict[str, Any], **flags: Path | None) -> tuple[Reference, Params]:
    """Imports a reference checkpoint into memory, float32, with all layers of its vision tower.

    Args:
      facts: contents of the golden file's `fixture.json`.
      flags: `vision_tower`, `autoencoder_folder` as for `plan_import`.

    Raises:
      UserError: the checkpoint cannot be imported, or lacks a component.
    """
    heads = facts.get("denoiser", {}).get("num_heads", NUM_HEADS)
    plan = plan_import([str(checkpoint)], whole_tower=True, num_heads=heads, **flags)
    try:
        params = load(plan)
    finally:
        plan.close()
    missing = [name for name in ("vision", "projector", "language") if getattr(plan.config, name) is None]
    if missing:
        raise UserError(f"{checkpoint}: has no {', '.join(missing)}; a full Ross or LLaVA checkpoint is needed")
    settings, tower = read_json(checkpoint / "config.json"), plan.config.vision
    # The reference ignores mm_vision_select_layer for SigLIP.
    select = settings.get("mm_vision_select_layer", -2) if tower.kind == "clip" else -2
    selected = dataclasses.replace(tower, select_layer=select).layers_used
    params = {"projector": {}} | jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
    return Reference(plan.config, selected, settings.get("tokenizer_model_max_length") or 2**31), params


class Verifier:
    """Compares parameters with a golden file. Computations are compiled once, for any number of parameter trees."""

    def __init__(self, reference: Reference, golden: Golden):
        self._golden = golden
        self.groups = {
            prefix: build(reference, golden)
            for prefix, (build, needs) in GROUPS.items()
            if golden.has(prefix) and all(getattr(reference.config, name) is not None for name in needs)
        }
        self._compiled = {prefix: jax.jit(group.compute) for prefix, group in self.groups.items()}

    def rows(self, params: Params, rtol: float = 1e-4, only: Collection[str] | None = None) -> list[Row]:
        """Computes all groups, and compares them with the golden file.

        Args:
          rtol: largest difference allowed, relative to a tensor's largest value.
          only: prefixes of the groups to compute. None: all groups.

        Returns:
          A row for each golden tensor that is not an input, in the file's order, gradient norms last. With `only`:
          rows for computed tensors only.
        """
        values: dict[str, Any] = {}
        valid: dict[str, np.ndarray] = {}
        with jax.default_matmul_precision("highest"):
            for prefix, group in self.groups.items():
                if only is None or prefix in only:
                    values |= self._compiled[prefix](params)
                    valid |= group.valid
        rows = _compare(self._golden, values, valid, rtol)
        return [row for row in rows if only is None or row.verdict != "not covered"]


def _compare(golden: Golden, computed: dict[str, Any], valid: dict[str, np.ndarray], rtol: float) -> Iterator[Row]:
    norms = {f"grad_norms/{name}": np.float64(value) for name, value in golden.gradient_norms.items()}
    floor = 1e-6 * max(norms.values(), default=0.0)
    for name, expected in {**golden.tensors, **norms}.items():
        expected = np.asarray(expected)
        if name not in computed:
            if name not in golden.inputs:
                yield Row(name, expected.shape, None, "not covered")
            continue
        actual, tolerance = np.asarray(computed[name]), rtol
        if actual.shape != expected.shape:
            yield Row(name, expected.shape, float("inf"), "FAIL")
            continue
        difference = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
        magnitude = np.abs(expected.astype(np.float64))
        if name in valid:
            where = valid[name].reshape(*valid[name].shape, *(1,) * (difference.ndim - valid[name].ndim))
            where = np.broadcast_to(where, difference.shape)
            difference, magnitude = difference[where], magnitude[where]
        error = float(np.max(difference, initial=0.0))
        if np.issubdtype(expected.dtype, np.integer):
            tolerance = 0.0
        elif "clip" in name:
            tolerance = CLIPPED_TOLERANCE * rtol
        else:
            # A norm that is zero except for rounding is compared relative to a small share of the largest norm.
            scale = max(float(np.max(magnitude, initial=0.0)), floor if name in norms else 0.0)
            error = error / scale if scale > 0 else error
        yield Row(name, expected.shape, error, "ok" if error <= tolerance else "FAIL")


def format_table(rows: list[Row]) -> str:
    """Formats rows as aligned text, with a last line that counts verdicts."""
    width = max((len(row.name) for row in rows), default=4)
    lines = [f"{'tensor':<{width}}  {'shape':<18} {'max error':>10}  verdict"]
    for row in rows:
        error = "-" if row.error is None else f"{row.error:.1e}"
        lines.append(f"{row.name:<{width}}  {str(row.shape).replace(' ', ''):<18} {error:>10}  {row.verdict}")
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in ("ok", "FAIL", "not covered")}
    lines.append(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return "\n".join(lines)
