"""A page that compares runs: `report.html`, which needs no other file, and its charts as `report.png`."""

import base64
import html
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ross_jax.checkpoints import writing
from ross_jax.config import UserError, to_dict
from ross_jax.console import duration
from ross_jax.data.precomputed import differences
from ross_jax.training.goodput import ACTIVITIES, LOSSES, goodput
from ross_jax.training.record import RECORD, parse_record, recorded_config
from ross_jax.training.report import Report

_CHARTS = (
    ("text_loss", "text loss", False),
    ("reconstruction_loss", "reconstruction loss", False),
    ("text_loss", "text loss", True),
    ("reconstruction_loss", "reconstruction loss", True),
    ("tokens_per_second", "tokens per second", False),
    ("goodput", "goodput", False),
)
"""(metric, title, whether it is drawn over conversations instead of steps)."""
_IMAGES = 6
"""Most images of a run that are shown, spread evenly over its steps."""
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .2rem .8rem; border-bottom: 1px solid #ddd }
th { text-align: left } td.number { text-align: right; font-variant-numeric: tabular-nums }
img { max-width: 100% } figure { display: inline-block; margin: .5rem } figcaption { color: #666 }
code { background: #f4f4f4; padding: 0 .2rem }
"""


class Runs:
    """Several runs, and what their directories say of them.

    Args:
      folders: their directories.

    Raises:
      UserError: a directory is not that of a run.
    """

    def __init__(self, folders: Sequence[Path]):
        self._folders = folders
        self.reports = [Report(folder) for folder in folders]
        records = [parse_record(folder / RECORD) for folder in folders]
        if None in records:
            raise UserError(f"{folders[records.index(None)]}: has no {RECORD}; give the directory of a run")
        self._configs = [
            recorded_config(record, folder / RECORD) for record, folder in zip(records, folders, strict=True)
        ]
        self._names = _short_names(folders)

    def write(self, output: Path) -> Path:
        """Writes `report.html` and `report.png` into a folder, made if it is absent. Returns the page's path."""
        chart = self._draw()
        page = output / "report.html"
        with writing(page, self._folders[0]):
            output.mkdir(parents=True, exist_ok=True)
            (output / "report.png").write_bytes(chart)
            page.write_text("".join(self._page(chart)), encoding="utf-8")
        return page

    def _draw(self) -> bytes:
        """The charts, a line for each run, as a PNG."""
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise UserError("report.png: matplotlib is not installed; bash launch/setup.sh") from error
        figure = Figure(figsize=(13, 11), layout="constrained")
        FigureCanvasAgg(figure)
        for (metric, title, by_samples), axes in zip(_CHARTS, figure.subplots(3, 2).flat, strict=True):
            for name, report, config in zip(self._names, self.reports, self._configs, strict=True):
                found = [line for line in report.lines if isinstance(line.get(metric), int | float)]
                steps = [line["step"] * (config.data.batch if by_samples else 1) for line in found]
                axes.plot(steps, [line[metric] for line in found], label=name, linewidth=1.2)
            axes.set(title=title, xlabel="conversations" if by_samples else "step")
            axes.grid(alpha=0.3)
        figure.axes[0].legend()
        out = io.BytesIO()
        figure.savefig(out, dpi=110, metadata={"Software": None})
        return out.getvalue()

    def _page(self, chart: bytes) -> Iterator[str]:
        title = html.escape(", ".join(self._names))
        yield f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        yield f"<h1>{title}</h1>{_image(chart, 'image/png', 'losses, throughput and goodput')}"
        yield "<h2>Where the time went</h2>"
        seconds = [report.account.seconds for report in self.reports]
        rows = [[text, *(duration(each[name]) for each in seconds)] for name, text in (ACTIVITIES | LOSSES).items()]
        yield _table(["", *self._names], [*rows, ["goodput", *(f"{goodput(each):.1%}" for each in seconds)]])
        yield "<h2>Last metrics</h2>"
        names = ["step", "text_loss", "reconstruction_loss", "tokens_per_second", "mfu", "memory_gb", "input_wait"]
        yield _table(["", *self._names], [[name, *(_last(report, name) for report in self.reports)] for name in names])
        yield "<h2>Config</h2>"
        for name, config in list(zip(self._names, self._configs, strict=True))[1:]:
            lines = differences(to_dict(self._configs[0]), to_dict(config))
            yield f"<p>{html.escape(name)}, compared with {html.escape(self._names[0])}:</p>"
            listed = "".join(f"<li><code>{html.escape(line)}</code></li>" for line in lines)
            yield f"<ul>{listed}</ul>" if lines else "<p>no difference</p>"
        if len(self._names) == 1:
            yield "<p>One run; name several to see how their configs differ.</p>"
        yield "<h2>Reconstructions</h2>"
        for name, folder in zip(self._names, self._folders, strict=True):
            shown = list(_spread(_board_images(folder)))
            yield f"<h3>{html.escape(name)}</h3>" + ("" if shown else "<p>none; see loop.images and loop.evaluate</p>")
            for step, tag, png in shown:
                caption = f"<figcaption>{html.escape(tag)}, step {step}</figcaption>"
                yield f"<figure>{_image(png, 'image/png', f'{tag} at step {step}')}{caption}</figure>"
        yield "</html>\n"


def _short_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of paths, as many as are needed to tell them apart."""
    paths = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-count:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{folders[0]}: is named twice")


def _last(report: Report, name: str) -> str:
    value = next((line[name] for line in reversed(report.lines) if name in line), None)
    return "-" if value is None else f"{value:,.4g}" if isinstance(value, float) else str(value)


def _table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    heads = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr><td>{html.escape(first)}</td>" + "".join(f'<td class="number">{html.escape(cell)}</td>' for cell in rest)
        for first, *rest in rows
    )
    return f"<table><tr>{heads}</tr>{body}</table>"


def _image(content: bytes, kind: str, text: str) -> str:
    return f'<img alt="{html.escape(text)}" src="data:{kind};base64,{base64.b64encode(content).decode()}">'


def _spread(images: list[Any]) -> Iterator[Any]:
    """At most `_IMAGES` of them, the first and the last included."""
    count = min(_IMAGES, len(images))
    for i in range(count):
        yield images[i * (len(images) - 1) // max(1, count - 1)]


def _board_images(folder: Path) -> list[tuple[int, str, bytes]]:
    """(step, name, PNG) of each image in a run's TensorBoard files, in order: those of evaluations, if it has any."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[tuple[int, str], bytes] = {}
    for path in sorted((folder / "tensorboard").glob("events.*")):
        data, place = path.read_bytes(), 0
        while place + 12 <= len(data):  # each record: length, checksum, event, checksum
            length = int.from_bytes(data[place : place + 8], "little")
            record = data[place + 12 : place + 12 + length]
            place += length + 16
            if len(record) < length:
                break  # a killed process wrote a part of it
            event = Event.FromString(record)
            for value in event.summary.value:
                if value.HasField("image"):
                    found[event.step, value.tag] = value.image.encoded_image_string
    tags = {tag for _, tag in found}
    chosen = "evaluation" if "evaluation" in tags else "reconstruction"
    return [(step, tag, png) for (step, tag), png in sorted(found.items()) if tag == chosen]
