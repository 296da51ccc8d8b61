"""Figures of the demo, drawn with matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ross_jax.config import UserError
from ross_jax.storage import location


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of `width` x `height` inches that opens no window.

    Raises:
      UserError: the `demo` extra is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("figures need matplotlib, which is not installed; run `pip install -e '.[demo]'`") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # draws to memory, whatever the user's default backend
    return figure


def plot_losses(path: str | Path, curves: Mapping[str, Mapping[str, tuple[Sequence, Sequence]]]) -> None:
    """Writes a PNG with one panel per loss, side by side, each with one line per run.

    Args:
      path: file to write.
      curves: panel title -> line label -> (steps, values).

    Raises:
      UserError: the `demo` extra is not installed.
    """
    figure = new_figure(5.0 * len(curves), 3.5)
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for panel, (title, lines) in zip(panels, curves.items(), strict=True):
        for name, (steps, values) in lines.items():
            # A run that logged only once, as with --quick, has no line, so it gets a point.
            panel.plot(steps, values, label=name, linewidth=1, marker="o" if len(values) == 1 else None)
        panel.set(title=title, xlabel="step", ylabel="loss")
        panel.grid(alpha=0.3)
        panel.legend()
    with location(path).open("wb") as file:
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
