"""Prints where the time of runs went since they first started, and draws it.

python launch/report.py RUN                              also draws RUN/report.png
python launch/report.py RUN RUN ... --output DIR         writes a page that compares them: DIR/report.html, report.png
"""

import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a run may use the accelerators

from ross_jax.arguments import Parser
from ross_jax.config import UserError
from ross_jax.console import talk
from ross_jax.process import leave
from ross_jax.storage import location
from ross_jax.training.page import Runs
from ross_jax.training.report import Report


def main(argv: list[str] | None = None) -> int:
    talk()
    parser = Parser(description=__doc__)
    parser.add_argument("runs", type=location, nargs="+", metavar="RUN", help="directory of a run")
    parser.add_argument("--output", type=location, metavar="DIR", help="folder of a page that compares the runs")
    try:
        args = parser.parse_args(argv)
        if len(args.runs) > 1 and args.output is None:
            raise UserError("several runs: add --output DIR, the folder of the page that compares them")
        runs = Runs(args.runs) if args.output else None
        for folder, report in zip(args.runs, runs.reports if runs else map(Report, args.runs), strict=True):
            for note in report.notes:
                print(f"warning: {note}", file=sys.stderr)
            print(report.table())
            if runs is None:
                report.draw(folder / "report.png")
        if runs is not None:
            print(runs.write(args.output))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    leave(main)
