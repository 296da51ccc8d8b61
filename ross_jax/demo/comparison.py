"""The comparison's table: accuracy and reconstruction quality of each kind of objective, over seeds."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ross_jax.demo.figures import new_figure
from ross_jax.demo.report import kind_title
from ross_jax.storage import location


@dataclasses.dataclass(frozen=True)
class Spread:
    """Values of one score, one per seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return float(np.mean(self.values))

    @property
    def deviation(self) -> float:
        """Standard deviation over seeds; NaN for a single seed."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else math.nan

    def format(self, digits: int, signed: bool = False) -> str:
        """`0.541 ± 0.015`: mean and standard deviation."""
        sign = "+" if signed else ""
        text = f"{self.mean:{sign}.{digits}f}"
        return text if math.isnan(self.deviation) else f"{text} ± {self.deviation:.{digits}f}"


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table: one kind of objective.

    Attributes:
      kind: the objective's name in recipes.
      accuracy: accuracy on held-out questions, averaged over question types.
      gain: accuracy minus that of `none` with the same seed; None for `none` itself.
      psnr: PSNR in dB of held-out pictures reconstructed from their own visual outputs; None if the kind makes no
        pictures.
      other: PSNR in dB of pictures reconstructed from another picture's visual outputs; None likewise.
    """

    kind: str
    accuracy: Spread
    gain: Spread | None
    psnr: Spread | None
    other: Spread | None


def rows(scores: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """The table's rows, in the order of `scores`.

    Args:
      scores: kind -> seed -> result of `ross_jax.demo.report.score_run`. All kinds have the same seeds.
    """

    def accuracies(kind: str) -> np.ndarray:
        return np.array([np.mean([row["accuracy"] for row in run["answers"]]) for run in scores[kind].values()])

    made = []
    for kind, runs in scores.items():
        images = [run["reconstruction"] for run in runs.values() if run["reconstruction"]]
        gain = None
        if kind != "none" and "none" in scores:
            gain = Spread(tuple(accuracies(kind) - accuracies("none")))
        psnr, other = (
            Spread(tuple(values[name] for values in images)) if images else None for name in ("psnr_own", "psnr_other")
        )
        made.append(Row(kind, Spread(tuple(accuracies(kind))), gain, psnr, other))
    return made


def markdown(table: Sequence[Row]) -> str:
    """The table as Markdown; each cell is mean ± standard deviation over seeds."""
    lines = [
        "| reconstruction | held-out accuracy | above none, seed by seed | PSNR, dB | from another picture's, dB |",
        "|---|---|---|---|---|",
    ]
    for row in table:
        cells = [
            kind_title(row.kind),
            row.accuracy.format(3),
            "-" if row.gain is None else row.gain.format(3, signed=True),
            "-" if row.psnr is None else row.psnr.format(1),
            "-" if row.other is None else row.other.format(1),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(path: Path, table: Sequence[Row], title: str) -> None:
    """Writes a PNG with accuracy and PSNR of every kind: a bar for the mean and a dot for each seed.

    Raises:
      UserError: the `demo` extra is not installed.
    """
    figure = new_figure(11.0, 3.6)
    figure.suptitle(title)
    panels = {"held-out accuracy": "accuracy", "PSNR from visual outputs, dB": "psnr"}
    for panel, (label, name) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        shown = [(kind_title(row.kind), getattr(row, name)) for row in table if getattr(row, name) is not None]
        for height, (_, spread) in enumerate(shown):
            panel.barh(height, spread.mean, color="tab:blue", alpha=0.35)
            panel.plot(spread.values, [height] * len(spread.values), "o", color="tab:blue", markersize=4)
            panel.annotate(
                spread.format(3 if name == "accuracy" else 1),
                (0, height),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        panel.set_yticks(range(len(shown)), [label for label, _ in shown])
        panel.invert_yaxis()
        panel.set_xlabel(label)
    with location(path).open("wb") as file:
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
