"""JSON of files that others wrote, within bounds of size and memory."""

import json
from typing import Any

MAX_BYTES = 2**24
"""Most bytes of a file of settings. Objects in memory can take thirty times as much."""
_MAX_CONTAINERS = 2**21  # lists and objects


def parse_json(data: bytes, most: int = MAX_BYTES) -> Any:
    """The value of a JSON file.

    Raises:
      ValueError: no UTF-8, no JSON, more than `most` bytes, or values that would take much more memory than the file.
        The text says which.
    """
    if len(data) > most:
        raise ValueError(f"it has {len(data)} bytes, more than {most}")
    if data.count(b"[") + data.count(b"{") > _MAX_CONTAINERS:
        raise ValueError(f"it has more than {_MAX_CONTAINERS} lists and objects")
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise ValueError("it has lists or objects that are nested too deeply") from error
