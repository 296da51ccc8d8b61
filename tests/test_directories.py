"""Directories that appear complete or not at all, digests, and locks."""

import json
import multiprocessing
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ross_jax import directories
from ross_jax.config import UserError
from ross_jax.directories import CheckpointError, DamagedError, check_sums, complete_directory, lock, write_sums


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("before", ["absent", "empty", "parents absent", "link to an empty one"])
def test_a_directory_appears_when_it_is_complete(before, tmp_path):
    target = tmp_path / "a" / "b" / "model" if before == "parents absent" else tmp_path / "model"
    if before == "empty":
        target.mkdir()
    if before.startswith("link"):
        (tmp_path / "real").mkdir()
        target.symlink_to(tmp_path / "real")
    with complete_directory(target) as folder:
        (folder / "x").write_text("1")
        assert not (target / "x").exists()
    assert (target / "x").read_text() == "1"
    assert names(target.parent) == (["model", "real"] if before.startswith("link") else ["model"])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, UserError])
def test_a_directory_disappears_after_an_error(error, tmp_path):
    with pytest.raises(error), complete_directory(tmp_path / "model") as folder:
        (folder / "x").mkdir()
        raise error("x")
    assert names(tmp_path) == []


def test_errors_of_the_disk_are_said(tmp_path):
    with (
        pytest.raises(CheckpointError, match=rf"^{tmp_path}/model: cannot be written \(.*No space left"),
        complete_directory(tmp_path / "model"),
    ):
        raise OSError(28, "No space left on device")
    assert names(tmp_path) == []


def test_what_a_killed_process_left_is_cleared(tmp_path):
    (tmp_path / ".model.incomplete" / "params").mkdir(parents=True)
    (tmp_path / ".model.incomplete" / "old").touch()
    (tmp_path / ".model.lock").touch()
    with complete_directory(tmp_path / "model") as folder:
        assert names(folder) == []
    assert names(tmp_path) == ["model"]


def test_an_existing_output_is_kept(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "x").write_text("mine")
    (tmp_path / "file").touch()
    for name in ("model", "file"):
        with (
            pytest.raises(CheckpointError, match=f"{name}: exists already; choose another output or remove it first"),
            complete_directory(tmp_path / name),
        ):
            pytest.fail("entered")
    with pytest.raises(CheckpointError, match=r"^/: exists already"), complete_directory(Path("/")):
        pytest.fail("entered")
    assert (tmp_path / "model" / "x").read_text() == "mine" and names(tmp_path) == ["file", "model"]


@pytest.mark.parametrize("parent", ["file", "/proc/self", "file/a/b", "x" * 300])
def test_a_parent_that_cannot_hold_it(parent, tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(CheckpointError, match=r"/model: cannot be written \(\[Errno \d+\]"),
        complete_directory(tmp_path / parent / "model"),
    ):
        pytest.fail("entered")
    assert names(tmp_path) == ["file"]


def hold(target: Path, entered, leave) -> None:
    with complete_directory(target) as folder:
        (folder / "x").write_text("first")
        entered.set()
        leave.wait(30)


def test_two_processes_at_once(tmp_path):
    """A second process is refused and changes nothing. Once the first is killed, the next one may write."""
    context = multiprocessing.get_context("fork")
    for killed in (True, False):
        entered, leave = context.Event(), context.Event()
        process = context.Process(target=hold, args=(tmp_path / "model", entered, leave))
        process.start()
        assert entered.wait(30)
        with (
            pytest.raises(CheckpointError, match="model: another process is writing it"),
            complete_directory(tmp_path / "model"),
        ):
            pytest.fail("entered")
        assert (tmp_path / ".model.incomplete" / "x").read_text() == "first"
        if killed:
            process.kill()
            process.join()
            assert names(tmp_path) == [".model.incomplete", ".model.lock"]
        else:
            leave.set()
            process.join()
    assert names(tmp_path) == ["model"]


def test_a_lock_that_its_holder_has_removed_is_none(tmp_path, monkeypatch):
    """A lock file that its holder removes between opening and locking is refused, because it guards nothing."""
    flock = directories.fcntl.flock

    def late(handle, operation):
        (tmp_path / ".model.lock").unlink()
        flock(handle, operation)

    monkeypatch.setattr(directories.fcntl, "flock", late)
    with pytest.raises(CheckpointError, match="another process"), complete_directory(tmp_path / "model"):
        pytest.fail("entered")


