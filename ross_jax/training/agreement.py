"""What the processes of a run hold against one another before they train together.

They talk through the coordinator that `jax.distributed` starts. A collective would wait without bound for a process
that never comes, would abort all of them where one fails, and needs the devices first.
"""

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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax._src import distributed  # JAX has no public way to the coordinator's keys and values

from ross_jax.checkpoints import writing
from ross_jax.config import ConfigError, UserError

_POLL = 2.0
"""Seconds between two looks at whether another process has failed."""
_SHARED = 60
"""Seconds in which a new file must be seen everywhere; NFS caches directories for as long."""
_LEAVE = 5.0
"""Seconds that the coordinator outlives a failure, so that the others can say what they know."""
_FAILURES = "ross_jax/failures/"
_SHOWN = 4
_TRY_AGAIN = 75
"""Exit status if a process is missing: EX_TEMPFAIL of sysexits.h."""
_numbers = itertools.count()


class PeerError(UserError):
    """Another process has failed, or is not like this one."""


class MissingError(PeerError):
    """Another process is not there, so that the same command may do better later."""


def join(coordinator: str | None, processes: int | None, process: int | None, timeout: int) -> None:
    """Meets the other processes of the cluster; None: what JAX finds out itself.

    If not all have come within `timeout` seconds, the process ends with status 75; JAX would abort it, with a stack
    trace.

    Raises:
      ConfigError: no cluster, or one that JAX cannot make out.
    """
    together = threading.Event()

    def give_up() -> None:
        if not together.wait(timeout):
            state = distributed.global_state
            print(
                f"error: --distributed: process {state.process_id} of {state.num_processes} on {socket.gethostname()} "
                f"waited {timeout} s at {state.coordinator_address}, and not all others came. Look at the process that "
                "has not written 'waits for the others', or give them longer with --start_timeout",
                file=sys.stderr,
                flush=True,
            )
            os._exit(_TRY_AGAIN)

    threading.Thread(target=give_up, daemon=True).start()
    where = f"process {'?' if process is None else process} on {socket.gethostname()}"
    print(f"{where} waits for the others", file=sys.stderr, flush=True)
    try:
        jax.distributed.initialize(coordinator, processes, process, initialization_timeout=timeout + 60)
    except (ValueError, RuntimeError, OSError) as error:
        raise ConfigError(f"--distributed: {error} Set --coordinator, --processes and --process") from error
    finally:
        together.set()


def alone() -> bool:
    """Whether this process trains by itself."""
    return distributed.global_state.client is None or distributed.global_state.num_processes == 1


def leave(error: UserError) -> None:
    """Ends this process once the others know why: with status 1, or 75 if one of them is missing.

    At a usual exit JAX waits, for minutes, until the others leave too; they wait for this one.
    """
    if not alone():
        state = distributed.global_state
        if not isinstance(error, PeerError):
            state.client.key_value_set(f"{_FAILURES}{state.process_id}", f"on {socket.gethostname()}: {error}")
        if state.process_id == 0:
            time.sleep(_LEAVE)
    os._exit(_TRY_AGAIN if isinstance(error, MissingError) else 1)


def agree(facts: Mapping[str, Any], timeout: int) -> None:
    """Returns once all processes have come here with the same facts.

    Raises:
      PeerError: on all processes: facts that differ, each with who says what; or another process's failure.
      MissingError: on all others: processes that have not come within `timeout` seconds.
    """
    _consult({name: str(value) for name, value in facts.items()}, _differences, timeout)


def check_shared(folder: Path, timeout: int) -> None:
    """Returns once all processes have seen a file that the first made in `folder`, which is made if need be.

    Raises:
      CheckpointError: on the first process: it cannot write there.
      PeerError: on all processes: who does not see the file.
    """
    if alone():
        return
    key, path = f"ross_jax/shared/{next(_numbers)}", None
    if distributed.global_state.process_id == 0:
        path = folder / f".shared-{secrets.token_hex(8)}"
        with writing(path, folder):
            folder.mkdir(parents=True, exist_ok=True)
            path.touch()
        distributed.global_state.client.key_value_set(key, path.name)
    try:
        name = path.name if path else _wait(key, time.monotonic() + timeout, "process 0")
        patience = min(timeout, _SHARED)
        deadline = time.monotonic() + patience
        while not (seen := (folder / name).exists()) and time.monotonic() < deadline:
            time.sleep(0.2)
        _consult({"folder": str(folder.resolve()), "seen": str(seen)}, _not_seen, patience + timeout)
    finally:
        if path:
            path.unlink(missing_ok=True)


