"""The table of the comparison: kinds of reconstruction by accuracy and by what their visual outputs hold."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ross_jax.config import UserError
from ross_jax.objectives.reconstruction import find_objective


def kind_title(kind: str) -> str:
    """A kind's name in tables."""
    objective = find_objective(kind)
    return objective.title if objective else f"{kind} (LLaVA)"


@dataclasses.dataclass(frozen=True)
class Spread:
    """A number over seeds.

    Attributes:
      values: one per seed.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return float(np.mean(self.values))

    @property
    def deviation(self) -> float:
        """Standard deviation of a seed; NaN with one."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else math.nan

    @property
    def error(self) -> float:
        """Standard error of the mean; NaN with one seed."""
        return self.deviation / math.sqrt(len(self.values))

    def format(self, digits: int, signed: bool = False) -> str:
        """Mean ± deviation."""
        sign = "+" if signed else ""
        text = f"{self.mean:{sign}.{digits}f}"
        return text if math.isnan(self.deviation) else f"{text} ± {self.deviation:.{digits}f}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of reconstruction.

    Attributes:
      accuracy: mean over the types of held-out questions.
      gain: accuracy above that of the same seed without reconstruction; None of `none` itself.
      psnr, other: of held-out pictures from their own visual outputs, and from another picture's, in dB; None where no
        picture can be made.
    """

    kind: str
    accuracy: Spread
    gain: Spread | None
    psnr: Spread | None
    other: Spread | None


def rows(scores: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """The table.

    Args:
      scores: kind -> seed -> scores of `ross_jax.demo.report.score_run`; the same seeds of every kind.
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
    """The table as Markdown: means over seeds ± standard deviation of a seed."""
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
    """Writes a PNG: accuracy and PSNR of every kind, a dot per seed and a bar for the mean.

    Raises:
      UserError: the `demo` extra is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("the table's figure: matplotlib is not installed; run `pip install -e '.[demo]'`") from error
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
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
    figure.savefig(path, dpi=110, metadata={"Software": None})
