"""launch/compare.py on little data."""

import json

import pytest

from launcher import load_script

pytest.importorskip("skimage", reason="the `demo` extra is not installed")
pytest.importorskip("sklearn", reason="the `demo` extra is not installed")


@pytest.mark.slow
def test_two_kinds(tmp_path, capsys):
    """All arms are trained from one base and scored; a second call trains nothing and prints the same."""
    compare, root = load_script("compare"), tmp_path / "comparison"
    arguments = ["--quick", "--kinds", "none", "denoise", "--seeds", "1", "--root", str(root)]
    assert compare.main(arguments) == 0
    output = capsys.readouterr().out
    scores = json.loads((root / "scores.json").read_text())
    assert list(scores) == ["none", "denoise"]
    for kind, seeds in scores.items():
        assert {row["count"] for row in seeds["1"]["answers"]} == {12}
        assert (seeds["1"]["reconstruction"] is None) == (kind == "none")
    assert (root / "table.md").read_text() in output and (root / "table.png").stat().st_size > 5000
    before = (root / "denoise/seed1/finetune/metrics.jsonl").read_bytes()
    assert compare.main(arguments) == 0
    assert capsys.readouterr().out == output
    assert (root / "denoise/seed1/finetune/metrics.jsonl").read_bytes() == before


def test_a_root_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert load_script("compare").main(["--quick", "--root", str(tmp_path / "file" / "x")]) == 1
    assert "error: " in capsys.readouterr().err
