"""Loss curves of the demo."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ross_jax.config import UserError


def plot_losses(path: str | Path, curves: Mapping[str, Mapping[str, tuple[Sequence, Sequence]]]) -> None:
    """Writes a PNG with one panel per loss, side by side, each with one line per run.

    Args:
      path: of the PNG.
      curves: title of a panel -> name of a line -> (steps, values).

    Raises:
      UserError: the `demo` extra is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("loss curves: matplotlib is not installed; run `pip install -e '.[demo]'`") from error
    figure = Figure(figsize=(5 * len(curves), 3.5), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the user's default backend
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for panel, (title, lines) in zip(panels, curves.items(), strict=True):
        for name, (steps, values) in lines.items():
            # A run so short that it logged once, as with --quick, is a point.
            panel.plot(steps, values, label=name, linewidth=1, marker="o" if len(values) == 1 else None)
        panel.set(title=title, xlabel="step", ylabel="loss")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path, dpi=110, metadata={"Software": None})
