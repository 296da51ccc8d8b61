"""Data in a bucket: the samples that a disk has, read by byte ranges, kept on a local disk; and errors."""

import asyncio
import http.server
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bucket import ADDRESS, server  # noqa: F401
from data.layouts import COUNT, LAYOUTS, picture
from data.test_pipeline import assert_equal, config_for, write_data
from data.test_pipeline import open_ as pipeline_of
from data.test_precomputed import RECORDS, values, write_cache
from ross_jax.config import UserError, from_dict
from ross_jax.data.local_cache import LocalCache
from ross_jax.data.precomputed import Precomputed
from ross_jax.data.ranges import Caches
from ross_jax.data.sources import Limits, SourceConfig, open_source
from ross_jax.storage import StorageError, copy_tree, location

pytestmark = pytest.mark.usefixtures("server")


def archives(folder: Path, kind: str) -> dict:
    """Records whose images lie in an archive, of which one has a prefix."""
    folder.mkdir()
    names = [f"train/{n}.jpg" for n in range(COUNT)]
    if kind == "zip":
        with zipfile.ZipFile(folder / "coco.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for n, name in enumerate(names):
                archive.writestr(name, picture(n))
    else:
        for n, name in enumerate(names):
            (folder / "made" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "made" / name).write_bytes(picture(n))
        with tarfile.open(folder / "coco.tar", "w") as archive:
            archive.add(folder / "made" / "train", "train")
        shutil.rmtree(folder / "made")
    records = [{"id": n, "image": f"coco/{name}", "conversations": []} for n, name in enumerate(names)]
    (folder / "data.json").write_text(json.dumps(records))
    return {"path": str(folder / "data.json"), "images": (f"coco={folder}/coco.{kind}",)}


def pictures(folder: Path) -> dict:
    (folder / "sub").mkdir(parents=True)
    for n in range(COUNT):
        (folder / "sub" / f"{n}é.jpg").write_bytes(picture(n))
    return {"path": str(folder), "kind": "images"}


KINDS = LAYOUTS | {
    "zip": lambda folder: archives(folder, "zip"),
    "tar": lambda folder: archives(folder, "tar"),
    "images": pictures,
}


def uploaded(values: dict, folder: Path, name: str) -> dict:
    """The config of the same source in the bucket."""
    target = f"{ADDRESS}/{name}"
    copy_tree(folder, location(target))
    return json.loads(json.dumps(values).replace(str(folder), target))


def samples(source) -> list:
    """Names, records and images of all samples, out of order."""
    order = np.random.RandomState(0).permutation(len(source)).tolist()
    found = [source[index] for index in order]
    return [(sample.id, sample.record, [image.read() for image in sample.images]) for sample in found]


def open_(values: dict, caches: Caches):
    return open_source(from_dict(SourceConfig, values), limits=Limits(caches=caches))


def test_every_source_is_the_same_in_a_bucket_and_is_kept_on_a_local_disk(tmp_path, server):  # noqa: F811
    opened = {}
    for kind, write in KINDS.items():
        config = write(tmp_path / kind)
        there = uploaded(config, tmp_path / kind, kind)
        expected = samples(open_(config, Caches()))
        bare = open_(there, Caches())
        assert samples(bare) == expected, kind
        kept = open_(there, Caches(LocalCache(str(tmp_path / "local"), 10**9), f"{ADDRESS}/cache"))
        assert samples(kept) == expected, kind
        assert kept.fingerprint == bare.fingerprint == open_(config, Caches()).fingerprint, kind
        opened[kind] = pickle.dumps(kept), expected
    server.kill()
    try:
        for kind, (source, expected) in opened.items():
            assert samples(pickle.loads(source)) == expected, kind
    finally:
        server.start()


def test_a_second_epoch_needs_no_server(tmp_path, server):  # noqa: F811
    """Two worker processes share the local cache. Lengths and plans are cached in the bucket."""
    folder = write_data(tmp_path / "set")
    expected = list(pipeline_of(config_for(folder, epochs=2)).batches())
    copy_tree(folder, location(f"{ADDRESS}/set"))
    there = replace(config_for(folder).sources[0], path=f"{ADDRESS}/set/data.json", images=(f"{ADDRESS}/set/images",))
    caches = {"cache": f"{ADDRESS}/plans", "local_cache": str(tmp_path / "local")}
    config = config_for(folder, epochs=2, workers=2, sources=(there,), **caches)
    pipeline = pipeline_of(config, encode_key="words")
    again = pipeline_of(config, encode_key="words", writer=False)
    assert again.hash == pipeline.hash and again.lengths.hash == pipeline.lengths.hash
    batches, first = pipeline.batches(), pipeline.plans[0].steps
    for step in range(first):
        assert_equal(next(batches), expected[step])
    server.kill()
    try:
        for step in range(first, len(expected)):
            assert_equal(next(batches), expected[step])
    finally:
        server.start()


def test_precomputed_arrays_in_a_bucket(tmp_path):
    copy_tree(write_cache(tmp_path / "cache"), location(f"{ADDRESS}/precomputed"))
    caches = Caches(LocalCache(str(tmp_path / "local"), 10**7))
    opened = Precomputed(f"{ADDRESS}/precomputed", caches=caches)
    for reader in (opened, pickle.loads(pickle.dumps(opened))):
        for number in (0, 1, 33, RECORDS - 1):
            assert_equal(reader.read(number), values(number))
    with pytest.raises(UserError, match=r"must lie on this machine to be read; set data\.local_cache"):
        Precomputed(f"{ADDRESS}/precomputed")
    shard = next(iter(location(f"{ADDRESS}/precomputed").glob("targets-*")))
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"shards are not as they were written:\n  targets-.* bytes instead of"):
        Precomputed(f"{ADDRESS}/precomputed", caches=caches)
    shard.unlink()
    with pytest.raises(UserError, match="missing"):
        Precomputed(f"{ADDRESS}/precomputed", caches=caches)


