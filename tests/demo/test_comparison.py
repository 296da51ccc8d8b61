"""The comparison's table and figure."""

import numpy as np
import pytest
from PIL import Image

from ross_jax.demo.comparison import Spread, draw, markdown, rows


def scores(kind: str, *seeds: tuple[tuple[float, ...], float | None]):
    return {
        str(seed): {
            "answers": [{"accuracy": value} for value in accuracies],
            "reconstruction": None if psnr is None else {"psnr_own": psnr, "psnr_other": 7.0},
        }
        for seed, (accuracies, psnr) in enumerate(seeds)
    }


SCORES = {
    "none": scores("none", ((0.4, 0.6), None), ((0.5, 0.7), None), ((0.6, 0.8), None)),
    "denoise": scores("denoise", ((0.5, 0.7), 20.0), ((0.5, 0.8), 21.0), ((0.7, 0.9), 25.0)),
}


def test_rows():
    """Accuracies are averaged over question types, then over seeds; gains are paired by seed."""
    none, denoise = rows(SCORES)
    assert none.gain is None and none.psnr is None
    np.testing.assert_allclose(none.accuracy.values, (0.5, 0.6, 0.7))
    np.testing.assert_allclose(denoise.gain.values, (0.1, 0.05, 0.1))
    assert denoise.psnr.mean == pytest.approx(22.0)
    assert denoise.psnr.deviation == pytest.approx(np.sqrt((4 + 1 + 9) / 2))


def test_markdown():
    lines = markdown(rows(SCORES)).splitlines()
    assert lines[2] == "| LLaVA | 0.600 ± 0.100 | - | - | - |"
    assert lines[3] == "| Ross^D | 0.683 ± 0.104 | +0.083 ± 0.029 | 22.0 ± 2.6 | 7.0 ± 0.0 |"


def test_one_seed_has_no_spread():
    assert Spread((0.25,)).format(2) == "0.25"
    one = rows({"pixel": scores("pixel", ((0.5,), 20.0))})
    assert markdown(one).splitlines()[-1] == "| Ross^R-Pixel | 0.500 | - | 20.0 | 7.0 |"


def test_figure(tmp_path):
    pytest.importorskip("matplotlib", reason="the `demo` extra is not installed")
    draw(tmp_path / "table.png", rows(SCORES), "title")
    assert np.asarray(Image.open(tmp_path / "table.png")).std() > 10
