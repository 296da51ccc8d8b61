"""Paths in buckets, against an emulator of Google Cloud Storage: what renames, locks and appends give on a disk."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bucket import ADDRESS, server  # noqa: F401
from ross_jax import buckets, directories, storage
from ross_jax.config import UserError
from ross_jax.directories import CheckpointError, complete_directory, lock, refuse_incomplete
from ross_jax.storage import GrowingFile, location, remove_tree


@pytest.fixture
def folder(server, request):  # noqa: F811
    """An empty folder of the bucket."""
    return location(f"{ADDRESS}/{request.node.name}")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("hdfs://host/run", "hdfs:// is not supported"),
        ("gss://bucket/run", "gss:// is not supported"),
        ("s3://bucket/run", "s3:// is not supported"),
        ("gs://", "names no bucket"),
        (Path("gs://bucket/run"), "two slashes"),
    ],
)
def test_other_addresses_are_refused(text, error):
    pytest.importorskip("gcsfs")
    with pytest.raises(UserError, match=error):
        location(text)


def test_an_absent_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"needs gcsfs; pip install -e '\.\[gcs\]'"):
        location("gs://bucket/run")


def test_local_paths_stay_what_they_are():
    assert type(location("runs/a")) is type(Path("runs/a")) and location("runs/a") == Path("runs/a")
    assert not storage.is_remote(Path("a"))


def test_a_path_lists_and_reads_as_on_a_disk(folder, tmp_path):
    for place in (folder, tmp_path):
        (place / "a" / "b").mkdir(parents=True)
        (place / "a" / "b" / "one.json").write_text("0123456789")
        (place / "a" / "two.txt").write_bytes(b"2")

    def look(place):
        names = [
            [path.relative_to(place).as_posix() for path in sorted(found)]
            for found in (
                place.iterdir(),
                place.glob("a/*"),
                place.glob("*/*/*.json"),
                place.rglob("*.json"),
                place.glob("no/*"),
            )
        ]
        one = place / "a" / "b" / "one.json"
        kinds = [(path.is_file(), path.is_dir(), path.exists()) for path in (one, one.parent, place / "no")]
        with one.open() as file:
            return names, kinds, one.stat().st_size, storage.read_range(one, 3, 4), file.read(2), one.suffix, one.stem

    assert look(folder) == look(tmp_path)
    storage.copy_tree(folder / "a", tmp_path / "copy")
    storage.copy_tree(tmp_path / "copy", folder / "copy")
    assert look(tmp_path / "copy" / "..")[2] == 10 and (folder / "copy" / "b" / "one.json").read_text() == "0123456789"
    remove_tree(folder / "a")
    assert not (folder / "a").exists() and (folder / "copy").is_dir()


@pytest.mark.parametrize("mode", ["w", "wb"])
def test_what_is_half_written_never_appears(folder, mode, monkeypatch):
    monkeypatch.setattr(buckets, "BLOCK", 2**20)
    piece = "a" * 2**19 if mode == "w" else bytes(2**19)
    (folder / "file").write_text("before")
    for pieces in (1, 4):  # in one request, and in several
        with pytest.raises(KeyError), (folder / "file").open(mode) as file:
            for _ in range(pieces):
                file.write(piece)
            raise KeyError
    assert (folder / "file").read_text() == "before"
    with (folder / "file").open(mode) as file:
        for _ in range(4):
            file.write(piece)
    assert (folder / "file").stat().st_size == 4 * 2**19


def test_one_writer_at_a_time(folder, capsys):
    with lock(folder / "run"):
        with pytest.raises(CheckpointError, match=rf"another process .*process {os.getpid()} on"), lock(folder / "run"):
            pass
        with lock(folder / "other"):
            pass
    with lock(folder / "run"):
        pass
    assert not list(folder.glob("*"))


def test_the_lock_of_another_host_is_free_without_heartbeats(folder, monkeypatch):
    monkeypatch.setattr(directories, "_STALE", 1.0)
    monkeypatch.setattr(directories, "_BEAT", 0.5)
    holder = {"host": "elsewhere", "boot": "1", "pid": 7, "started": "1", "since": "long ago"}
    path = folder / ".run.lock"
    path.write_text(json.dumps(holder))
    with lock(folder / "run"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    generation = path.write_version(json.dumps(holder).encode(), 0)
    ended = threading.Event()

    def beat():
        nonlocal generation
        while not ended.wait(0.2):
            generation = path.write_version(json.dumps(holder).encode(), generation)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(CheckpointError, match="process 7 on elsewhere"), lock(folder / "run"):
            pass
    finally:
        ended.set()
        thread.join()


def test_of_two_takers_one_holds_a_lock(folder):
    """Both have seen that the lock is free. The server compares generations, and lets one write."""
    path = folder / ".run.lock"
    assert path.write_version(b"mine", 0)
    assert path.write_version(b"theirs", 0) is None
    content, generation = path.read_version()
    assert content == b"mine"
    later = path.write_version(b"mine again", generation)
    assert later > generation and path.write_version(b"theirs", generation) is None


STOPPED = """
import sys, time
from ross_jax.directories import lock
from ross_jax.storage import location
from ross_jax import directories
directories._BEAT = 0.2
with lock(location(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_process_whose_lock_was_taken_ends(folder):
    command = [sys.executable, "-c", STOPPED, str(folder / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    (folder / ".run.lock").write_text("{}")
    assert process.wait(60) == 1 and "another process has taken over" in process.stderr.read()


def test_a_directory_is_whole_or_marked(folder):
    target = folder / "model"
    with pytest.raises(KeyError), complete_directory(target) as place:
        (place / "a").write_text("1")
        raise KeyError
    assert not target.exists()
    with complete_directory(target) as place:
        (place / "a").write_text("1")
        with pytest.raises(CheckpointError, match="is incomplete"):
            refuse_incomplete(target)
        directories.write_sums(place, place.rglob("*"))
    refuse_incomplete(target)
    assert directories.check_sums(target, "a")
    with pytest.raises(CheckpointError, match="exists already"), complete_directory(target):
        pass
    (target / directories.INCOMPLETE).touch()  # as a killed process leaves it
    with complete_directory(target) as place:
        (place / "b").write_text("2")
    assert [path.name for path in target.iterdir()] == ["b"]


def test_a_disk_that_renames_no_directories_gets_whole_ones(tmp_path, monkeypatch):
    real = os.rename

    def rename(source, target, **options):
        if Path(source).is_dir():
            raise OSError(24, "Too many open files", str(source))
        return real(source, target, **options)

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, rename)
    target = tmp_path / "model"
    with complete_directory(target) as place:
        (place / "a" / "b").mkdir(parents=True)
        (place / "a" / "b" / "c").write_text("1")
    assert [path.relative_to(target).as_posix() for path in sorted(target.rglob("*"))] == ["a", "a/b", "a/b/c"]
    assert (target / "a" / "b" / "c").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_growing_file_goes_on(folder):
    for lines in ("one\n", "two\n"):
        file = GrowingFile(folder / "lines")
        with file.local.open("a") as output:
            output.write(lines)
        file.sync(now=True)
        with file.local.open("a") as output:
            output.write("at the end\n")
        file.close()
    assert (folder / "lines").read_text() == "one\nat the end\ntwo\nat the end\n"


def test_a_server_that_comes_back_is_waited_for(folder, server):  # noqa: F811
    (folder / "file").write_text("1")
    server.kill()
    timer = threading.Timer(3, server.start)
    timer.start()
    began = time.monotonic()
    assert (folder / "file").read_text() == "1"
    timer.join()
    assert time.monotonic() - began > 1


@pytest.mark.skipif("not os.environ.get('ROSS_TEST_FULL')", reason="waits for half a minute; ROSS_TEST_FULL=1")
def test_a_server_that_stays_away_is_one_error(folder, server):  # noqa: F811
    server.kill()
    try:
        with pytest.raises(UserError, match=f"{folder}: the storage does not answer"):
            folder.exists()
    finally:
        server.start()
