"""Every published layout, as one mixture: checked by launch/inspect_data.py, trained, stopped and continued."""

import html.parser
import json
import re
from pathlib import Path

import pytest

from data.layouts import COUNT, LAYOUTS
from launcher import RECIPE, load_script, step_lines
from ross_jax.command_line import load_recipe
from ross_jax.config import to_dict
from ross_jax.training.run import Run
from tiny_model import SIZED
from tokenizer_fixtures import byte_level_tokenizer

inspect_data = load_script("inspect_data")


@pytest.fixture
def recipe(tmp_path) -> Path:
    byte_level_tokenizer().save_pretrained(tmp_path / "tokenizer")
    sources = [make(tmp_path / name.replace(" ", "_")) | {"name": name} for name, make in LAYOUTS.items()]
    text = RECIPE.format(model=to_dict(SIZED), data=str(tmp_path))
    path = tmp_path / "recipe.py"
    path.write_text(re.sub(r'"sources": .*', lambda _: f'"sources": {sources!r},', text))
    return path


def table(text: str) -> dict[str, list[str]]:
    """First column -> other cells, of the rows up to a blank line."""
    rows = [re.split(r"  +| (?=-?\d)", line) for line in text.partition("\n\n")[0].splitlines()]
    return {row[0]: [cell for cell in row[1:] if cell] for row in rows}


def check(recipe: Path, *arguments: str) -> int:
    return inspect_data.main(["--check", f"--config={recipe}", *arguments])


def change(folder: Path, **changes) -> None:
    """Changes records of the source `messages`: {name: (record, new fields)}."""
    path = folder / "messages" / "data.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for number, fields in changes.values():
        records[number] |= fields
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


LONG = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "long " * 100}]


def test_a_mixture_is_checked(recipe, tmp_path, capsys):
    assert check(recipe) == 0
    rows = table(capsys.readouterr().out)
    assert [rows[name][:2] for name in LAYOUTS] == [[str(COUNT)] * 2] * len(LAYOUTS)
    assert rows["all"][0] == str(COUNT * len(LAYOUTS)) and rows["all"][7] == rows["all"][0]
    change(
        tmp_path,
        broken=(0, {"images": ["<absent>.jpg"]}),
        role=(1, {"messages": [{"role": "hunam", "content": "Hi"}]}),
        long=(2, {"messages": LONG, "images": []}),
        text=(3, {"messages": [*LONG[:1], {"role": "assistant", "content": "Yo <b>"}], "images": []}),
    )
    page = tmp_path / "page.html"
    assert check(recipe, "--config.data.max_broken=0.02", f"--html={page}") == 3
    out = capsys.readouterr().out
    # samples, an epoch, broken, dropped, cut, unsupervised, text only, images
    assert table(out)["messages"][:8] == ["12", "9", "2", "1", "0", "0", "1", "8"]
    assert "record 0 (line 1): sample 's0': <absent>.jpg: no such image" in out
    assert "messages[0]: 'hunam' is no role" in out and "tokens, a row has 256" in out
    assert check(recipe, "--config.data.packing.too_long=truncate", "--config.data.max_broken=0.02") == 3
    assert table(capsys.readouterr().out)["messages"][:6] == ["12", "10", "2", "0", "1", "0"]
    assert check(recipe) == 1
    assert "2 of 108 samples are broken, more than data.max_broken = 1.0% allows" in capsys.readouterr().err
    assert check(recipe, "--config.data.packing.length=100", "--config.data.max_broken=0.02") == 1
    assert "dropped, more than data.max_dropped" in capsys.readouterr().err
    check_page(page.read_text())


def check_page(text: str) -> None:
    """Images are inside the page, marks of the data are text, and elements are closed."""
    tags: list[str] = []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            tags.append(tag)
            for name, value in attributes:
                assert name not in ("href", "onerror") and (
                    name != "src" or value.startswith("data:image/jpeg;base64,")
                )

    Reader().feed(text)
    assert tags.count("figure") > 40 and tags.count("table") == 1 and "absent" not in tags
    assert "&lt;absent&gt;.jpg: no such image" in text and "<mark> aaa&lt;|im_end|&gt;</mark>" in text
    assert "40 x 30, read as 28 x 28" in text and "hunam" in text


def test_errors_of_arguments(recipe, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        inspect_data.main(["--check"])
    assert "--check needs --config" in capsys.readouterr().err
    assert check(recipe, "--config.data.bach=1") == 1
    assert "did you mean 'batch'" in capsys.readouterr().err
    assert check(recipe, f"--html={tmp_path}/absent/page.html") == 1
    assert "--html" in capsys.readouterr().err


def test_a_mixture_trains_and_continues(recipe, tmp_path):
    """Two steps, then two more: lengths and plans are not made again, and metrics have the losses of the sources."""
    config = load_recipe(str(recipe), ["--config.data.epochs=1"])
    assert Run(config, tmp_path / "run").train(stop_at=lambda step: step == 2) == 2
    cached = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "cache").iterdir()}
    assert len(cached) == 3  # lengths, and the plan for new and for continued runs
    continued = Run(config, tmp_path / "run")
    assert continued.step == 2 and continued.train(stop_at=lambda step: step == 4) == 4
    assert cached == {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "cache").iterdir()}
    lines = step_lines(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        counts = {name: line[f"conversations/{name}"] for name in LAYOUTS}
        found = [name for name, count in counts.items() if count]
        assert 1 <= sum(counts.values()) <= 8
        assert {name for name in line if name.startswith("text_loss/")} == {f"text_loss/{name}" for name in found}
        means = [line[f"reconstruction_loss/{name}"] for name in found]
        assert min(means) - 1e-6 <= line["reconstruction_loss"] <= max(means) + 1e-6
