"""Calls of Orbax: one error of ours for whatever it raises, and nothing printed."""

import contextlib
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath
from orbax.checkpoint._src.path import async_path
from orbax.checkpoint._src.path.atomicity import CommitFileTemporaryPath, ValidationError

from ross_jax.config import UserError
from ross_jax.directories import CheckpointError
from ross_jax.json_text import load_json
from ross_jax.storage import StorageError, is_remote, location

_SETTLE = 0.25
"""Seconds of silence after which nothing of a failed call is taken to be in flight any more."""


_METADATA = "_CHECKPOINT_METADATA"
COMMIT = "commit_success.txt"
"""File that Orbax writes last into a checkpoint."""
_LOST = re.compile(
    r"UNAVAILABLE|DEADLINE_EXCEEDED|CURL|Cannot connect|[Cc]onnection|[Tt]imed out|Timeout|HTTP response code: (5|429)|"
    r"Server disconnected"
)
"""What errors say if a bucket does not answer. Nothing is known to be damaged then."""


def orbax_path(folder: Path) -> epath.Path:
    """A path as Orbax takes it."""
    return epath.Path(str(folder.resolve()))


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    if (folder / COMMIT).exists():
        return True
    try:  # this time is written when everything else has been
        return bool(load_json(folder / _METADATA).get("commit_timestamp_nsecs"))
    except StorageError:
        raise
    except (OSError, ValueError, AttributeError):
        return False


class MarkedPath(CommitFileTemporaryPath):
    """A checkpoint that is written under its name, and marked at the end: nothing is renamed, on disks as in buckets.

    Checkpoints that got their names by being renamed count, too.
    """

    @classmethod
    async def validate(cls, temporary_path: epath.Path) -> None:
        if is_complete(location(str(temporary_path))) or not await async_path.is_dir(temporary_path):
            raise ValidationError(f"{temporary_path} is no incomplete checkpoint")

    @classmethod
    async def validate_final(cls, final_path: epath.Path) -> None:
        if not is_complete(location(str(final_path))):
            raise ValidationError(f"{final_path} is no complete checkpoint")


@contextlib.contextmanager
def orbax_call(folder: Path, fault: str, kind: type[CheckpointError] = CheckpointError) -> Iterator[None]:
    """A call of Orbax: whatever it raises becomes an error of this kind, and it prints nothing."""
    with silence(), checkpoint_error(folder, fault, kind):
        yield


@contextlib.contextmanager
def checkpoint_error(folder: Path, fault: str, kind: type[CheckpointError] = CheckpointError) -> Iterator[None]:
    """Turns whatever Orbax raises into an error of this kind.

    Orbax and tensorstore raise ValueError, OSError, RuntimeError and more for a damaged file or a full disk.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        root: BaseException = error
        while root.__cause__:
            root = root.__cause__
        if is_remote(folder) and _LOST.search(f"{type(root).__name__}: {root}"):
            reason = str(root).partition("\n")[0][:300]
            raise StorageError(f"{folder}: the storage does not answer as it should ({reason}); try again") from error
        system_error = re.search(r": ([\w ]+) \[", str(root)) if "os_error_code" in str(root) else None
        reason = system_error[1] if system_error else getattr(root, "strerror", None) or root
        array = re.search(r'in "(\S+?)/c/', str(root))
        if array:
            fault = f"{fault}: array {array[1]} is damaged"
        reason = str(reason).partition("\n")[0].partition(". See full TensorStore")[0][:1000]  # without specs of arrays
        raise kind(f"{folder}: {fault} ({reason})") from error


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keeps Orbax from printing, with tracebacks, the errors that it raises.

    Each of its threads logs an error on its own, asyncio logs errors that nobody awaited, and reads and writes that are
    still in flight call back into a closed event loop, or fail when they are collected, which Python hands to
    `sys.unraisablehook`. All of that may come after the error was raised, so a failed call ends when nothing has come
    for a while.
    """
    heard: list[float] = []  # when something was kept from being printed
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)  # of a coroutine that is collected before its end
        if str(unraisable.exc_value) == "Event loop is closed" or (code and _in_orbax(code.co_filename)):
            heard.append(time.monotonic())
        else:
            previous(unraisable)

    def keep(record: logging.LogRecord) -> bool:
        if _in_orbax(record.pathname) or "exception was never retrieved" in record.getMessage():
            heard.append(time.monotonic())
            return False
        return True

    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    for logger in loggers:
        logger.addFilter(keep)
    sys.unraisablehook = hook
    try:
        yield
    except BaseException:
        heard.append(time.monotonic())
        logging.getLogger("asyncio").addFilter(_is_not_orbax)  # stays: some tasks are collected when the process ends
        raise
    finally:
        while heard and time.monotonic() - heard[-1] < _SETTLE:
            time.sleep(_SETTLE / 5)
        sys.unraisablehook = previous
        for logger in loggers:
            logger.removeFilter(keep)


def _in_orbax(file: str) -> bool:
    return f"{os.sep}orbax{os.sep}" in file


def _is_not_orbax(record: logging.LogRecord) -> bool:
    """Whether a line of asyncio's log is kept: False for errors of Orbax's tasks, which nobody awaited."""
    message = record.getMessage()
    return not ("exception was never retrieved" in message and "orbax" in message)
