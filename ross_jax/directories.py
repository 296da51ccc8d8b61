"""Directories that appear complete or not at all, digests of their files, and locks against a second writer."""

import contextlib
import datetime
import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

from ross_jax.config import UserError
from ross_jax.storage import BucketPath, StorageError, is_remote, remove_tree, write_whole

SUMS = "SHA256SUMS"
"""File of digests, as `sha256sum -c` reads it."""
INCOMPLETE = "INCOMPLETE"
"""File of a directory that is being written in place. Whoever reads finds nothing in such a directory."""
_BEAT = 10.0
"""Seconds between two heartbeats of a lock."""
_STALE = 60.0
"""Seconds without a heartbeat after which the lock of another host is free."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read or written."""


class DamagedError(CheckpointError):
    """Files that are not as they were written."""


def write_sums(folder: Path, files: Iterable[Path]) -> None:
    """Writes the digests of files below `folder`, its mark INCOMPLETE aside, into its `SHA256SUMS`."""
    names = sorted(path.relative_to(folder).as_posix() for path in files if path.name != INCOMPLETE)
    write_whole(folder / SUMS, "".join(f"{_digest(folder / name)}  {name}\n" for name in names))


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
    except StorageError:
        raise
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
            except StorageError:
                raise
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

    On a disk it is `.NAME.incomplete` beside the target. A disk that renames no directories, such as a mounted bucket,
    and a bucket itself get the target with a file INCOMPLETE in it, which is removed at the end. What a killed process
    left in either place is removed.

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
            if is_remote(target) or (target / INCOMPLETE).exists():
                _remove_marked(target)
            if is_remote(target):
                with _in_place(target):
                    yield target
                return
            remove_tree(partial)
            try:
                partial.mkdir()
                yield partial
                _rename(partial, target)
            finally:
                remove_tree(partial)
    except StorageError:
        raise
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error})") from error


@contextlib.contextmanager
def _in_place(target: Path) -> Iterator[None]:
    """While an empty target is filled: it is marked, and emptied if anything fails."""
    target.mkdir(exist_ok=True)
    (target / INCOMPLETE).write_text("What wrote this directory has not ended.\n")
    try:
        yield
    except BaseException:
        _remove_marked(target)
        raise
    (target / INCOMPLETE).unlink()


def _rename(partial: Path, target: Path) -> None:
    """Gives a complete directory its name, file by file where directories cannot be renamed."""
    with contextlib.suppress(OSError):
        partial.replace(target)
        return
    _check_free(target)
    with _in_place(target):
        for path in sorted(partial.rglob("*")):
            place = target / path.relative_to(partial)
            place.mkdir() if path.is_dir() else path.replace(place)


def _remove_marked(target: Path) -> None:
    """Removes an incomplete directory, its mark last."""
    if not target.exists():
        return
    mark = target / INCOMPLETE
    mark.touch()
    for path in target.iterdir():
        if path.name != mark.name:
            remove_tree(path) if path.is_dir() else path.unlink(missing_ok=True)
    remove_tree(target)


def refuse_incomplete(folder: Path) -> None:
    """Raises CheckpointError if a directory is being written, or was when its writer was killed."""
    if (folder / INCOMPLETE).exists():
        raise CheckpointError(
            f"{folder}: is incomplete: what writes it has not ended, or was interrupted; wait, or write it again"
        )


def _check_free(target: Path) -> None:
    if (target / INCOMPLETE).is_file():
        return  # by now nobody writes it, or else the lock is held
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
    if is_remote(path):
        with _bucket_lock(path, target):
            yield
        return
    with path.open("a+", encoding="utf-8") as file:
        mine = _acquire(file, path, target)
        try:
            with _meanwhile(functools.partial(_beat, path, target, mine)):
                yield
        finally:
            if _is_current(file, path):
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def _meanwhile(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Runs `work` in a thread, and sets its event when the block ends."""
    done = threading.Event()
    thread = threading.Thread(target=work, args=(done,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


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
    mine = json.dumps(_this_process() | {"since": _now()})
    file.truncate(0)
    file.write(mine)
    file.flush()
    return mine


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _held(target: Path, holder: dict[str, Any]) -> CheckpointError:
    who = "process {pid} on {host}, since {since}".format(**holder) if holder else "it has just begun or ended"
    return CheckpointError(f"{target}: another process is writing it ({who})")


def _holder(path: Path) -> dict[str, Any]:
    """What a lock's file says of its holder; empty if it says nothing, as while it is being written."""
    try:
        return _parse_holder(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _parse_holder(text: str | bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
        return {name: found[name] for name in ("host", "boot", "pid", "started", "since")}
    except (ValueError, KeyError, TypeError):
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
    return _beats(lambda: _modified(path), holder, target)


def _beats(sign: Callable[[], int], holder: dict[str, Any], target: Path) -> bool:
    """Whether a sign of life of a holder on another host changes within the time after which its lock is free."""
    first, until = sign(), time.monotonic() + _STALE
    print(f"{target}: waits whether process {holder['pid']} on {holder['host']} is still writing", file=sys.stderr)
    while time.monotonic() < until:
        time.sleep(_BEAT / 10)
        if sign() != first:
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
                _taken_over(target)
            os.utime(path)


def _taken_over(target: Path) -> NoReturn:
    print(f"error: {target}: another process has taken over", file=sys.stderr, flush=True)
    os._exit(1)


@contextlib.contextmanager
def _bucket_lock(path: BucketPath, target: Path) -> Iterator[None]:
    """`lock` in a bucket. Writes are conditional on the generation, and each heartbeat makes a new one."""
    if target == target.parent:
        raise CheckpointError(f"{target}: is a whole bucket; name a folder in it")
    mine = json.dumps(_this_process() | {"since": _now(), "token": secrets.token_hex(8)}).encode()
    generation = _take(path, mine, target)

    def beat(done: threading.Event) -> None:
        nonlocal generation
        while not done.wait(_BEAT):
            with contextlib.suppress(StorageError):  # the next beat may succeed
                generation = path.write_version(mine, generation) or _taken_over(target)

    try:
        with _meanwhile(beat):
            yield
    finally:
        with contextlib.suppress(StorageError):  # is free after a minute
            path.unlink_version(generation)


def _take(path: BucketPath, mine: bytes, target: Path) -> int:
    """Makes this process the holder of a bucket's lock, and returns the generation that it wrote."""
    found = path.read_version()
    if found is not None:
        holder, here = _parse_holder(found[0]), _this_process()
        if holder and (holder["host"], holder["boot"]) == (here["host"], here["boot"]):
            lives = holder["started"] == _started(holder["pid"])
        else:
            lives = bool(holder) and _beats(lambda: (path.read_version() or (b"", 0))[1], holder, target)
        if lives:
            raise _held(target, holder)
    generation = path.write_version(mine, found[1] if found else 0)
    if generation is None:
        raise _held(target, _parse_holder((path.read_version() or (b"", 0))[0]))
    return generation
