"""Flags of the launchers that read them with argparse: each number has a range, and mistyped names are corrected."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from ross_jax.config import Range, nearest

SIZE = Range(1, 2**20)
SEED = Range(0, 2**31 - 1)


class Parser(argparse.ArgumentParser):
    """argparse's parser, in which every number has a range.

        parser.add_argument("--rows", type=int, within=Range(1, 4096))

    Raises:
      UserError: from `parse_args`, if a number is out of its range. Other mistakes print one line and exit with 2.
    """

    def __init__(self, **settings: Any):
        defaults = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(**(defaults | settings))
        self._ranges: dict[str, tuple[str, Range]] = {}

    def add_argument(self, *names: str, within: Range | None = None, **settings: Any) -> argparse.Action:
        """Adds a flag, with argparse's settings. `within` bounds a number."""
        action = super().add_argument(*names, **settings)
        if within is not None:
            self._ranges[action.dest] = (names[0], within)
        return action

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Reads flags. A mistyped flag gets the nearest name; a number out of its range raises UserError."""
        parsed, unknown = self.parse_known_args(args, namespace)
        self.refuse(unknown)
        return parsed

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Reads flags, and returns arguments that no flag takes. A number out of its range raises UserError."""
        parsed, unknown = super().parse_known_args(args, namespace)
        for dest, (name, within) in self._ranges.items():
            found = getattr(parsed, dest, None)
            for value in found if isinstance(found, (list, tuple)) else [found]:
                if value is not None:
                    within.check(name, value)
        return parsed, unknown

    def refuse(self, unknown: Sequence[str]) -> None:
        """Exits with one line, if there are any arguments that no flag takes."""
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(name + self.nearest(name) for name in unknown)}")

    def nearest(self, argument: str) -> str:
        """` (did you mean '--rows'?)` for a mistyped flag; the empty string if none is close."""
        return nearest(argument.partition("=")[0], self._flags()) if argument.startswith("-") else ""

    def error(self, message: str) -> NoReturn:
        """Prints usage and message, and exits with status 2."""
        self.exit(2, f"{self.format_usage()}error: {message}\n")

    def _flags(self) -> list[str]:
        """Names of all flags, those of subcommands included."""
        below = [
            parser
            for action in self._actions
            if isinstance(action, argparse._SubParsersAction)
            for parser in action.choices.values()
        ]
        return [*self._option_string_actions, *(name for parser in below for name in parser._flags())]