def test_the_local_cache_is_bounded_and_forgets_what_was_used_longest_ago(tmp_path):
    cache = LocalCache(str(tmp_path), 100 * 4096)
    for number in range(99):
        cache.put(str(number), bytes([number]) * 4000)
        os.utime(cache._path(str(number)), (number, number))
    assert cache.get("0") == bytes(4000)  # is now the one that was used last
    path, descriptor = cache.hold("whole", 4096, lambda file: file.write(b"w" * 4096))
    os.utime(path, (1, 1))
    for number in range(99, 140):
        cache.put(str(number), bytes([number]) * 4000)
        assert sum(4096 for file in tmp_path.glob("*/*")) <= cache.limit
    assert cache.get("0") == bytes(4000) and cache.get("1") is None and cache.get("139") == bytes([139]) * 4000
    assert path.read_bytes() == b"w" * 4096  # somebody holds it
    os.close(descriptor)
    cache._path("139").write_bytes(b"torn")
    assert cache.get("139") is None
    with pytest.raises(UserError, match=r"has no room for 409,601 bytes .* raise data.local_cache_gb"):
        cache.hold("huge", 409_601, lambda file: file.write(b""))
    with pytest.raises(UserError, match="is a bucket; name a folder on a disk"):
        LocalCache("gs://bkt/x", 1)


FILLING = """
import sys
from ross_jax.data.local_cache import LocalCache
cache = LocalCache(sys.argv[1], 64 * 4096)
print("ready", flush=True)
for number in range(int(sys.argv[2]), 10**9):
    key = str(number % 100)
    data = cache.get(key)
    assert data in (None, key.encode() * 1000), key
    cache.put(key, key.encode() * 1000)
    if number % 10 == 0:
        file, descriptor = cache.hold("whole", 9000, lambda file: file.write(b"w" * 9000))
        assert open(descriptor, "rb").read() == b"w" * 9000
"""


def test_processes_that_are_killed_leave_a_sound_cache(tmp_path):
    for turn in range(4):
        command = [sys.executable, "-c", FILLING, str(tmp_path)]
        running = [subprocess.Popen([*command, str(33 * n)], stdout=subprocess.PIPE) for n in range(2)]
        for process in running:
            assert process.stdout.readline() == b"ready\n"
        time.sleep(0.2 + 0.1 * turn)
        for process in running:
            assert process.poll() is None
            process.kill()
            process.wait()
    cache = LocalCache(str(tmp_path), 64 * 4096)
    found = [cache.get(str(number)) for number in range(100)]
    assert 10 < sum(data is not None for data in found) <= 64
    assert all(data in (None, str(number).encode() * 1000) for number, data in enumerate(found))
    assert cache.hold("whole", 9000, lambda file: file.write(b"w" * 9000))[0].read_bytes() == b"w" * 9000