class Turn:
    """What the first process does before the others, who wait for it however long it takes."""

    def __init__(self):
        self._key = f"ross_jax/turn/{next(_numbers)}"

    def done(self) -> None:
        """The first process is done."""
        if not alone() and distributed.global_state.process_id == 0:
            distributed.global_state.client.key_value_set(self._key, "done")

    def wait(self) -> None:
        """Returns at once on the first process; on the others when it is done, or with its failure as PeerError."""
        if not alone() and distributed.global_state.process_id:
            _wait(self._key, None, "process 0")


@functools.cache
def code_version() -> dict[str, str]:
    """A hash of every source file of this package, and the versions of what computes."""
    package = Path(__file__).parents[1]
    files = {
        f"code of ross_jax/{path.relative_to(package).as_posix()}": hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        for path in sorted(package.rglob("*.py"))
    }
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    return files | {f"version of {name}": version for name, version in versions.items()}


def _consult(mine: dict[str, str], judge: Callable[[dict[int, dict[str, str]]], str], timeout: int) -> None:
    """The first process collects and judges what all say; its verdict, if there is one, is everyone's PeerError."""
    if alone():
        return
    state, key = distributed.global_state, f"ross_jax/consult/{next(_numbers)}"
    state.client.key_value_set(f"{key}/{state.process_id}", json.dumps({"host": socket.gethostname(), **mine}))
    deadline = time.monotonic() + timeout
    if state.process_id == 0:
        said = {}
        for process in range(state.num_processes):
            try:
                said[process] = json.loads(_wait(f"{key}/{process}", deadline, f"process {process}"))
            except TimeoutError:
                continue
        missing = [process for process in range(state.num_processes) if process not in said]
        silent = f"{_names(missing)} said nothing for {timeout} s while the run was starting; look at its log"
        verdict = {"missing": bool(missing), "text": silent if missing else judge(said)}
        state.client.key_value_set(f"{key}/verdict", json.dumps(verdict))
    else:
        verdict = json.loads(_wait(f"{key}/verdict", deadline + _SHARED, "process 0"))
    if verdict["text"]:
        raise (MissingError if verdict["missing"] else PeerError)(verdict["text"])


def _wait(key: str, deadline: float | None, whom: str) -> str:
    """The value of a key, once it is there.

    Raises:
      PeerError: a process has failed.
      MissingError: the coordinator is gone; or, except on the first process, at the deadline, naming `whom`.
      TimeoutError: on the first process, at the deadline.
    """
    client = distributed.global_state.client
    while True:
        left = _POLL if deadline is None else min(_POLL, max(deadline - time.monotonic(), 0.05))
        try:
            return client.blocking_key_value_get(key, int(left * 1000))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise MissingError(f"the coordinator does not answer any more: {error}") from error
        for path, failure in sorted(client.key_value_dir_get(_FAILURES)):
            raise PeerError(f"process {path.rpartition('/')[2]} {failure}")
        if deadline is not None and time.monotonic() >= deadline:
            if distributed.global_state.process_id == 0:
                raise TimeoutError
            raise MissingError(f"{whom} said nothing while the run was starting; look at its log")


def _names(processes: list[int], said: Mapping[int, Mapping[str, str]] | None = None) -> str:
    """`process 1 (host)`, `processes 0 (host), 2 (other)`; few of many."""
    names = [f"{process} ({said[process]['host']})" if said else str(process) for process in processes]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"process{'es' if len(names) > 1 else ''} {', '.join(names[:_SHOWN])}{more}"


def _differences(said: dict[int, dict[str, str]]) -> str:
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


def _not_seen(said: dict[int, dict[str, str]]) -> str:
    blind = [process for process, facts in said.items() if facts["seen"] != "True"]
    if not blind:
        return ""
    there, here = said[0]["folder"], said[blind[0]]["folder"]
    return (
        f"--workdir: what {_names([0], said)} wrote to {there} is not in {here} of {_names(blind, said)}; give a "
        "directory that all hosts share"
    )
