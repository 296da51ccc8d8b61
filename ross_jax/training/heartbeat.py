"""Signs of life, so that all processes of a cluster end soon after one of them is lost.

Every two seconds each process writes a sign of life to the coordinator, which process 0 runs. Process 0 names those
whose signs stay out. The others learn that process 0 is lost from a coordinator that does not answer.

JAX aborts a process if another one is lost, with a page of text. It is told to wait longer than this file does. But it
takes a broken connection to process 0 for a loss at once, so the signal of an abort is caught.
"""

import atexit
import contextlib
import ctypes
import json
import signal
import socket
import threading
import time
from collections.abc import Collection
from typing import Any

import jax

from ross_jax import process

TRY_AGAIN = 75
"""Exit status if the same command may succeed later, as where a process is missing: EX_TEMPFAIL of sysexits.h."""
POLL = 2.0
"""Seconds between two looks at what the other processes say."""
FAILURES = "ross_jax/failures/"
"""Keys of processes that have failed -> their errors."""
_LOST, _SIGNS, _LEFT = "ross_jax/lost/", "ross_jax/signs/", "ross_jax/left/"
_LEAVE = 30.0
"""Most seconds that the coordinator outlives a failure, so that the other processes can read it."""
_PATIENCE = 0.6
"""Part of the timeout after which a silent process is lost. The rest is for telling the others."""
_PATIENCE_AT_END = 10.0
"""Most seconds that a thread is waited for when this process ends."""
_AGAIN = "Start the same command again on all hosts: it continues from the last checkpoint"


class Heartbeat:
    """Ends this process soon after another one is lost, with status 75, or has failed, with status 1.

    Args:
      state: of `jax.distributed`, after it was initialised.
      timeout: seconds within which all processes end after one is lost.
    """

    def __init__(self, state: Any, timeout: float):
        self._state = state
        self._client, self._me, self._address = state.client, state.process_id, state.coordinator_address
        self._patience = _PATIENCE * timeout
        self._answered = time.monotonic()
        self._signs = {each: ("", self._answered) for each in range(state.num_processes)}
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._talk, self._listen)]

    def start(self) -> None:
        """Starts the threads, which run until this process ends, and catches aborts."""
        global _handler
        for thread in self._threads:
            thread.start()
        atexit.register(self._stop)
        if self._me:
            _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborting)
            libc = ctypes.CDLL(None)
            libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
            libc.signal(signal.SIGABRT, ctypes.cast(_handler, ctypes.c_void_p))

    def _stop(self) -> None:
        """Ends the threads. One that is inside JAX's client when Python ends would crash this process."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(_PATIENCE_AT_END)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"{_LEFT}{self._me}", "")

    def _talk(self) -> None:
        number = 0
        while not self._stopped.wait(POLL if number else 0):
            number += 1
            try:
                sign = json.dumps({"number": number, "host": socket.gethostname()})
                self._client.key_value_set(f"{_SIGNS}{self._me}", sign, allow_overwrite=True)
                self._answered = time.monotonic()
                self._end_with_others()
                if self._me == 0:
                    self._end_without_others()
            except jax.errors.JaxRuntimeError:
                pass  # `_listen` knows since when

    def _listen(self) -> None:
        while not self._stopped.wait(POLL / 2):
            if time.monotonic() - self._answered > self._patience:
                self._end_without_first()

    def _end_with_others(self) -> None:
        for path, failure in sorted(self._client.key_value_dir_get(FAILURES)):
            number = _number(path)
            if number != self._me:
                take_leave(self._state)
                process.end(1, f"error: process {number} {failure}")
        for _, text in self._client.key_value_dir_get(_LOST):
            take_leave(self._state)
            process.end(TRY_AGAIN, text)

    def _end_without_others(self) -> None:
        now = time.monotonic()
        for path, sign in self._client.key_value_dir_get(_SIGNS):
            number = _number(path)
            if sign != self._signs[number][0]:
                self._signs[number] = sign, now
        left = _left(self._state)
        late = {
            each: sign
            for each, (sign, since) in self._signs.items()
            if now - since > self._patience and each not in left
        }
        if late:
            names = ", ".join(
                f"process {each} ({json.loads(sign)['host'] if sign else '?'})" for each, sign in late.items()
            )
            text = f"error: lost {names}: no sign of life for {self._patience:.0f} s. {_AGAIN}"
            self._client.key_value_set(_LOST, text, allow_overwrite=True)
            take_leave(self._state, without=late)
            process.end(TRY_AGAIN, text)

    def _end_without_first(self) -> None:
        if _leaving.locked():  # another thread is about to end this process, for the error that ended process 0
            time.sleep(_LEAVE)
        process.end(TRY_AGAIN, f"error: lost process 0 ({self._address}), which does not answer any more. {_AGAIN}")

    def _aborting(self, number: int) -> None:
        """Called by the thread that aborts. The abort goes on if process 0 is there: it has another reason."""
        host, _, port = self._address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), 5).close()
        except OSError:
            self._end_without_first()


def take_leave(state: Any, without: Collection[int] = ()) -> None:
    """Tells the coordinator that this process ends because of an error, which is the next thing that it must do.

    Process 0, which runs the coordinator, first waits until the others have read the error and said so, too. A second
    thread that comes here waits for the end.

    Args:
      without: processes that are not waited for.
    """
    _leaving.acquire()
    others, until = set(range(1, state.num_processes)) - set(without), time.monotonic() + _LEAVE
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        state.client.key_value_set(f"{_LEFT}{state.process_id}", "", allow_overwrite=True)
        while state.process_id == 0 and not others <= _left(state) and time.monotonic() < until:
            time.sleep(POLL / 10)
    if state.process_id == 0:
        time.sleep(POLL / 10)  # others have said that they end, and now do


def _left(state: Any) -> set[int]:
    return {_number(path) for path, _ in state.client.key_value_dir_get(_LEFT)}


def _number(key: str) -> int:
    return int(key.rpartition("/")[2])


_leaving = threading.Lock()
"""Held by the thread that ends this process because of an error."""
_handler: Any = None
"""The C function that the signal calls. It must stay."""
