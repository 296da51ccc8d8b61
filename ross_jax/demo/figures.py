"""Figures of the demo: loss curves, and a labelled grid of pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from ross_jax.config import UserError

_GAP = 4
_LABEL_HEIGHT = 14


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
            panel.plot(steps, values, label=name, linewidth=1)
        panel.set(title=title, xlabel="step", ylabel="loss")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def draw_grid(path: str | Path, columns: Mapping[str, UInt8[np.ndarray, "items height width 3"]], scale: int = 2):
    """Writes a PNG with one labelled column per entry and one picture in each row.

    Args:
      path: of the PNG.
      columns: label -> pictures of one size and number.
      scale: pixels of the PNG per pixel, along a side.

    Raises:
      UserError: the columns differ in shape.
    """
    shapes = {pictures.shape for pictures in columns.values()}
    if len(shapes) != 1:
        raise UserError(f"columns of a grid must have one shape, found {sorted(shapes)}")
    items, height, width, _ = shapes.pop()
    font = ImageFont.load_default()
    cell = max(width * scale, *(int(font.getlength(label)) + 1 for label in columns)) + _GAP
    row = height * scale + _GAP
    grid = Image.new("RGB", (_GAP + cell * len(columns), _LABEL_HEIGHT + _GAP + row * items), "white")
    draw = ImageDraw.Draw(grid)
    for j, (label, pictures) in enumerate(columns.items()):
        left = _GAP + cell * j
        draw.text((left, 1), label, fill="black", font=font)
        for i, pixels in enumerate(pictures):
            picture = Image.fromarray(pixels).resize((width * scale, height * scale), Image.Resampling.NEAREST)
            grid.paste(picture, (left, _LABEL_HEIGHT + _GAP + row * i))
    grid.save(path)
