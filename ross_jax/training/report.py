"""Where the time of a run went, and how its losses fell, as a table and a figure."""

from pathlib import Path

from ross_jax.checkpoints import writing
from ross_jax.config import UserError
from ross_jax.console import duration
from ross_jax.storage import location
from ross_jax.training.goodput import ACTIVITIES, GOODPUT, LOSSES, Account, goodput, make_account, read_lines

_LOSSES = ("text_loss", "reconstruction_loss")


class Report:
    """What a run's directory says of the run.

    Attributes:
      account: the run's times.
      lines: of `metrics.jsonl`.
      losses: name of a loss -> the steps at which it was written, and its values.
      notes: on lines that cannot be read.

    Raises:
      UserError: the directory has no times of a run.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        try:
            lines, note = read_lines(folder / GOODPUT, ("start", "time", "step", *ACTIVITIES))
            metrics, other = read_lines(folder / "metrics.jsonl")
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error
        if not lines:
            raise UserError(f"{folder}: has no {GOODPUT} with the times of a run; give the directory of a run")
        self.account: Account = make_account(lines)
        self.lines = metrics
        self.notes = [each for each in (note, other) if each]
        self.losses: dict[str, tuple[list[int], list[float]]] = {}
        for name in _LOSSES:
            found = [line for line in metrics if isinstance(line.get(name), int | float)]
            if found:
                self.losses[name] = [line["step"] for line in found], [line[name] for line in found]

    def table(self) -> str:
        """A line for each way in which time went."""
        seconds, account = self.account.seconds, self.account
        total = sum(seconds.values())
        rows = [(text, seconds[name]) for name, text in (ACTIVITIES | LOSSES).items()] + [("total", total)]
        lines = [f"{text:<32} {duration(each):>8} {each / (total or 1):>8.1%}" for text, each in rows]
        starts = f"{account.starts} start{'s' if account.starts > 1 else ''}"
        return "\n".join([f"{self._folder}: {account.step} steps, {starts}, goodput {goodput(seconds):.1%}", *lines])

    def draw(self, path: Path) -> None:
        """Writes a PNG with three charts: times, steps done over time, and losses.

        Raises:
          UserError: matplotlib is not installed, or the file cannot be written.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise UserError(f"{path}: matplotlib is not installed; bash launch/setup.sh") from error
        figure = Figure(figsize=(14, 4), layout="constrained")
        FigureCanvasAgg(figure)
        times, steps, losses = figure.subplots(1, 3)
        account = self.account
        figure.suptitle(f"{self._folder}: {account.step} steps, goodput {goodput(account.seconds):.1%}")
        for name, text in reversed((ACTIVITIES | LOSSES).items()):
            times.barh(text, account.seconds[name] / 3600, color="tab:red" if name in LOSSES else "tab:blue")
        times.set(xlabel="hours")
        for ends in account.ends:
            steps.plot([(time - account.began) / 3600 for time, _ in ends], [step for _, step in ends], ".-")
        steps.set(xlabel="hours since the first start", ylabel="steps done, by start")
        for name, (at, values) in self.losses.items():
            losses.plot(at, values, label=name.replace("_", " "))
        losses.set(xlabel="step")
        if self.losses:
            losses.legend()
        with writing(path, self._folder), location(path).open("wb") as file:
            figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
