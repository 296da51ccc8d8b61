"""Small files that would take much memory or time: archives, images and records are read within bounds."""

import io
import json
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ross_jax.config import UserError
from ross_jax.data.archives import open_store
from ross_jax.data.images import ImageConfig, ImageError, decode, preprocess
from ross_jax.data.sources import Limits, SourceConfig, open_source, open_sources

LIMIT = 10_000
METHODS = {
    "stored": zipfile.ZIP_STORED,
    "deflate": zipfile.ZIP_DEFLATED,
    "bzip2": zipfile.ZIP_BZIP2,
    "lzma": zipfile.ZIP_LZMA,
}


def write_store(folder: Path, kind: str, sizes: dict[str, int]) -> Path:
    """A folder, tar or zip with files of zeros."""
    path = folder / kind
    if kind == "folder":
        path.mkdir()
        for name, size in sizes.items():
            (path / name).write_bytes(bytes(size))
    elif kind == "tar":
        with tarfile.open(path, "w") as archive:
            for name, size in sizes.items():
                member = tarfile.TarInfo(name)
                member.size = size
                archive.addfile(member, io.BytesIO(bytes(size)))
    else:
        with zipfile.ZipFile(path, "w", METHODS[kind]) as archive:
            for name, size in sizes.items():
                archive.writestr(name, bytes(size))
    return path


@pytest.mark.parametrize("kind", ["folder", "tar", *METHODS])
def test_large_members_are_not_read(kind, tmp_path):
    """The limit is the last size that is read."""
    store = open_store(write_store(tmp_path, kind, {"small.png": LIMIT, "large.png": LIMIT + 1}), LIMIT)
    assert len(store.read("small.png")) == LIMIT
    with pytest.raises(ImageError, match=r"large\.png: has more than 10000 bytes; .*data\.max_image_bytes"):
        store.read("large.png")


