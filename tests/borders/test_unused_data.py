"""Data that a run does not use: the user learns how much it is, and why."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from launcher import make_records, train

QUESTION = "What is it?"


def make_record(mark: str = "<image>", question: str = QUESTION, **fields: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"{mark}\n{question}".strip()}, {"from": "gpt", "value": "a cat"}]
    return {"conversations": turns} | fields


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory) -> Callable[[list], tuple[int, str]]:
    """Function: records -> exit status of a run on them, and what it says besides its steps."""

    def call(records: list) -> tuple[int, str]:
        folder = tmp_path_factory.mktemp("run")
        (folder / "data.json").write_text(json.dumps([{"id": i} | record for i, record in enumerate(records)]))
        source = {"path": str(folder / "data.json"), "images": (str(recipe.parent),)}
        done = train(recipe, folder / "run", f"--config.data.sources=({source},)")
        if "Traceback" in done.stderr:
            pytest.fail(done.stderr[-1000:])
        lines = [line for line in done.stderr.splitlines() if not line.startswith("step ")]
        return done.returncode, "\n".join(lines).replace(str(folder), "")

    return call


@pytest.mark.slow
def test_conversations_that_fit_no_row(run):
    """Of 24 conversations 12 have four images, for which a row has no place, and 8 are longer than a row."""
    records = [record | {"image": "0.png"} for record in make_records()[:4]]
    records += [make_record("<image>" * 4, image=["0.png"] * 4)] * 12
    records += [make_record(image="0.png", question="long " * 200)] * 8
    _, said = run(records)
    assert re.search(r"\b20\b", said), said
    assert re.search(r"packing\.images", said) and re.search(r"packing\.length|too_long", said), said


@pytest.mark.slow
def test_all_images_under_another_key(run):
    """Every record names its image under a key that is not read: training would be blind."""
    status, said = run([make_record(photo="0.png")] * 12)
    assert status == 1 and "error: " in said, said
    assert re.search(r"\bphoto\b", said), said


@pytest.fixture(scope="module")
def mixed(run) -> str:
    """What a run says of a mix of sound records, of fields that it does not read, and of a text about SVG."""
    records = [make_record(image="0.png")] * 14 + [make_record("", "What does <image> mean in SVG?")]
    records += [make_record(photo="0.png")] * 4
    records += [make_record(image="0.png", system="You are a vet.")] * 3
    records += [make_record("<video>", video="0.mp4")] * 2
    return run(records)[1]


@pytest.mark.slow
@pytest.mark.parametrize("field", ["photo", "system", "video"])
def test_fields_that_are_not_read(field, mixed):
    """A mix of several data sets: a few of its images are under another key, some records are videos."""
    assert re.search(rf"\b{field}\b", mixed), mixed


@pytest.mark.slow
def test_marks_without_an_image_are_counted(mixed):
    """Four questions begin with a mark and have no image; a fifth only speaks of such marks."""
    assert re.search(r"\b4\b.*(<image>|\bmark)|(<image>|\bmark).*\b4\b", mixed), mixed