def test_another_may_have_finished_meanwhile(tmp_path, monkeypatch):
    flock = directories.fcntl.flock

    def late(handle, operation):
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "x").touch()
        flock(handle, operation)

    monkeypatch.setattr(directories.fcntl, "flock", late)
    with pytest.raises(CheckpointError, match="exists already"), complete_directory(tmp_path / "model"):
        pytest.fail("entered")
    assert names(tmp_path) == ["model"]


# Locks.


def test_a_lock_names_its_holder(tmp_path):
    with (
        lock(tmp_path / "run"),
        pytest.raises(CheckpointError, match=rf"run: another process.*\(process {os.getpid()} on .*, since 20"),
        lock(tmp_path / "run"),
    ):
        pytest.fail("entered")
    assert names(tmp_path) == []


@pytest.fixture
def brief(monkeypatch):
    """Heartbeats every tenth of a second, and locks that are free after one second without."""
    monkeypatch.setattr(directories, "_BEAT", 0.1)
    monkeypatch.setattr(directories, "_STALE", 1.0)


def of_another_host(folder: Path) -> Path:
    """Lets the lock of `run` in a folder be one of another host, which guards nothing here."""
    with lock(folder / "run"):
        said = json.loads((folder / ".run.lock").read_text())
    path = folder / ".run.lock"
    path.write_text(json.dumps(said | {"host": "elsewhere"}))
    return path


def test_a_lock_of_another_host(tmp_path, brief, capfd):
    """Is waited for, and is free when no heartbeat comes. With heartbeats it is held."""
    path = of_another_host(tmp_path)
    with lock(tmp_path / "run"):
        assert json.loads(path.read_text())["host"] != "elsewhere"
    assert "elsewhere is still writing" in capfd.readouterr().err
    path = of_another_host(tmp_path)
    beating = subprocess.Popen(["sh", "-c", f"while sleep 0.05; do touch {path}; done"])
    try:
        with pytest.raises(CheckpointError, match="on elsewhere"), lock(tmp_path / "run"):
            pytest.fail("entered")
    finally:
        beating.kill()
        beating.wait()


def test_a_file_system_without_locks(tmp_path, brief, monkeypatch):
    """There the file's content counts: the holder lives if a process of its number began when it says."""

    def refuse(handle, operation):
        raise OSError(directories.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(directories.fcntl, "flock", refuse)
    with lock(tmp_path / "run"), pytest.raises(CheckpointError, match="another process"), lock(tmp_path / "run"):
        pytest.fail("entered")
    with lock(tmp_path / "run"):
        said = json.loads((tmp_path / ".run.lock").read_text())
    for dead in ({"started": "1"}, {"pid": 2**22 + 1}):
        (tmp_path / ".run.lock").write_text(json.dumps(said | dead))
        with lock(tmp_path / "run"):
            pass


def test_a_process_that_lost_its_lock_ends(tmp_path, brief):
    def work() -> None:
        with lock(tmp_path / "run"):
            (tmp_path / ".run.lock").write_text("{}")
            directories.time.sleep(30)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(20)
    assert process.exitcode == 1


# Digests.


@pytest.fixture
def digested(tmp_path) -> Path:
    folder = tmp_path / "model"
    (folder / "files").mkdir(parents=True)
    (folder / "a.json").write_text("{}")
    (folder / "files" / "b c.txt").write_text("text")
    write_sums(folder, [path for path in folder.rglob("*") if path.is_file()])
    return folder


def test_digests(digested):
    assert check_sums(digested, "a.json")
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=digested, check=True)
    (digested / "SHA256SUMS").unlink()
    assert not check_sums(digested, "a.json")
    assert not check_sums(digested / "absent", "a.json")


def test_every_flip_is_seen(digested):
    """A flipped bit anywhere in the files, `SHA256SUMS` included, is an error."""
    for path in [path for path in digested.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        for bit in range(0, len(content) * 8, 3):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            with pytest.raises(DamagedError, match=f"^{digested}"):
                check_sums(digested, "a.json")
        path.write_bytes(content)
    (digested / "files" / "b c.txt").unlink()
    with pytest.raises(DamagedError, match=r"files/b c\.txt: cannot be read"):
        check_sums(digested, "a.json")
    assert check_sums(digested, "a.json", ("a",))
