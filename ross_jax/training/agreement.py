"""What the processes of a run compare before they train together.

They talk through the coordinator that `jax.distributed` starts: its keys and values, and its barrier. Collectives, such
as those of `jax.experimental.multihost_utils`, need the devices first, wait without bound for a process that never
comes, and abort all processes where one fails.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax._src import distributed  # JAX has no public way to the coordinator's keys and values

from ross_jax.checkpoints import writing
from ross_jax.config import ConfigError, UserError
from ross_jax.console import PATIENCE, say
from ross_jax.training.heartbeat import FAILURES, POLL, TRY_AGAIN, Heartbeat, take_leave

_SHARED = 60
"""Seconds within which a new file must be seen on all hosts: NFS caches directories for as long."""
_SHOWN = 4
"""Most differences, or processes with the same value, that a message names."""
_FOREVER = 365 * 24 * 3600
_numbers = itertools.count()

Facts = dict[str, str]


class PeerError(UserError):
    """Another process has failed, or differs from this one."""


class MissingError(PeerError):
    """Another process is not there, so that the same command may succeed later."""


def join(coordinator: str | None, processes: int | None, process: int | None, timeout: int, lost: int = 100) -> None:
    """Meets the other processes of the cluster, and ends this one if later one of them is lost or fails.

    Ends the process with status 75 if not all come within `timeout` seconds. JAX would abort it with a stack trace.

    Args:
      coordinator, processes, process: address of process 0, number of processes, and number of this one. None: what JAX
        finds out itself.
      lost: seconds within which this process ends after another one is lost.

    Raises:
      ConfigError: there is no cluster, or one that JAX does not recognise.
    """
    together = threading.Event()

    def give_up() -> None:
        state = distributed.global_state
        if not together.wait(PATIENCE) and state.process_id == 0:
            say(f"process 0 of {state.num_processes} on {socket.gethostname()} waits for the others")
        if not together.wait(timeout - PATIENCE):
            print(
                f"error: --distributed: process {state.process_id} of {state.num_processes} on {socket.gethostname()} "
                f"waited {timeout} s at {state.coordinator_address}, and not all others came. Look at the process that "
                "has not written this, or give them longer with --start_timeout",
                file=sys.stderr,
                flush=True,
            )
            os._exit(TRY_AGAIN)

    threading.Thread(target=give_up, daemon=True).start()
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=timeout + 60,
            heartbeat_timeout_seconds=2 * lost + 60,  # JAX aborts, and so shall come later than `Heartbeat`
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise ConfigError(f"--distributed: {error} Set --coordinator, --processes and --process") from error
    finally:
        together.set()
    if not alone():
        Heartbeat(distributed.global_state, lost).start()


def alone() -> bool:
    """Whether this process trains by itself."""
    return distributed.global_state.client is None or distributed.global_state.num_processes == 1


def is_first() -> bool:
    """Whether this is process 0, which speaks for all. Asks no device, so it is known before there are any."""
    return distributed.global_state.process_id == 0


def enter_directory(relative: Sequence[str], timeout: int) -> None:
    """Changes to the working directory of process 0, from which relative paths count on all processes.

    Args:
      relative: paths that count from the working directory.

    Raises:
      PeerError: on all processes: a host has no such directory, and there are relative paths. Other errors are those of
        `agree`.
    """
    if alone():
        return
    place = _exchange({"directory": str(Path.cwd())}, timeout)[0]["directory"]
    there = Path(place).is_dir()
    if there:
        os.chdir(place)
    said = _exchange({"there": str(there)}, timeout)
    blind = [process for process, facts in said.items() if facts["there"] != "True"]
    if blind and relative:
        raise PeerError(
            f"{place}, the working directory of {_names([0], said)}, is not there on {_names(blind, said)}, and these "
            f"paths count from it: {', '.join(relative[:_SHOWN])}. Make them absolute, or start in a directory that "
            "all hosts have"
        )


def leave(error: UserError) -> None:
    """Tells the other processes why this one fails, and ends it with status 1, or 75 if another one is missing.

    The process ends at once: a usual exit waits, for minutes, until the others leave too, and they wait for this one.
    """
    if not alone():
        state = distributed.global_state
        if not isinstance(error, PeerError):
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # no coordinator any more
                state.client.key_value_set(f"{FAILURES}{state.process_id}", f"on {socket.gethostname()}: {error}")
        take_leave(state)
    os._exit(TRY_AGAIN if isinstance(error, MissingError) else 1)


def leave_unexpectedly(error: Exception, lost: int) -> None:
    """Prints the traceback of an error that is not the user's, and leaves.

    A computation also fails if another process is lost. That is named within `lost` seconds, and ends this process.
    """
    traceback.print_exception(error)
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error) and not alone():
        time.sleep(lost)
    leave(UserError(f"failed: {type(error).__name__}: {error}"))


def agree(facts: Mapping[str, Any], timeout: int) -> None:
    """Returns once all processes have called it with the same facts.

    Raises:
      PeerError: on all processes: facts differ; names who has which. Or another process has failed.
      MissingError: on all that came: a process did not come within `timeout` seconds.
    """
    if not alone():
        _refuse(_differences(_exchange({name: str(value) for name, value in facts.items()}, timeout)))


def first_error(error: str, timeout: int) -> str:
    """An error of any process, with its host; empty if no process has one. All processes call it together.

    Args:
      error: this process's error; empty if it has none.

    Raises:
      MissingError: on all that came: a process did not come within `timeout` seconds.
    """
    if alone():
        return error
    said = _exchange({"error": error}, timeout)
    found = [(process, facts) for process, facts in sorted(said.items()) if facts["error"]]
    return f"process {found[0][0]} ({found[0][1]['host']}): {found[0][1]['error']}" if found else ""


def check_shared(folder: Path, timeout: int) -> None:
    """Returns once all processes have seen a file that process 0 made in `folder`, which is made if it is absent.

    Raises:
      CheckpointError: on process 0: it cannot write there.
      PeerError: on all processes: one does not see the file; names it. Other errors are those of `agree`.
    """
    if alone():
        return
    path = folder / f".shared-{secrets.token_hex(8)}"
    first = distributed.global_state.process_id == 0
    try:
        if first:
            with writing(path, folder):
                folder.mkdir(parents=True, exist_ok=True)
                path.touch()
        name = _exchange({"name": path.name}, timeout)[0]["name"]
        patience = min(timeout, _SHARED)
        deadline = time.monotonic() + patience
        while not (seen := (folder / name).exists()) and time.monotonic() < deadline:
            time.sleep(0.2)
        _refuse(_not_seen(_exchange({"folder": str(folder.resolve()), "seen": str(seen)}, patience + timeout)))
    finally:
        if first:
            path.unlink(missing_ok=True)


def barrier() -> None:
    """Returns once all processes have called it, however long that takes.

    Raises:
      PeerError: another process has failed.
    """
    if not alone():
        _wait(f"ross_jax/barrier/{next(_numbers)}", _FOREVER)


@functools.cache
def code_version() -> dict[str, str]:
    """Hashes of all source files of this package, and versions of the libraries that compute."""
    package = Path(__file__).parents[1]
    files = {
        f"code of ross_jax/{path.relative_to(package).as_posix()}": hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        for path in sorted(package.rglob("*.py"))
    }
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    return files | {f"version of {name}": version for name, version in versions.items()}


def _refuse(text: str) -> None:
    if text:
        raise PeerError(text)


def _exchange(facts: Facts, timeout: int) -> dict[int, Facts]:
    """Process -> its facts and `host`, once all processes have called it. Errors are those of `agree`."""
    state, key = distributed.global_state, f"ross_jax/exchange/{next(_numbers)}/"
    state.client.key_value_set(f"{key}{state.process_id}", json.dumps({"host": socket.gethostname(), **facts}))
    try:
        _wait(key, timeout)
        late = False
    except TimeoutError:
        late = True
    found = state.client.key_value_dir_get(key)
    said = {int(path.rpartition("/")[2]): json.loads(value) for path, value in found}
    if late:
        missing = [process for process in range(state.num_processes) if process not in said]
        who = f"{_names(missing)} said nothing" if missing else "not all processes came"
        raise MissingError(f"{who} for {timeout} s while the run was starting; look at its log")
    return said


def _wait(key: str, timeout: int) -> None:
    """Returns once all processes wait for the same key. All of them time out together.

    Raises:
      PeerError: a process has failed.
      MissingError: the coordinator is gone.
      TimeoutError: not all have come within `timeout` seconds.
    """
    client, errors = distributed.global_state.client, []

    def wait() -> None:
        try:
            client.wait_at_barrier(key, timeout * 1000)
        except jax.errors.JaxRuntimeError as error:
            errors.append(error)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    try:
        while waiting.is_alive():
            waiting.join(POLL)
            for path, failure in sorted(client.key_value_dir_get(FAILURES)):
                raise PeerError(f"process {path.rpartition('/')[2]} {failure}")
        if errors:
            raise errors[0]
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" in str(error):
            raise TimeoutError from None
        raise MissingError(f"the coordinator does not answer any more: {error}") from error


def _names(processes: list[int], said: Mapping[int, Facts] | None = None) -> str:
    """`process 1 (host)`, `processes 0 (host), 2 (other)`, `processes 0 (host), ... and 9 more`."""
    names = [f"{process} ({said[process]['host']})" if said else str(process) for process in processes]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"process{'es' if len(names) > 1 else ''} {', '.join(names[:_SHOWN])}{more}"


def _differences(said: Mapping[int, Facts]) -> str:
    """Who says what of facts that differ; empty if none does."""
    lines = []
    for name in dict.fromkeys(itertools.chain.from_iterable(said.values())):
        if name == "host":
            continue
        holders: dict[str | None, list[int]] = {}
        for process, facts in said.items():
            holders.setdefault(facts.get(name), []).append(process)
        if len(holders) > 1:
            parts = (f"{value} on {_names(processes, said)}" for value, processes in holders.items())
            lines.append(f"{name}: {', '.join(parts)}")
    if not lines:
        return ""
    more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "\n  ".join(["the processes differ, and would train different runs:", *lines[:_SHOWN], *more])


def _not_seen(said: Mapping[int, Facts]) -> str:
    """Who does not see the file of process 0, and where it looked; empty if all do."""
    blind = [process for process, facts in said.items() if facts["seen"] != "True"]
    if not blind:
        return ""
    there, here = said[0]["folder"], said[blind[0]]["folder"]
    return (
        f"--workdir: what {_names([0], said)} wrote to {there} is not in {here} of {_names(blind, said)}; give a "
        "directory that all hosts share"
    )
