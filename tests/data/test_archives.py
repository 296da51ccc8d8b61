"""Folders, zips and tars of images: every file is found, whatever its name and its links, and nothing else."""

import io
import multiprocessing
import os
import pickle
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from ross_jax.config import UserError
from ross_jax.data.archives import open_store
from ross_jax.data.images import ImageError


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


FILES = {"0.png": png(0), "1.png": png(1), "sub/0.png": png(2), "notes.txt": b"no image"}
NAMES = ["0.png", "1.png", "sub/0.png"]


def write(path: Path, files: dict[str, bytes] = FILES) -> str:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for number, (name, data) in enumerate(files.items()):
                archive.writestr(name, data, zipfile.ZIP_DEFLATED if number % 2 else zipfile.ZIP_STORED)
    elif ".tar" in path.name:
        with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
            for name, data in files.items():
                member = tarfile.TarInfo(f"./{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    else:
        for name, data in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    return str(path)


STORES = ["folder", "images.zip", "images.tar"]


@pytest.mark.parametrize("name", STORES)
def test_store_reads_at_random(tmp_path, name):
    store = open_store(write(tmp_path / name))
    assert store.names() == NAMES
    for copy in (store, pickle.loads(pickle.dumps(store))):
        assert [copy.read(name) for name in reversed(NAMES)] == [FILES[name] for name in reversed(NAMES)]
        assert "sub/0.png" in copy and "absent.png" not in copy
        if name != "folder":
            assert "./sub/0.png" in copy and copy.read("./sub/0.png") == FILES["sub/0.png"]


def _read_many(store, names):
    return [store.read(name) for name in names]


@pytest.mark.parametrize("name", STORES)
def test_store_is_safe_under_threads_and_forks(tmp_path, name):
    files = {f"{i}.png": os.urandom(5000) for i in range(50)}
    store = open_store(write(tmp_path / name, files))
    store.read("0.png")  # opens it before the fork
    names = list(files) * 4
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(store.read, names)) == [files[name] for name in names]
    descriptor = os.fork()  # the child inherits what is open; both read at once
    if descriptor == 0:
        ok = _read_many(store, names) == [files[name] for name in names]
        os._exit(0 if ok else 1)
    assert _read_many(store, names) == [files[name] for name in names]
    assert os.waitpid(descriptor, 0)[1] == 0


def test_store_in_a_spawned_process(tmp_path):
    store = open_store(write(tmp_path / "images.zip"))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_read_many, (store, NAMES)) == [FILES[name] for name in NAMES]


def test_store_that_cannot_be_opened(tmp_path):
    with pytest.raises(UserError, match=r"image folder '.*/nowhere' does not exist"):
        open_store(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"decompress a \.tar\.gz"):
        open_store(write(tmp_path / "images.tar.gz"))
    (tmp_path / "fake.zip").write_bytes(b"no archive" * 100)
    with pytest.raises(UserError, match="no folder, no zip"):
        open_store(tmp_path / "fake.zip")
    (tmp_path / "pointer.tar").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match=r"is a git-lfs pointer.*git lfs pull"):
        open_store(tmp_path / "pointer.tar")
    whole = Path(write(tmp_path / "whole.zip")).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[:200])
    with pytest.raises(UserError, match=r"cut\.zip: is a zip archive that cannot be read .*complete"):
        open_store(tmp_path / "cut.zip")
    with pytest.raises(UserError, match="does not exist"):
        open_store("x" * 5000)


def test_damaged_archive_members_name_the_file(tmp_path):
    noise = os.urandom(4000)
    path = Path(write(tmp_path / "images.zip", {"a.png": noise}))
    data = bytearray(path.read_bytes())
    data[2000] ^= 255
    path.write_bytes(data)
    with pytest.raises(ImageError, match=r"images.zip/a.png: cannot be read: Bad CRC-32"):
        open_store(path).read("a.png")


def test_damaged_lzma_is_a_broken_image(tmp_path):
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.png", os.urandom(4000))
    data = bytearray(path.read_bytes())
    data[50:90] = bytes(40)
    path.write_bytes(data)
    with pytest.raises(ImageError, match=r"images\.zip/a\.png: cannot be read"):
        open_store(path).read("a.png")


@pytest.mark.parametrize("name", STORES)
def test_hidden_files_are_no_images(tmp_path, name):
    """They belong to a system: files of macOS and Synology, caches of viewers."""
    hidden = ("._0.png", "sub/.1.png", "__MACOSX/sub/._0.png", ".thumbnails/0.png", "@eaDir/0.png")
    store = open_store(write(tmp_path / name, FILES | dict.fromkeys(hidden, b"")))
    assert store.names() == NAMES
    assert store.read("._0.png") == b""  # a record may name what it wants


