"""Injectors: damage to files, and what becomes of a run or model that reads them."""

import dataclasses
import hashlib
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ross_jax.config import UserError, to_dict
from ross_jax.inference.model import load
from ross_jax.training.recipe import RunConfig
from ross_jax.training.run import Run

KINDS = ("flip", "truncate", "remove", "zero")


def inject(path: Path, rng: random.Random, kind: str) -> str:
    """Damages a file, and says how."""
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content)) if content else 0
    if kind == "remove":
        path.unlink()
    elif kind == "truncate":
        path.write_bytes(content[:place])
    elif content:
        part = content[place : place + 64]
        content[place : place + 64] = bytes(len(part)) if kind == "zero" else bytes([part[0] ^ 1 << rng.randrange(8)])
        if kind == "flip":
            content[place + 1 :] = part[1:] + content[place + 1 :]
        path.write_bytes(content)
    return f"{kind} at {place} of {path}"


def digest(tree: Any) -> str:
    """SHA-256 of all arrays of a tree, and of their paths."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        found.update(jax.tree_util.keystr(path).encode() + np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()


@dataclasses.dataclass
class Subject:
    """A directory, how it is read, and what may be read.

    Attributes:
      read: directory -> what was read; a UserError is detection.
      sound: what it may be: the first is that of a directory without damage.
    """

    folder: Path
    read: Callable[[Path], Any]
    sound: list[Any]

    def examine(self, folder: Path) -> str:
        """`detected`, `recovered`, `harmless`, or what is wrong."""
        try:
            found = self.read(folder)
        except UserError as error:
            return "detected" if len(str(error)) < 4000 else f"an error of {len(str(error))} characters"
        except BaseException as error:
            return f"{type(error).__name__}: {error}"
        if found not in self.sound:
            return "read as something else, silently"
        return "recovered" if self.sound.index(found) else "harmless"


def read_run(config: RunConfig) -> Callable[[Path], Any]:
    """A reader of runs: the state that training would continue from, and the model that would be asked."""

    def read(folder: Path) -> Any:
        run = Run(config, folder)
        return run.step, digest(run.state), run.data.hash, *read_model(folder)

    return read


def read_model(folder: Path) -> tuple[str, str, list[int]]:
    """Parameters, config and ids of a model directory."""
    model = load(folder)
    return digest(model.params), str(to_dict(model.config)), list(model.tokenizer("a cat's </s>").input_ids)


def campaign(subject: Subject, work: Path, rng: random.Random, more: Callable[[int], bool]) -> Counter:
    """Damages one file of a copy of the subject again and again.

    Args:
      more: number of injections so far -> whether to go on.

    Returns:
      Number of injections by outcome; what is wrong by its description.
    """
    outcomes: Counter = Counter()
    while more(outcomes.total()):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(subject.folder, work)
        files = sorted(path for path in work.rglob("*") if path.is_file() and "tensorboard" not in path.parts)
        sizes = [path.stat().st_size for path in files]  # most small files are never read
        chosen = rng.choices(files, sizes if rng.random() < 0.5 and any(sizes) else None)[0]
        said = inject(chosen, rng, KINDS[outcomes.total() % len(KINDS)])
        outcome = subject.examine(work)
        known = outcome in ("detected", "recovered", "harmless")
        outcomes[outcome if known else f"{said}: {outcome}"] += 1
    return outcomes
