"""JSON of files that others wrote, within bounds of size and memory."""

import json
from pathlib import Path
from typing import Any

MAX_BYTES = 2**24
"""Most bytes of a file of settings. Objects in memory can take thirty times as much."""
_MAX_CONTAINERS = 2**21  # lists and objects
_MAX_DEPTH = 64


def parse_json(data: bytes, most: int = MAX_BYTES) -> Any:
    """The value of a JSON file.

    Raises:
      ValueError: no UTF-8, no JSON, more than `most` bytes, or values that would take much more memory than the file.
        The text says which.
    """
    if len(data) > most:
        raise ValueError(f"it has more than {most} bytes")
    if data.count(b"[") + data.count(b"{") > _MAX_CONTAINERS:
        raise ValueError(f"it has more than {_MAX_CONTAINERS} lists and objects")
    try:
        value = json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Raises ValueError if lists and objects lie in one another so deeply that recursive functions may fail."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        found = [each.values() if type(each) is dict else each for each in level if type(each) in (dict, list)]
        if not found:
            return
        level = [inner for each in found for inner in each]
    raise ValueError("it is nested too deeply")


def load_json(path: Path, most: int = MAX_BYTES) -> Any:
    """The value of a JSON file, read no further than `most` bytes. Raises OSError, and ValueError as `parse_json`."""
    with path.open("rb") as file:
        return parse_json(file.read(most + 1), most)