def test_sources_have_the_limit_of_the_config(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(bytes(LIMIT + 1))
    record = {"id": 0, "image": "a.png", "conversations": [{"from": "human", "value": "<image>"}]}
    (tmp_path / "data.json").write_text(json.dumps([record]))
    pictures = SourceConfig(str(tmp_path / "images"), kind="images")
    conversations = SourceConfig(str(tmp_path / "data.json"), images=(str(tmp_path / "images"),))
    source, _ = open_sources([pictures, conversations], limits=Limits(LIMIT))
    for i in range(2):
        with pytest.raises(ImageError, match="more than 10000 bytes"):
            source[i].images[0].read()


def peak_above(code: str) -> int:
    """Bytes of memory that Python code takes at most, above what it had at its line `start()`."""
    helper = (
        "from pathlib import Path\n"
        "def peak(): return 1024 * int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
        "def start():\n"
        "    global before\n"
        "    Path('/proc/self/clear_refs').write_text('5')\n"
        "    before = peak()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{helper}{code}\nprint(peak() - before)"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.fail(done.stderr[-1000:])
    return int(done.stdout)


needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")


@needs_proc
@pytest.mark.parametrize("kind", ["deflate", "bzip2", "lzma"])
def test_a_bomb_takes_little_memory(kind, tmp_path):
    """200 MB of zeros, of which not much more than the limit is decompressed."""
    path = write_store(tmp_path, kind, {"a.png": 200_000_000})
    used = peak_above(
        f"from ross_jax.data.archives import open_store\nstore = open_store({str(path)!r}, {LIMIT})\nstart()\n"
        "try: store.read('a.png')\nexcept Exception as error: assert 'more than' in str(error), error"
    )
    assert used < 100_000_000


def test_sizes_that_a_zip_lies_about(tmp_path):
    """The directory says 10 bytes, the member has more: it is broken, and never larger than it says."""
    path = write_store(tmp_path, "deflate", {"a.png": LIMIT})
    data = path.read_bytes()
    path.write_bytes(data.replace(struct.pack("<I", LIMIT), struct.pack("<I", 10)))
    with pytest.raises(ImageError, match=r"a\.png: cannot be read"):
        open_store(path, LIMIT).read("a.png")


def test_a_tar_whose_header_leads_back(tmp_path):
    """A negative size made Python's reader return to the same header for ever."""
    path = write_store(tmp_path, "tar", {"a.png": 600, "b.png": 600})
    data = path.read_bytes()
    header = bytearray(data[1536:2048])
    header[124:136] = b"\xff" * 10 + struct.pack(">h", -512)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(data[:1536] + header + data[2048:])
    with pytest.raises(UserError, match="cannot be read"):
        open_store(path)


def test_a_tar_that_becomes_shorter(tmp_path):
    path = write_store(tmp_path, "tar", {"a.png": 600, "b.png": 600})
    store = open_store(path)
    store.read("a.png")
    with path.open("r+b") as file:
        file.truncate(700)
    with pytest.raises(UserError, match="has become shorter"):
        store.read("b.png")


def image_bytes(size: tuple[int, int], mode: str, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind, **options)
    return buffer.getvalue()


TOO_LARGE = {
    "colours with alpha": ((13_000, 10_400), "RGBA", "PNG", {"compress_level": 1}),
    "progressive": ((11_000, 10_000), "RGB", "JPEG", {"progressive": True}),
    "turned": ((13_000, 10_400), "RGB", "PNG", {"compress_level": 1, "exif": {0x0112: 6}}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TOO_LARGE)
def test_images_that_would_take_too_much_memory(name):
    size, mode, kind, options = TOO_LARGE[name]
    if "exif" in options:
        exif = Image.Exif()
        exif.update(options["exif"])
        options = options | {"exif": exif}
    with pytest.raises(ImageError, match=r"^x: 1\d000 x 10\d00 pixels need \d{10} bytes of memory"):
        decode(image_bytes(size, mode, kind, **options), "x")


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize(
    ("size", "mode", "kind"),
    [
        ((13_000, 13_000), "I;16", "PNG"),
        ((8000, 7000), "RGB", "WEBP"),
    ],
)
def test_large_images_take_no_more_than_the_bound(size, mode, kind, tmp_path):
    (tmp_path / "image").write_bytes(image_bytes(size, mode, kind))
    used = peak_above(
        "from pathlib import Path\nfrom ross_jax.data.images import ImageConfig, decode, preprocess\n"
        f"data = Path({str(tmp_path / 'image')!r}).read_bytes()\nstart()\n"
        "preprocess(decode(data, 'x'), ImageConfig(384, mode='square'))"
    )
    assert used < 2**30


def test_padding_counts(monkeypatch):
    """An image that fits by itself, and whose square does not."""
    monkeypatch.setattr("ross_jax.data.images.MAX_MEMORY", 500_000)
    image = decode(image_bytes((400, 200), "RGB", "PNG"), "x")
    preprocess(image, ImageConfig(28, mode="square"), "x")
    with pytest.raises(ImageError, match="x: 400 x 200 would become 160000 pixels"):
        preprocess(image, ImageConfig(28, mode="pad"), "x")


def test_sixteen_bits_in_strips(monkeypatch):
    """Strips of one row give what the whole image gives."""
    pixels = np.random.default_rng(0).integers(0, 65536, (7, 9), dtype=np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    whole = np.asarray(decode(buffer.getvalue(), "x"))
    monkeypatch.setattr("ross_jax.data.images._STRIP", 9)
    np.testing.assert_array_equal(np.asarray(decode(buffer.getvalue(), "x")), whole)
    expected = ((pixels.astype(np.int64) + 128) // 257)[..., None].repeat(3, axis=2)
    np.testing.assert_array_equal(whole, expected)


def test_postscript_is_not_run():
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(ImageError, match="x: is PostScript"):
        decode(data, "x")


SOUND = {"id": 0, "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}
TOO_LONG = "a record of more than 16777216 bytes"
RECORDS = {
    "deep": (json.dumps(SOUND)[:-1] + ', "x": ' + "[" * 500 + "]" * 500 + "}", "nested too deeply"),
    "deeper": (json.dumps(SOUND)[:-1] + ', "x": ' + "[" * 100_000, "corrupt JSON"),
    "digits": (json.dumps(SOUND)[:-1] + ', "x": ' + "9" * 5000 + "}", "4300"),
    "long": (json.dumps(SOUND | {"x": "a" * 2**24}), TOO_LONG),
    "unclosed": (json.dumps(SOUND)[:-1] + ', "x": "' + "a" * 2**25, TOO_LONG),
}


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_records_have_bounds(name, suffix, tmp_path):
    record, reason = RECORDS[name]
    path = tmp_path / f"data.{suffix}"
    text = json.dumps(SOUND)
    path.write_text(f"[{text},\n{record}]" if suffix == "json" else f"{text}\n{record}\n")
    with pytest.raises(UserError, match=reason) as raised:
        open_source(SourceConfig(str(path)))
    assert f"{path}: corrupt JSON at line 2" in str(raised.value)


def test_names_that_no_file_can_have(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.png").write_bytes(b"")
    names = ["a" * 300, "é" * 300, "a/" * 3000, "\0", "\ud800"]
    turns = SOUND["conversations"]
    lines = [json.dumps({"id": 0, "image": name, "conversations": turns}) for name in names]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    source = open_source(SourceConfig(str(tmp_path / "data.jsonl"), images=(str(tmp_path / "folder"),)))
    for i in range(len(names)):
        with pytest.raises(ImageError) as raised:
            source[i].images[0].read()
        assert len(str(raised.value)) < 500