def add_link(path: Path, name: str, target: str, hard: bool = False) -> None:
    if path.suffix == ".zip":
        member = zipfile.ZipInfo(name)
        member.create_system, member.external_attr = 3, 0o120777 << 16
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(member, target)
    elif path.suffix == ".tar":
        member = tarfile.TarInfo(name)
        member.type, member.linkname = tarfile.LNKTYPE if hard else tarfile.SYMTYPE, target
        with tarfile.open(path, "a") as archive:
            archive.addfile(member)
    else:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).symlink_to(target)


@pytest.mark.parametrize("name", STORES)
def test_links_are_followed(tmp_path, name):
    path = Path(write(tmp_path / name))
    add_link(path, "a.png", "0.png")
    add_link(path, "more/b.png", "../a.png")
    add_link(path, "folder", "./sub")
    add_link(path, "round.png", "round.png")
    add_link(path, "lost.png", "../outside/0.png")
    store = pickle.loads(pickle.dumps(open_store(path)))
    assert store.names() == sorted([*NAMES, "a.png", "more/b.png", "lost.png", "round.png"])
    assert store.read("a.png") == store.read("more/b.png") == FILES["0.png"]
    assert "folder/0.png" in store and store.read("folder/0.png") == FILES["sub/0.png"]
    for broken in ("lost.png", "round.png"):
        with pytest.raises(ImageError, match=f"{name}/{broken}: "):
            store.read(broken)


def test_links_lead_out_of_folders_but_not_of_archives(tmp_path):
    write(tmp_path / "disk", {"0.png": b"outside"})
    for name in STORES:
        path = Path(write(tmp_path / name))
        add_link(path, "a.png", str(tmp_path / "disk" / "0.png"))
    assert open_store(tmp_path / "folder").read("a.png") == b"outside"
    for name in STORES[1:]:
        with pytest.raises(ImageError, match=r"a\.png: is a link to .* not in the archive"):
            open_store(tmp_path / name).read("a.png")


def test_hard_links_of_a_tar(tmp_path):
    path = Path(write(tmp_path / "images.tar"))
    add_link(path, "again.png", "./sub/0.png", hard=True)
    store = open_store(path)
    assert store.names() == sorted([*NAMES, "again.png"])
    assert store.read("again.png") == FILES["sub/0.png"]


CAFE = "caf\u00e9/\u732b.png"  # with a composed letter, and a Chinese one
STORED = {
    "decomposed": "cafe\u0301/\u732b.png",
    "backslashes": "caf\u00e9\\\u732b.png",
    "GB 18030": os.fsdecode(CAFE.encode("gb18030")),
}


@pytest.mark.parametrize("stored", STORED.values(), ids=STORED)
@pytest.mark.parametrize("name", ["folder", "images.tar"])
def test_names_are_spelled_in_another_way(tmp_path, name, stored):
    """A record was written on another system than the store, or a store on another than the record."""
    store = open_store(write(tmp_path / name, {stored: b"cat"}))
    for asked in (CAFE, CAFE.replace("/", "\\")):
        assert asked in store and store.read(asked) == b"cat"
    (back,) = store.names()
    assert store.read(back) == b"cat"
    other = open_store(write(tmp_path / f"other_{name}", {CAFE: b"cat"}))
    assert stored in other and other.read(stored) == b"cat"
    assert CAFE.replace("\u732b", "\u72d7") not in store


def test_folder_and_file_are_spelled_in_different_ways(tmp_path):
    store = open_store(write(tmp_path / "images", {"cafe\u0301/" + os.fsdecode(b"\xe9.png"): b"cat"}))
    assert store.read("caf\u00e9/\u00e9.png") == b"cat"


@pytest.mark.parametrize("encoding", ["utf-8", "cp437", "gb18030", "shift_jis"])
def test_zips_that_do_not_say_their_encoding(tmp_path, encoding):
    """Older programs write names in any encoding, and Python reads them as code page 437."""
    name = "\u00e9.png" if encoding == "cp437" else "\u732b.png"
    encoded = name.encode(encoding)
    path = Path(write(tmp_path / "images.zip", {"x" * len(encoded): b"cat"}))
    path.write_bytes(path.read_bytes().replace(b"x" * len(encoded), encoded))
    assert open_store(path).read(name) == b"cat"


def test_a_changed_archive_is_noticed(tmp_path):
    path = tmp_path / "images.tar"
    store = open_store(write(path))
    path.write_bytes(path.read_bytes() + b"\0" * 512)
    with pytest.raises(UserError, match="was changed after it was opened"):
        store.read("0.png")
