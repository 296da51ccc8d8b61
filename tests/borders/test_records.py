"""Records that cannot be used: errors lead to them, and one of them ends no run."""

import base64
import io
import json
import re
import zipfile

import numpy as np
import pytest
from PIL import Image

from launcher import make_records, train
from ross_jax.config import UserError
from ross_jax.data.images import decode
from ross_jax.data.sources import SourceConfig, open_source

BAD = 7  # place of the bad record

IDS = {"no id": {}, "null id": {"id": None}, "one id for all": {"id": "x"}}
DEFECTS = {
    "a number as answer": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": 42}]},
    "an unknown role": {"conversations": [{"from": "hunam", "value": "hi"}]},
    "nothing said": {"conversations": []},
    "no mark for an image": {"image": "0.png"},
}


def make_file(fields: dict, defect: dict) -> str:
    """Twelve records with the `fields`, of which number `BAD` has a defect."""
    talk = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
    records = [{"conversations": talk} | fields | (defect if i == BAD else {}) for i in range(12)]
    return json.dumps(records)


@pytest.mark.parametrize("defect", DEFECTS.values(), ids=DEFECTS)
@pytest.mark.parametrize("fields", IDS.values(), ids=IDS)
def test_inspection_leads_to_a_bad_record(fields, defect, call, recipe, tmp_path):
    """A user looks for one bad record where ids are absent or the same for all."""
    path = tmp_path / "data.json"
    path.write_text(make_file(fields, defect))
    tokenizer = recipe.parent / "tokenizer"
    status, _, said = call("inspect_data", "--template", "qwen_2", "--tokenizer", tokenizer, "--data", path)
    assert status == 0
    (line,) = [line for line in said.splitlines() if line.startswith("left out")]
    assert re.search(rf"\b(json|record|item|index|number)\b.{{0,12}}\b{BAD}\b", line), line


@pytest.fixture(scope="module")
def refused(recipe, tmp_path_factory) -> str:
    """What a run says of several files with a bad record each."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "good.json").write_text(make_file({}, {}))
    for name, fields in IDS.items():
        (folder / f"{name}.json").write_text(make_file(fields, DEFECTS["a number as answer"]))
    sources = tuple({"path": str(folder / f"{name}.json")} for name in ("good", *IDS))
    done = train(recipe, folder / "run", f"--config.data.sources={sources}")
    return done.stderr[done.stderr.index("error: ") :]


@pytest.mark.slow
@pytest.mark.parametrize("name", IDS)
def test_training_leads_to_bad_records(name, refused):
    """A user trains on several files, some of which have a bad record."""
    assert re.search(rf"{name}\.json.{{0,12}}\b{BAD}\b", refused), refused


def png() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


CONTENT = base64.b64encode(png()).decode()
NAMES = {
    "base64": CONTENT,
    "data URI": f"data:image/png;base64,{CONTENT}",
    "300 letters": "x" * 300 + ".png",
    "a lone surrogate": "\ud83d.png",
    "a zero byte": "a\0.png",
}


@pytest.mark.parametrize(
    ("place", "name"),
    [pytest.param(place, name, id=f"{name}, {place}") for place in ("folder", "zip") for name in NAMES],
)
def test_image_names_that_are_none(place, name, tmp_path):
    """An export wrote the image itself, or a name that no file can have, where the image's name belongs."""
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]
    (tmp_path / "data.json").write_text(json.dumps([{"id": 5, "image": NAMES[name], "conversations": turns}]))
    images = tmp_path / "images"
    if place == "zip":
        with zipfile.ZipFile(images, "w") as archive:
            archive.writestr("0.png", png())
    else:
        images.mkdir()
    (sample,) = open_source(SourceConfig(str(tmp_path / "data.json"), images=(str(images),)))
    try:
        content = sample.images[0].read()
    except UserError as error:
        assert len(str(error)) < 600
    else:
        assert CONTENT in NAMES[name] and decode(content, "image").size == (40, 40)


@pytest.mark.slow
def test_training_goes_on_without_such_images(recipe, tmp_path):
    """A few records of a large file hold such names, and the user lets a share of the data be broken."""
    records = [record | {"image": name} for record, name in zip(make_records(), NAMES.values(), strict=False)]
    (tmp_path / "data.json").write_text(json.dumps(records + make_records()[len(records) :]))
    source = {"path": str(tmp_path / "data.json"), "images": (str(recipe.parent),)}
    flags = (f"--config.data.sources=({source},)", "--config.data.max_broken=0.5")
    done = train(recipe, tmp_path / "run", *flags)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-1000:]
    assert "6 of 6 steps" in done.stdout
    assert max(map(len, done.stderr.splitlines())) < 1000
