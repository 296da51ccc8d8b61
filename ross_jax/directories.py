"""Directories that appear complete or not at all, digests of their files, and locks against a second writer."""

import contextlib
import datetime
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from ross_jax.config import UserError

SUMS = "SHA256SUMS"
"""File of digests, as `sha256sum -c` reads it."""
_BEAT = 10.0
"""Seconds between two heartbeats of a lock."""
_STALE = 60.0
"""Seconds without a heartbeat after which the lock of another host is free."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read or written."""


class DamagedError(CheckpointError):
    """Files that are not as they were written."""


def write_sums(folder: Path, files: Iterable[Path]) -> None:
    """Writes the digests of files below `folder` into its `SHA256SUMS`."""
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    partial = folder / f".{SUMS}.partial"
    partial.write_text("".join(f"{_digest(folder / name)}  {name}\n" for name in names), encoding="utf-8")
    partial.replace(folder / SUMS)


def check_sums(folder: Path, required: str = "", beginnings: tuple[str, ...] = ("",)) -> bool:
    """Compares files with the digests in the folder's `SHA256SUMS`.

    Args:
      required: name of a file whose digest must be there; empty if none must.
      beginnings: only files whose names begin with one of these are compared.

    Returns:
      False if the folder has no digests, or nothing is required and they are of another form.

    Raises:
      DamagedError: a file is missing or has another content; names it.
    """
    path = folder / SUMS
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise DamagedError(f"{path}: cannot be read ({error})") from error
    if not required and not all(re.fullmatch(r"[0-9a-f]{64}  .+", line) for line in lines):
        return False  # somebody else's
    recorded = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if required and required not in recorded:
        raise DamagedError(f"{path}: damaged: it has no digest of {required}")
    for name, digest in recorded.items():
        if name.startswith(beginnings):
            try:
                found = _digest(folder / name)
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise DamagedError(f"{folder / name}: cannot be read ({reason}), but {path} lists it") from error
            if found != digest:
                hint = "; if it was changed on purpose, put its new SHA-256 there" if name.endswith(".json") else ""
                raise DamagedError(f"{folder / name}: damaged: its SHA-256 is not the one in {path}{hint}")
    return True


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def complete_directory(target: Path) -> Iterator[Path]:
    """Yields a directory to fill, which becomes `target` at the end, or disappears if anything fails.

    It is `.NAME.incomplete` beside the target. What a killed process left there is removed.

    Raises:
      CheckpointError: the target exists and is not empty, or another process is writing it.
    """
    try:
        target = target.resolve()
        _check_free(target)
        partial = target.with_name(f".{target.name}.incomplete")
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock(target):
            _check_free(target)  # another may just have finished
            shutil.rmtree(partial, ignore_errors=True)
            try:
                partial.mkdir()
                yield partial
                partial.replace(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error})") from error


def _check_free(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target}: exists already; choose another output or remove it first")


@contextlib.contextmanager
def lock(target: Path) -> Iterator[None]:
    """Held by one process at a time, in `.NAME.lock` beside the target.

    The lock of a dead process is free at once on its own host. From another host it is free after a minute without a
    heartbeat, for which this function waits. A process whose lock was taken in that way, because it was stopped for
    longer than that, ends with status 1.

    Raises:
      CheckpointError: another process holds it; names host and process.
    """
    path = target.with_name(f".{target.name}.lock")
    with path.open("a+", encoding="utf-8") as file:
        mine = _acquire(file, path, target)
        done = threading.Event()
        beating = threading.Thread(target=_beat, args=(path, target, mine, done), daemon=True)
        beating.start()
        try:
            yield
        finally:
            done.set()
            beating.join()
            if _is_current(file, path):
                path.unlink(missing_ok=True)


def _acquire(file: TextIO, path: Path, target: Path) -> str:
    """Makes this process the holder, and returns what it wrote into the file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        flocked = True
    except BlockingIOError:
        raise _held(target, _holder(path)) from None
    except OSError as error:  # a file system without locks
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        flocked = False
    # Its holder may have removed the file between opening and locking: then the lock guards nothing.
    if not _is_current(file, path):
        raise _held(target, {})
    holder = _holder(path)
    if _lives(holder, path, flocked, target):
        raise _held(target, holder)
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    mine = json.dumps(_this_process() | {"since": since})
    file.truncate(0)
    file.write(mine)
    file.flush()
    return mine


def _held(target: Path, holder: dict[str, Any]) -> CheckpointError:
    who = "process {pid} on {host}, since {since}".format(**holder) if holder else "it has just begun or ended"
    return CheckpointError(f"{target}: another process is writing it ({who})")


def _holder(path: Path) -> dict[str, Any]:
    """What a lock's file says of its holder; empty if it says nothing, as while it is being written."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {name: found[name] for name in ("host", "boot", "pid", "started", "since")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _lives(holder: dict[str, Any], path: Path, flocked: bool, target: Path) -> bool:
    """Whether the holder of a lock is at work.

    Args:
      flocked: whether the file system has given this process the lock, so that no process of this host holds it.
    """
    if not holder:
        return False
    here = _this_process()
    if (holder["host"], holder["boot"]) == (here["host"], here["boot"]):
        return not flocked and holder["started"] == _started(holder["pid"])
    beat, until = _modified(path), time.monotonic() + _STALE
    print(f"{target}: waits whether process {holder['pid']} on {holder['host']} is still writing", file=sys.stderr)
    while time.monotonic() < until:
        time.sleep(_BEAT / 10)
        if _modified(path) != beat:
            return True
    return False


def _modified(path: Path) -> int:
    with path.open() as file:  # NFS looks at the server when a file is opened
        return os.fstat(file.fileno()).st_mtime_ns


def _this_process() -> dict[str, Any]:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.is_file() else "",
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def _started(pid: int) -> str:
    """When a process started, in the kernel's ticks; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _is_current(file: TextIO, path: Path) -> bool:
    """Whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _beat(path: Path, target: Path, mine: str, done: threading.Event) -> None:
    while not done.wait(_BEAT):
        with contextlib.suppress(OSError):  # a full or distant disk is no reason to end
            if path.read_text(encoding="utf-8") != mine:
                print(f"error: {target}: another process has taken over", file=sys.stderr, flush=True)
                os._exit(1)
            os.utime(path)
