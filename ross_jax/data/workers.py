"""Worker processes that read ahead, and what happens if one of them dies.

    worker w of W ── pipe ──► items w, w + W, w + 2 W, ... ──► this process: items in order

This process keeps no copy of a worker's end of the pipe. So the pipe ends with the worker, also in the middle of an
item, and whoever reads it learns so at once.
"""

import atexit
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from grain.sources import RandomAccessDataSource

from ross_jax.config import UserError

_POLL = 1.0
"""Seconds between two looks at the workers while none of them sends anything."""
_RECEIVED = 2
"""Items that this process receives before they are asked for."""
_REMEDY = "lower data.workers or data.prefetch"
_REASONS = {signal.SIGKILL: f"likely out of memory; {_REMEDY}, or give the run more memory"}


class Workers(Iterator[Any]):
    """`items[start:]` in order, read by worker processes.

    Args:
      items: can be pickled.
      workers: number of workers, at least 1.
      prefetch: items that each worker holds ready.
    """

    def __init__(self, items: RandomAccessDataSource, start: int, workers: int, prefetch: int):
        context = multiprocessing.get_context("spawn")
        self._items = pickle.dumps(items)
        self._count = len(items) - start
        self._workers: list[SpawnProcess] = []
        self._pipes: list[Connection] = []
        self._free = threading.Semaphore(_RECEIVED)
        self._received: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._closed = False
        atexit.register(self.close)  # comes before multiprocessing's own, which asks workers to end and waits
        try:
            for worker in range(workers):
                pipe, end = context.Pipe()
                self._pipes.append(pipe)
                indices = range(start + worker, len(items), workers)
                process = context.Process(target=_work, args=(end, indices, prefetch), daemon=True)
                with end:
                    process.start()
                self._workers.append(process)
        except OSError as error:
            self.close()
            raise UserError(f"data worker {worker} of {workers} cannot be started: {error}; {_REMEDY}") from error
        threading.Thread(target=self._receive, daemon=True).start()

    def _receive(self) -> None:
        for worker, pipe in zip(self._workers, self._pipes, strict=True):
            try:
                pipe.send_bytes(self._items)
            except OSError:
                return self._received.put((None, _death(worker)))
        for index in range(self._count):
            self._free.acquire()
            if self._closed:
                return None
            worker = index % len(self._workers)
            try:
                item, error = pickle.loads(self._pipes[worker].recv_bytes())
            except (EOFError, OSError):
                item, error = None, _death(self._workers[worker])
            self._received.put((item, error))
        return self._received.put((None, StopIteration()))

    def __next__(self) -> Any:
        """The next item.

        Raises:
          UserError: a worker has died; names it and the likely reason.
          Exception: what a worker raised while it read the item.
        """
        while not self._closed:
            item, error = None, next((_death(each) for each in self._workers if each.exitcode), None)
            if error is None:
                try:
                    item, error = self._received.get(timeout=_POLL)
                except queue.Empty:
                    continue
            if error is not None:
                self.close()
                raise error
            self._free.release()
            return item
        raise StopIteration

    def close(self) -> None:
        """Ends the workers."""
        self._closed = True
        self._free.release()
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.join()
        atexit.unregister(self.close)


def _death(worker: SpawnProcess) -> UserError:
    worker.join(_POLL)
    name, code = f"data worker {worker.pid}", worker.exitcode
    if code is None or code >= 0:
        return UserError(f"{name} ended with status {code}; what it wrote before says why")
    reason = _REASONS.get(signal.Signals(-code), "a library, or a file that it read, may be broken")
    return UserError(f"{name} was killed by {signal.Signals(-code).name}: {reason}")


def _work(pipe: Connection, indices: range, prefetch: int) -> None:
    """Sends items, each pickled with the exception that came in its place, or None."""
    # A signal to a group of processes is for the run to answer, which may want to save first.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_run, daemon=True).start()
    pickled, ready = pipe.recv_bytes(), queue.Queue[bytes](prefetch)
    threading.Thread(target=_read, args=(pickled, indices, ready), daemon=True).start()
    for _ in indices:
        pipe.send_bytes(ready.get())


def _end_with_run() -> None:
    run = multiprocessing.parent_process()
    assert run is not None
    run.join()
    os._exit(1)


def _read(pickled: bytes, indices: range, ready: queue.Queue[bytes]) -> None:
    try:
        items = pickle.loads(pickled)
        for index in indices:
            ready.put(pickle.dumps((items[index], None)))
    except BaseException as error:
        ready.put(_pickled(error))


def _pickled(error: BaseException) -> bytes:
    text = traceback.format_exc()
    try:
        error.add_note(f"in a data worker:\n{text}")
        pickle.loads(message := pickle.dumps((None, error)))
    except Exception:
        return pickle.dumps((None, RuntimeError(text)))
    return message
