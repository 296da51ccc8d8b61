"""Typed configs: nested mappings in, frozen dataclasses out, and errors that name the field.

    from_dict(RunConfig, {"data": {"bach": 8}})     ConfigError: config.data.bach: no such field (did you mean 'batch'?)

Every module declares its own config as a frozen dataclass next to its code. `from_dict` makes one from a recipe's
values, a stored manifest or any other nested mapping; `to_dict` is its inverse.
"""

import contextlib
import dataclasses
import difflib
import itertools
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

T = TypeVar("T")


class UserError(Exception):
    """A mistake that the user can correct. The text says what is wrong, where, and what to do.

    Launchers print the text without a traceback and exit with status 1.
    """


class ConfigError(UserError):
    """A config that cannot be used."""


class Range(NamedTuple):
    """Bounds of a number: `batch: Annotated[int, Range(1, 4096)]`. A field of a config and a flag have one."""

    least: int | float
    most: int | float

    def problem(self, value: Any) -> str | None:
        """What is wrong with a number, such as "must be at least 1"; None if it is within the bounds."""
        whole = isinstance(self.least, int)
        if not isinstance(value, int if whole else int | float) or isinstance(value, bool) or value != value:
            return f"must be a {'whole ' if whole else ''}number from {self.least} to {self.most}"
        if value < self.least:
            return f"must be at least {self.least}"
        return f"must be at most {self.most}" if value > self.most else None

    def check(self, name: str, value: Any) -> None:
        """Raises UserError, with the name, if a number is out of bounds."""
        problem = self.problem(value)
        if problem:
            raise UserError(f"{name} {value!r}: {problem}")


