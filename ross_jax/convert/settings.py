"""Reads a config.json field by field, checks types and ranges, and names everything that is wrong in one error."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from ross_jax.config import ConfigError, from_dict

T = TypeVar("T")

MAX_SIZE = 2**20
"""Largest width. It is far above any model's, and products of several stay within 64 bits."""
MAX_LAYERS = 1000


class Settings:
    """Fields of a foreign config.

    A field that is absent or null has its default. Without a default it is required. A wrong value is noted in
    `problems` and replaced by a valid one, so that reading goes on. `check` and `build` raise all problems.
    """

    def __init__(self, values: Mapping[str, Any], where: str, prefix: str = "", problems: list[str] | None = None):
        """Wraps a parsed config.

        Args:
          values: the parsed fields.
          where: name of the file, for messages.
          prefix: what to put before the names of fields in messages ("rope_scaling.").
          problems: list to note problems in, shared with other settings.
        """
        self.values, self.where, self._prefix = values, where, prefix
        self.problems: list[str] = [] if problems is None else problems

    def size(self, name: str, default: int | None = None, most: int = MAX_SIZE) -> int:
        """Reads a whole number from 1 to `most`."""
        return self._read(name, default, 1, f"a whole number from 1 to {most}", lambda v: _is_size(v, most))

    def integer(self, name: str, default: int) -> int:
        """Reads a whole number of either sign."""
        return self._read(name, default, default, "a whole number", lambda v: type(v) is int and _is_size(abs(v) + 1))

    def number(self, name: str, default: float | None = None, positive: bool = True) -> float:
        """Reads a finite number: above 0, or of either sign if not `positive`."""
        expected = "a number above 0" if positive else "a number"
        return float(self._read(name, default, 1.0, expected, lambda v: _is_number(v) and (v > 0 or not positive)))

    def numbers(self, name: str, default: Sequence[float]) -> tuple[float, ...]:
        """Reads a list of as many finite numbers as `default` has."""
        count = len(default)
        read = self._read(name, default, default, f"a list of {count} numbers", _list_of(_is_number, count, count))
        return tuple(map(float, read))

    def flag(self, name: str, default: bool = False) -> bool:
        """Reads a boolean."""
        return self._read(name, default, default, "true or false", lambda v: isinstance(v, bool))

    def text(self, name: str, default: str) -> str:
        """Reads a string."""
        return self._read(name, default, default, "a string", lambda v: isinstance(v, str))

    def texts(self, name: str, default: Sequence[str], most: int) -> tuple[str, ...]:
        """Reads a list of at most `most` strings."""
        fits = _list_of(lambda v: isinstance(v, str), 0, most)
        return tuple(self._read(name, default, default, f"a list of at most {most} strings", fits))

    def sizes(self, name: str, default: Sequence[int], most: int) -> tuple[int, ...]:
        """Reads a list of 1 to `most` whole numbers above 0."""
        fits = _list_of(_is_size, 1, most)
        return tuple(self._read(name, default, default, f"a list of 1 to {most} whole numbers above 0", fits))

    def ids(self, name: str) -> tuple[int, ...]:
        """Reads a token's id or a list of ids; empty if absent."""

        def fits(value: Any) -> bool:
            return all(type(each) is int and 0 <= each < 2**31 for each in (value if type(value) is list else [value]))

        read = self._read(name, (), (), "a token's id or a list of ids", fits)
        return (read,) if type(read) is int else tuple(read)

    def inner(self, name: str) -> "Settings":
        """Reads an object. It is empty if absent, and its problems are noted in the same list."""
        values = self._read(name, {}, {}, "an object", lambda v: isinstance(v, dict))
        return Settings(values, self.where, f"{self._prefix}{name}.", self.problems)

    def only(self, name: str, *accepted: Any) -> None:
        """Notes a problem if the field is present, not null and not one of the accepted values."""
        if self.values.get(name) is not None and self.values[name] not in accepted:
            self.refuse(name, " or ".join(map(repr, accepted)) or "null")

    def refuse(self, name: str, supported: str) -> None:
        """Notes that the value of a field is not supported, and which values are."""
        self.problems.append(
            f"{self._prefix}{name} {_show(self.values.get(name))} is not supported; expected {supported}"
        )

    def check(self) -> None:
        """Raises all problems as one ConfigError, if there are any."""
        if self.problems:
            raise ConfigError(f"{self.where}: {'; '.join(self.problems)}")

    def build(self, cls: type[T], **fields: Any) -> T:
        """Makes a config of type `cls`, or raises all problems as one ConfigError."""
        self.check()
        return from_dict(cls, fields, self.where)

    def _read(self, name: str, default: Any, stand_in: Any, expected: str, fits: Callable[[Any], bool]) -> Any:
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if value is not None and fits(value):
            return value
        found = "missing" if value is None else _show(value)
        self.problems.append(f"{self._prefix}{name} is {found}, expected {expected}")
        return stand_in


def _is_size(value: Any, most: int = MAX_SIZE) -> bool:
    return type(value) is int and 1 <= value <= most


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)


def _list_of(fits: Callable[[Any], bool], least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and least <= len(value) <= most and all(map(fits, value))


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."
