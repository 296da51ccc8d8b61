"""Prints where the time of a run went since it first started, and draws it to RUN/report.png.

python launch/report.py RUN
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a run may use the accelerators

from ross_jax.arguments import Parser
from ross_jax.config import UserError
from ross_jax.training.report import Report


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run")
    try:
        folder = parser.parse_args(argv).run
        report = Report(folder)
        for note in report.notes:
            print(f"warning: {note}", file=sys.stderr)
        print(report.table())
        report.draw(folder / "report.png")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
