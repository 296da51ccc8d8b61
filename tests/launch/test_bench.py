"""`launch/bench.py data` measures what training would read."""

import json

import pytest

from launcher import load_script

bench = load_script("bench")

SMALL = ["--samples", "40", "--batch", "8", "--image-size", "16", "--image-tokens", "4", "--length", "1300"]


@pytest.mark.parametrize("layout", ["pack", "pad"])
def test_synthetic_data(tmp_path, capsys, layout):
    assert bench.main(["data", *SMALL, "--layout", layout, "--json", str(tmp_path / "out.json")]) == 0
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["conversations"] == 40 and figures["dropped"] == 0
    assert figures["steps_read"] == figures["steps"] - 1  # all but the first, which starts the threads
    assert figures["samples_per_s"] > 0 and 0 < figures["efficiency"] <= 1
    assert "samples_per_s" in capsys.readouterr().out


def test_given_data_and_errors(tmp_path, capsys):
    data = bench.write_synthetic(tmp_path, 30)
    assert bench.main(["data", *SMALL, "--data", data, "--images", str(tmp_path), "--steps", "1"]) == 0
    capsys.readouterr()
    assert bench.main(["data", "--data", data, "--images", "/nowhere"]) == 1
    assert "error: image folder '/nowhere' does not exist" in capsys.readouterr().err
    assert bench.main(["data", *SMALL, "--batch", "40"]) == 1
    assert "lower --batch" in capsys.readouterr().err
