"""Scores of images equal values computed by hand; pixels of a grid."""

import math

import numpy as np
import pytest
from PIL import Image

from ross_jax.config import UserError
from ross_jax.evaluation.images import draw_grid, is_nearest, psnr, ssim, to_uint8


def test_float_images_become_bytes():
    assert to_uint8(np.array([[[[-3.0, 0.0, 3.0]]]], np.float32)).tolist() == [[[[0, 128, 255]]]]


def test_ssim():
    """SSIM of flat images with values a and b is (2ab + c) / (a^2 + b^2 + c), c = (0.01 * 255)^2."""
    pytest.importorskip("skimage", reason="the `demo` extra is not installed")
    flat = np.full((2, 16, 16, 3), 100, np.uint8)
    other = flat.copy()
    other[1] = 200
    constant = (0.01 * 255) ** 2
    expected = (2 * 100 * 200 + constant) / (100**2 + 200**2 + constant)
    np.testing.assert_allclose(ssim(other, flat), [1.0, expected], rtol=1e-6)


def test_psnr():
    black = np.zeros((3, 4, 4, 3), np.uint8)
    other = black.copy()
    other[0] += 255
    other[1] += 1
    values = psnr(other, black)
    assert values[:2] == pytest.approx([0.0, 20 * math.log10(255)])
    assert values[2] == math.inf
    assert psnr(black, other)[:2] == pytest.approx(values[:2])  # uint8 differences do not wrap around


def test_retrieval():
    originals = np.random.default_rng(0).integers(256, size=(8, 6, 6, 3)).astype(np.uint8)
    noisy = np.clip(originals + np.random.default_rng(1).normal(0, 30, originals.shape), 0, 255)
    assert is_nearest(noisy, originals).all()
    swapped = noisy[[1, 0, 2, 3, 4, 5, 6, 7]]
    assert is_nearest(swapped, originals).tolist() == [False] * 2 + [True] * 6


def test_grid(tmp_path):
    red = np.zeros((2, 8, 8, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
    blue = red[..., ::-1]
    draw_grid(tmp_path / "grid.png", {"picture": red, "reconstruction": blue}, scale=3)
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    for colour in ((255, 0, 0), (0, 0, 255)):
        assert (pixels == np.array(colour)).all(axis=-1).sum() == 2 * 24 * 24
    first_red = np.argwhere((pixels == (255, 0, 0)).all(-1))[0]
    first_blue = np.argwhere((pixels == (0, 0, 255)).all(-1))[0]
    assert first_red[0] == first_blue[0] and first_red[1] + 24 <= first_blue[1]
    with pytest.raises(UserError, match="one shape"):
        draw_grid(tmp_path / "grid.png", {"a": red, "b": blue[:1]})