def check_patterns(name: str, patterns: Iterable[str]) -> None:
    """Raises ValueError, with the field's name, if a regular expression is none."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{name}: {brief(pattern)} is no pattern ({error})") from error


Dtype = Literal["float32", "bfloat16", "float16"]
Size = Annotated[int, Range(1, 2**20)]
Layers = Annotated[int, Range(1, 1000)]
Count = Annotated[int, Range(1, 2**31 - 1)]
Whole = Annotated[int, Range(0, 2**31 - 1)]
Share = Annotated[float, Range(0.0, 1.0)]
Decay = Annotated[float, Range(0.0, 0.9999999)]
Factor = Annotated[float, Range(0.0, 1e6)]
Positive = Annotated[float, Range(1e-12, 1e12)]
Finite = Annotated[float, Range(-1e6, 1e6)]


def brief(value: Any, most: int = 120) -> str:
    """`repr` of a value for a message; a long one without its end."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def shortened(text: str, most: int = 1000) -> str:
    """A message; a long one without its middle."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def required(value: T | None) -> T:
    """The value of an optional field that is known to be set. Narrows its type."""
    assert value is not None
    return value


def nearest(name: str, names: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the closest of `names`; the empty string if none is close."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


_EXTENSIONS: dict[tuple[type, str, str], type] = {}
"""(config class, field, value of the field) -> the class outside the package that is meant; see `extends`."""


def extends(base: type, field: str = "kind") -> Callable[[type[T]], type[T]]:
    """Decorator: wherever a config has a field of type `base`, this subclass is meant if `field` has its value.

        @extends(VisionConfig)
        @dataclasses.dataclass(frozen=True)
        class Mine(VisionConfig):
            kind: Literal["mine"]

    A module that is imported, as by a recipe, adds its classes in this way.

    Raises:
      ValueError: another class has this value.
    """

    def add(cls: type[T]) -> type[T]:
        (value,) = typing.get_args(typing.get_type_hints(cls)[field])
        taken = _EXTENSIONS.setdefault((base, field, value), cls)
        if (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"{field} {value!r} of {base.__name__} is taken by {taken.__qualname__}")
        _EXTENSIONS[base, field, value] = cls
        return cls

    return add


def _extended(cls: type, values: Any) -> type:
    """The class that a mapping means where `cls` is expected."""
    if isinstance(values, Mapping):
        for (base, field, value), found in _EXTENSIONS.items():
            if base is cls and values.get(field) == value:
                return found
    return cls


def from_dict(cls: type[T], values: Any, path: str = "config") -> T:
    """Builds the dataclass `cls` from a nested mapping.

    A field that is a dataclass takes a mapping, a tuple takes any sequence, and a float takes an integer, too. The
    `__post_init__` of a config checks values across fields and raises `ValueError`.

    Args:
      cls: a dataclass.
      values: field -> value.
      path: name of the config in errors.

    Raises:
      ConfigError: unknown field (with the nearest name), missing field, wrong type or invalid value. Names the field.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: expected a mapping for {cls.__name__}, found {type(values).__name__}")
    cls = _extended(cls, values)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    for name in values:
        if name not in fields:
            raise ConfigError(
                f"{path}.{name}: no such field{nearest(name, fields)}; {cls.__name__} has {sorted(fields)}"
            )
    hints = typing.get_type_hints(cls, include_extras=True)
    kwargs, outside = {}, {}
    for name, field in fields.items():
        if name in values:
            kwargs[name] = _convert(hints[name], values[name], f"{path}.{name}")
            outside[name] = _out_of_range(hints[name], kwargs[name], name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{path}.{name}: missing, and it has no default")
    problems = {name: problem for name, problem in outside.items() if problem}
    try:
        config = cls(**kwargs)
    except (ValueError, ArithmeticError) as error:  # a division by a field that is 0, too
        named = any(name in str(error) for name in problems)
        reason = shortened(str(error)) if named or not problems else "; ".join(problems.values())
        raise ConfigError(f"{path}: {reason}") from error
    if problems:
        raise ConfigError(f"{path}: {'; '.join(problems.values())}")
    return config


def _out_of_range(hint: Any, value: Any, name: str) -> str | None:
    """What is wrong with the first number in a field's value that is out of its `Range`; None if nothing is."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if value is None:
        return None
    if origin is Annotated:
        found = inner[1].problem(value)
        return found and f"{name} is {brief(value)}; it {found}"
    if origin is tuple:
        hints = itertools.repeat(inner[0]) if inner[1:] == (Ellipsis,) else inner
        found = (_out_of_range(h, v, f"{name}[{i}]") for i, (h, v) in enumerate(zip(hints, value, strict=False)))
        return next(filter(None, found), None)
    if origin in (typing.Union, types.UnionType):
        return next(filter(None, (_out_of_range(h, value, name) for h in inner if h is not type(None))), None)
    return None


def variant(options: Sequence[type], values: Any, path: str) -> type:
    """The dataclass, of several that a field allows, that a mapping describes.

    Each declares its `kind` as a `Literal`, and the mapping's `kind` chooses. A mapping without one means the first.

    Raises:
      ConfigError: no dataclass has this `kind`.
    """
    if len(options) == 1 or not isinstance(values, Mapping) or "kind" not in values:
        return _extended(options[0], values)
    kinds = {kind: option for option in options for kind in typing.get_args(typing.get_type_hints(option)["kind"])}
    return kinds[_convert(typing.Literal[tuple(kinds)], values["kind"], f"{path}.kind")]


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return _convert(typing.get_args(hint)[0], value, path)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        options = [option for option in options if option is not type(None)]
        if len(options) == 1:
            return _convert(options[0], value, path)
        if all(map(dataclasses.is_dataclass, options)) and not isinstance(value, tuple(options)):
            return from_dict(variant(options, value, path), value, path)
        if any(isinstance(value, option) for option in options if isinstance(option, type)):
            return value
    elif origin is typing.Literal:
        choices = typing.get_args(hint)
        if value in choices:
            return value
        near = nearest(str(value)[:100], map(str, choices))
        raise ConfigError(f"{path}: {brief(value)} is none of {list(choices)}{near}")
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            item, *rest = typing.get_args(hint)
            if rest == [Ellipsis]:
                return tuple(_convert(item, v, f"{path}[{i}]") for i, v in enumerate(value))
            if len(value) != 1 + len(rest):
                raise ConfigError(f"{path}: expected {1 + len(rest)} values, found {len(value)}")
            return tuple(
                _convert(h, v, f"{path}[{i}]") for i, (h, v) in enumerate(zip((item, *rest), value, strict=True))
            )
    elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, path)
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # a whole number of 400 digits is none that float knows
            return float(value)
    elif hint is Any or (
        isinstance(hint, type) and isinstance(value, hint) and (hint is bool) == isinstance(value, bool)
    ):
        return value
    expected, found = getattr(hint, "__name__", hint), type(value).__name__
    raise ConfigError(f"{path}: expected {expected}, found {brief(value)} ({found})")


def to_dict(config: Any) -> Any:
    """The inverse of `from_dict`: nested dictionaries and lists, which JSON can hold."""
    if dataclasses.is_dataclass(config):
        return {field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, (list, tuple)):
        return [to_dict(item) for item in config]
    return config
