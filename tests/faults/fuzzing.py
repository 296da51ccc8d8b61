"""Fuzzes the parsers of one group, in a process whose end is noticed: `python fuzzing.py TASK`.

TASK     JSON of `Task`
stdout   a JSON object per line: {"began": number, "parser": ...}, and {"problem": number, "what": ...} if it failed
"""

import contextlib
import dataclasses
import json
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

MOST_MEMORY = 2**30
"""Bytes that a parser may take above its input."""
MOST_SECONDS = 10
_WALL_SECONDS = 150  # the machine may be busy, and a parser may wait for a process of its own


@dataclasses.dataclass(frozen=True)
class Task:
    """What a process does.

    Attributes:
      group: of `parsers.GROUPS`.
      seed: with an input's number, it settles the input.
      first: number of the first input.
      count: inputs, if there is no end.
      end: time in s at which the process ends, if it is set.
    """

    group: str
    seed: int
    first: int
    count: int
    end: float | None = None


def _peak() -> int:
    """Most memory in bytes that this process has used since `_reset_peak`; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    found = status.read_text().partition("VmHWM:")[2].split() if status.exists() else []
    return 1024 * int(found[0]) if found else 0


def _reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _say(**values: Any) -> None:
    print(json.dumps(values), file=sys.__stdout__, flush=True)


class _Input:
    """The folder of a parser's input, which is whole again after each damage."""

    def __init__(self, parser: Any, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True)
        parser.make(folder)
        found = {path: kind for pattern, kind in parser.kinds.items() for path in sorted(folder.glob(pattern))}
        self._files = [(path, kind, path.read_bytes()) for path, kind in found.items() if path.is_file()]

    def damage(self, rng: random.Random, mutate: Any) -> int:
        """Damages one file. Returns its size."""
        path, kind, content = rng.choice(self._files)
        changed = mutate(rng, content, kind)
        path.write_bytes(changed)
        return len(changed)

    def restore(self) -> None:
        for path, _, content in self._files:
            path.write_bytes(content)


def _try(parser: Any, folder: Path, rng: random.Random, size: int, user_error: type[Exception]) -> str | None:
    """What is wrong with how a parser takes an input; None if nothing is."""
    _reset_peak()
    before = _peak()
    signal.alarm(_WALL_SECONDS)
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
    try:
        parser.parse(folder, rng)
    except user_error as error:
        if not str(error):
            return "an error without a text"
    except BaseException:
        return traceback.format_exc()[-3000:]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
    used = _peak() - before - size
    return f"takes {used} bytes above its input" if used > MOST_MEMORY else None


def main(task: Task) -> None:
    import warnings

    from faults.mutations import mutate
    from faults.parsers import GROUPS
    from ross_jax.config import UserError

    warnings.simplefilter("ignore")
    sys.stdout = sys.stderr
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
    group = GROUPS[task.group]
    with tempfile.TemporaryDirectory() as scratch:
        inputs = {name: _Input(parser, Path(scratch, name, "input")) for name, parser in group.items()}
        for name, parser in group.items():  # imports what it needs, and must take the sound input
            parser.parse(inputs[name].folder, random.Random(0))
        number = task.first
        while time.time() < task.end if task.end else number < task.count:
            rng = random.Random(f"{task.seed} {task.group} {number}")
            name = rng.choices(list(group), [parser.weight for parser in group.values()])[0]
            _say(began=number, parser=name)
            size = inputs[name].damage(rng, mutate)
            what = _try(group[name], inputs[name].folder, rng, size, UserError)
            inputs[name].restore()
            if what:
                _say(problem=number, parser=name, what=what)
            number += 1


if __name__ == "__main__":
    main(Task(**json.loads(sys.argv[1])))
