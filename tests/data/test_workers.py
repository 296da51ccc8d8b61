"""Worker processes that die end the reading with an error, also where a pipe would be read for ever."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ross_jax.config import UserError
from ross_jax.data.conversation import EncodedConversation
from ross_jax.data.images import ImageConfig
from ross_jax.data.packing import PackingConfig
from ross_jax.data.pipeline import DataConfig, Preprocessing, open_pipeline
from ross_jax.data.sources import SourceConfig

COUNT, SIZE = 64, 256


@dataclass(frozen=True)
class Encoder:
    """Stand-in for a conversation encoder: one image and one supervised token.

    Attributes:
      ends: whether it ends the worker that uses it.
    """

    ends: bool = False

    def __call__(self, record):
        if self.ends and multiprocessing.parent_process():
            os._exit(3)
        return EncodedConversation(np.array([-200, 1], np.int32), np.array([-100, 1], np.int32))


class Stubborn:
    """An encoder that cannot be unpickled."""

    def __reduce__(self):
        return int, ("no encoder",)

    def __call__(self, record):
        return Encoder()(record)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Batches of 1.5 MB, which a pipe takes many writes for."""
    folder: Path = tmp_path_factory.mktemp("data")
    Image.new("RGB", (SIZE, SIZE), (1, 2, 3)).save(folder / "0.png")
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]
    (folder / "data.json").write_text(json.dumps([{"image": "0.png", "conversations": turns}] * COUNT))
    source = SourceConfig(str(folder / "data.json"), images=(str(folder),))
    return DataConfig((source,), PackingConfig(length=8, images=1), batch=8, workers=2, prefetch=1)


def open_(config, encode=Encoder()):
    """A pipeline that this process has measured."""
    pipeline = open_pipeline(replace(config, workers=0), Preprocessing(encode, ImageConfig(SIZE), 4))
    pipeline.config = config
    return pipeline


def readers() -> list[multiprocessing.process.BaseProcess]:
    return multiprocessing.active_children()


def test_a_killed_worker_is_named(config):
    """A worker that was killed in the middle of sending a batch is named, and the others end."""
    batches = open_(config).batches()
    next(batches)
    time.sleep(1)  # until both workers have nothing to do but to wait for their reader
    first, other = readers()
    os.kill(first.pid, signal.SIGKILL)
    with pytest.raises(UserError, match=rf"data worker {first.pid} was killed by SIGKILL: likely out of memory; lower"):
        list(batches)
    other.join(20)
    assert not readers()


def test_batches_are_the_same(config):
    batches = list(open_(config).batches())
    expected = list(open_(replace(config, workers=0)).batches())
    assert len(batches) == COUNT // 8
    for batch, other in zip(batches, expected, strict=True):
        for name in other:
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)
    assert not readers()


def test_a_worker_that_ends_is_named(config):
    with pytest.raises(UserError, match=r"data worker \d+ ended with status 3; what it wrote before says why"):
        list(open_(config, Encoder(ends=True)).batches())


def test_a_worker_that_cannot_start_gives_its_error(config):
    with pytest.raises(ValueError, match="no encoder"):
        list(open_(config, Stubborn()).batches())


SCRIPT = """
import multiprocessing, os, signal
from ross_jax.data.workers import Workers
if __name__ == "__main__":
    next(Workers(range(100), 0, 2, 1))
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_killed_run(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, tmp_path / "script.py"], stdout=subprocess.PIPE, text=True, check=False)
    workers = [Path(f"/proc/{pid}/cmdline") for pid in done.stdout.split()]
    deadline = time.monotonic() + 30
    while (alive := any(map(runs, workers))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(workers) == 2 and not alive


def runs(command_line: Path) -> bool:
    """Whether a process is there, and not only its exit status."""
    try:
        return bool(command_line.read_bytes())
    except OSError:
        return False