def test_what_is_changed_or_missing_is_said(tmp_path, server):  # noqa: F811
    folder = location(f"{ADDRESS}/errors")
    made = {kind: uploaded(KINDS[kind](tmp_path / kind), tmp_path / kind, f"errors/{kind}") for kind in KINDS}
    opened = {kind: open_(config, Caches()) for kind, config in made.items()}
    for kind in KINDS:
        for file in (folder / kind).files():
            file.write_bytes(file.read_bytes())  # the same content in another generation
    for kind, source in opened.items():
        with pytest.raises(UserError, match=rf"errors/{kind}.*was changed or removed after"):
            samples(source)
    whole = (folder / "zip" / "coco.zip").read_bytes()
    for name, content in {"cut.zip": whole[:-50], "cut.tar": b"", "data.json": b"[{]", "cut.parquet": b"PAR1"}.items():
        (folder / name).write_bytes(content)
    for config, message in [
        ({"path": f"{ADDRESS}/errors/none.json"}, r"errors/none\.json: cannot be read \(No such file or directory\)"),
        ({"path": "gs://no-such-bucket/a.json"}, r"gs://no-such-bucket/a\.json: cannot be read"),
        ({"path": f"{ADDRESS}/errors/zip"}, r"errors/zip: cannot be read \(Is a directory\)"),
        ({"path": f"{ADDRESS}/errors/data.json"}, r"errors/data\.json: corrupt JSON at line 1, column 3"),
        ({"path": f"{ADDRESS}/none", "kind": "images"}, "'gs://bkt/none' does not exist"),
        ({"path": f"{ADDRESS}/errors/cut.zip", "kind": "images"}, r"errors/cut\.zip: is a zip archive that cannot be"),
        ({"path": f"{ADDRESS}/errors/cut.tar", "kind": "images"}, r"errors/cut\.tar: is no folder, no zip and no tar"),
        ({"path": f"{ADDRESS}/none", "kind": "parquet"}, "gs://bkt/none: does not exist"),
        ({"path": f"{ADDRESS}/errors/tar", "kind": "parquet"}, r"errors/tar: no file in it ends in \.parquet"),
        ({"path": f"{ADDRESS}/errors/cut.parquet", "kind": "parquet"}, r"cut\.parquet: no Parquet file that can be"),
        ({"path": f"{ADDRESS}/none.tar", "kind": "webdataset"}, r"none\.tar: cannot be read"),
        ({"path": "s3://bkt/a.json"}, "s3:// is not supported"),
    ]:
        with pytest.raises(UserError, match=message):
            open_(config, Caches())


def test_a_server_that_dies_is_named_with_the_record(tmp_path, server, monkeypatch):  # noqa: F811
    made = {kind: uploaded(KINDS[kind](tmp_path / kind), tmp_path / kind, f"dies/{kind}") for kind in KINDS}
    opened = {kind: open_(config, Caches()) for kind, config in made.items()}
    rest = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: rest(seconds / 100))
    server.kill()
    try:
        for kind, source in opened.items():
            started = time.monotonic()
            with pytest.raises(StorageError, match=rf"gs://bkt/dies/{kind}.*does not answer") as raised:
                source[7].images[0].read()
            assert re.search(r"record 7\b|row |bytes \d+ to|\.jpg", str(raised.value)), raised.value
            assert time.monotonic() - started < 30
    finally:
        server.start()
    assert opened["zip"][7].images[0].read() == picture(7)


class Answers(http.server.BaseHTTPRequestHandler):
    """Passes requests on to the server of the tests, but for the first of those whose addresses it is told."""

    upstream, first = "", {}

    def do_GET(self):
        what = next((each for each in self.first if each in self.path), None)
        kind = self.first[what].pop() if what and self.first[what] else "pass"
        try:
            got = urllib.request.urlopen(urllib.request.Request(self.upstream + self.path, headers=self.headers))
        except urllib.error.HTTPError as error:
            got = error
        with got:
            content = got.read()
            self.send_response({"forbidden": 403, "busy": 503}.get(kind, got.status))
            for name in ("Content-Type", "Content-Length", "X-Goog-Generation"):
                if got.headers[name]:
                    self.send_header(name, got.headers[name])
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if kind == "cut" else content)

    def log_message(self, *arguments):
        pass


def test_answers_that_fail_are_asked_for_again_unless_access_is_refused(tmp_path, server, monkeypatch):  # noqa: F811
    config = uploaded(pictures(tmp_path / "images"), tmp_path / "images", "answers")
    expected = samples(open_(config, Caches()))
    monkeypatch.setattr(Answers, "upstream", server.environ["STORAGE_EMULATOR_HOST"])
    monkeypatch.setattr(Answers, "first", {"7%C3%A9.jpg": ["cut"], "8%C3%A9.jpg": ["busy", "busy"]})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{proxy.server_port}")
        client = type(location(ADDRESS).file_system)
        client.clear_instance_cache()
        try:
            source = open_(config, Caches())
            assert samples(source) == expected and not any(Answers.first.values())
            Answers.first["5%C3%A9.jpg"] = ["forbidden"]
            with pytest.raises(UserError, match=r"5é\.jpg: access is refused .* sign in"):
                samples(source)
        finally:
            client.clear_instance_cache()
            proxy.shutdown()
