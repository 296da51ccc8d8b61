"""The generation launcher."""

import numpy as np
import pytest
from PIL import Image

from launcher import load_script
from ross_jax.inference.model import load

launcher = load_script("generate")


@pytest.fixture
def image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png", pixels


def run(capsys, *args) -> tuple[int, str, str]:
    code = launcher.main([str(arg) for arg in args])
    return code, *capsys.readouterr()


def test_answers(model_folder, image, capsys):
    path, pixels = image
    common = ("--checkpoint", model_folder, "--max-new-tokens", 4)
    code, output, _ = run(capsys, *common, "--image", path, "--prompt", "What is it?")
    answer = load(model_folder).ask(pixels, "What is it?", max_new_tokens=4)
    assert code == 0 and output.removesuffix("\n") == answer
    code, other, _ = run(capsys, *common, "--prompt", "What is it?")
    assert code == 0 and other != output


def test_mistakes_end_in_one_line(model_folder, image, tmp_path, capsys):
    for args, message in [
        (("--checkpoint", tmp_path, "--prompt", "x"), "no ross_jax.json in it"),
        (("--checkpoint", model_folder, "--prompt", "x", "--image", tmp_path / "b.png"), "b.png: cannot be read"),
        (("--checkpoint", model_folder, "--prompt", "x", "--template", "qwen"), "did you mean 'qwen3'"),
        (("--checkpoint", model_folder, "--prompt", "<image> <image>", "--image", image[0]), "<image>"),
        (("--checkpoint", model_folder, "--prompt", "x", "--max-new-tokens", 0), "max_new_tokens 0: must be at least"),
    ]:
        code, output, error = run(capsys, *args)
        assert (code, output) == (1, "") and error.startswith("error: ") and message in error, error
