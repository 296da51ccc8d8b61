"""What the launchers with absl flags share: whatever is wrong with flags or recipe ends in one line."""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags

from ross_jax.config import UserError


def run(main: Callable[[], int], required: Sequence[str]) -> None:
    """Reads the flags, which runs the recipe's file too, and exits with the status that `main` returns.

    Args:
      required: names of flags that must be given.
    """
    flags.mark_flags_as_required(required)
    app.run(lambda _: main(), flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
    except (flags.Error, UserError, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
        sys.exit(_failure(" ".join(map(str, error.args)) or error))
    if len(rest) > 1:
        sys.exit(_failure(f"unexpected arguments {rest[1:]}"))
    return rest


def _failure(text: object) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 1
