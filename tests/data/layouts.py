"""Twelve samples, written in every layout that the product reads."""

import base64
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from PIL import Image
from pyarrow import parquet

QUESTION, COUNT = "What is it?", 12


def picture(number: int) -> bytes:
    """A JPEG whose colour identifies it."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (20 * number, 255 - 20 * number, 60)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def colour(pixels: Any) -> int:
    """The number of the picture."""
    return round(float(np.asarray(pixels)[..., 0].mean()) / 20)


def answer(number: int) -> str:
    return "a" * (1 + number % 5)


def llava(number: int) -> list[dict[str, str]]:
    return [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": answer(number)}]


def messages(number: int, parts: bool, **image: Any) -> list[dict[str, Any]]:
    content = [{"type": "image", **image}, {"type": "text", "text": QUESTION}] if parts else QUESTION
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer(number)}]


def onevision(folder: Path) -> dict[str, Any]:
    """LLaVA-OneVision: two shards of three row groups."""
    folder.mkdir()
    for shard in range(2):
        numbers = range(6 * shard, 6 * shard + 6)
        rows = {
            "id": [f"s{n}" for n in numbers],
            "image": [{"bytes": picture(n), "path": f"{n}.jpg"} for n in numbers],
            "conversations": [llava(n) for n in numbers],
            "data_source": ["made"] * 6,
        }
        parquet.write_table(pyarrow.table(rows), folder / f"train-0000{shard}-of-00002.parquet", row_group_size=2)
    return {"path": str(folder), "kind": "parquet"}


def finevision(folder: Path) -> dict[str, Any]:
    """FineVision: one file; ratings of item and row are from 1 to 5, and of every second row 2."""
    numbers = range(COUNT)
    rows = {
        "images": [[{"bytes": picture(n), "path": None}] for n in numbers],
        "texts": [[{"user": QUESTION, "assistant": answer(n)}, {"user": "And?", "assistant": "no"}] for n in numbers],
        "source": ["made"] * COUNT,
        "relevance_ratings": [[5, 1 + n % 5] for n in numbers],
        "relevance_min": [None if n == 3 else 1 + n % 5 for n in numbers],
    }
    folder.mkdir()
    parquet.write_table(pyarrow.table(rows), folder / "data.parquet", row_group_size=5)
    return {"path": str(folder / "data.parquet"), "kind": "parquet"}


def json_lines(folder: Path, make: Any) -> dict[str, Any]:
    folder.mkdir()
    records = [{"id": f"s{n}", **make(n)} for n in range(COUNT)]
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for number in range(COUNT):
        (folder / f"{number}.jpg").write_bytes(picture(number))
    return {"path": str(folder / "data.jsonl"), "images": (str(folder),)}


def encoded(number: int) -> str:
    return base64.b64encode(picture(number)).decode()


def webdataset(folder: Path, suffix: str = "json") -> dict[str, Any]:
    """Three shards of four keys."""
    folder.mkdir()
    for shard in range(3):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as archive:
            for number in range(4 * shard, 4 * shard + 4):
                text = json.dumps({"id": f"s{number}", "conversations": llava(number)})
                content = {"jpg": picture(number), suffix: (text if suffix == "json" else answer(number)).encode()}
                for name, data in content.items():
                    member = tarfile.TarInfo(f"data/{number:06}.{name}")
                    member.size, member.mtime = len(data), 1.5  # a fraction makes tarfile write an extended header
                    archive.addfile(member, io.BytesIO(data))
    return {"path": str(folder), "kind": "webdataset"}


LAYOUTS = {
    "onevision": onevision,
    "finevision": finevision,
    "messages": lambda folder: json_lines(
        folder, lambda n: {"messages": messages(n, parts=False), "images": [f"{n}.jpg"]}
    ),
    "typed parts": lambda folder: json_lines(
        folder, lambda n: {"messages": messages(n, parts=True), "images": [f"{n}.jpg"]}
    ),
    "image parts": lambda folder: json_lines(
        folder, lambda n: {"conversations": messages(n, parts=True, image={"path": f"{n}.jpg"})}
    ),
    "base64": lambda folder: json_lines(folder, lambda n: {"image": encoded(n), "conversations": llava(n)}),
    "image_url": lambda folder: json_lines(
        folder,
        lambda n: {"messages": messages(n, parts=True, image_url={"url": f"data:image/jpeg;base64,{encoded(n)}"})},
    ),
    "webdataset": webdataset,
    "webdataset of captions": lambda folder: webdataset(folder, "txt"),
}
"""Name -> function that writes the data into a folder and returns the source's config. Sample n has picture n."""
