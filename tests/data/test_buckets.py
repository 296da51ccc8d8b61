"""Data in a bucket: the samples that a disk has, read by byte ranges, kept on a local disk; and errors."""

import json
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from bucket import ADDRESS, server  # noqa: F401
from data.layouts import COUNT, LAYOUTS, picture
from ross_jax.config import from_dict
from ross_jax.data.local_cache import LocalCache
from ross_jax.data.ranges import Caches
from ross_jax.data.sources import Limits, SourceConfig, open_source
from ross_jax.storage import copy_tree, location

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
        values = write(tmp_path / kind)
        there = uploaded(values, tmp_path / kind, kind)
        expected = samples(open_(values, Caches()))
        bare = open_(there, Caches())
        assert samples(bare) == expected, kind
        kept = open_(there, Caches(LocalCache(str(tmp_path / "local"), 10**9), f"{ADDRESS}/cache"))
        assert samples(kept) == expected, kind
        assert kept.fingerprint == bare.fingerprint == open_(values, Caches()).fingerprint, kind
        opened[kind] = pickle.dumps(kept), expected
    server.kill()
    try:
        for kind, (source, expected) in opened.items():
            assert samples(pickle.loads(source)) == expected, kind
    finally:
        server.start()
