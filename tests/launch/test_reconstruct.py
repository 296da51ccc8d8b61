"""The reconstruction launcher."""

import re

import numpy as np
import pytest
from PIL import Image

from launcher import load_script

pytest.importorskip("skimage", reason="the `demo` extra is not installed")
launcher = load_script("reconstruct")


@pytest.fixture
def image_files(tmp_path):
    """A folder of two images, and an image outside with the name of one of them."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for path in (folder / "a.png", folder / "b.JPG", tmp_path / "a.png"):
        Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(path)
    (folder / "notes.txt").write_text("no picture")
    return folder, tmp_path / "a.png"


def run(capsys, *args) -> tuple[int, str, str]:
    code = launcher.main([str(arg) for arg in args])
    return code, *capsys.readouterr()


@pytest.mark.parametrize(
    ("sampler", "steps"),
    [pytest.param("ddpm", 4, marks=pytest.mark.slow), pytest.param("ddim", 3, marks=pytest.mark.slow), ("dpm", 3)],
)
def test_images_and_table(sampler, steps, model_folder, image_files, tmp_path, capsys):
    common = (
        "--checkpoint",
        model_folder,
        "--images",
        *image_files,
        "--sampler",
        sampler,
        "--steps",
        steps,
        "--rows",
        2,
    )
    code, output, error = run(capsys, *common, "--output", tmp_path / "out")
    assert code == 0, error
    rows = {row.split()[0]: [float(value) for value in row.split()[1:]] for row in output.splitlines()[1:4]}
    assert set(rows) == {"reconstruction", "autoencoder", "nothing"}
    assert rows["autoencoder"][2] == 0.0 < rows["reconstruction"][2] and all(-1 <= row[1] <= 1 for row in rows.values())
    names = {"a.0", "b", "a.2"}
    kinds = ("picture", "reconstruction", "autoencoder")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "grid.png",
        *(f"{name}.{kind}.png" for name in names for kind in kinds),
    }
    shown = {kind: np.asarray(Image.open(tmp_path / "out" / f"b.{kind}.png")) for kind in kinds}
    assert {pixels.shape for pixels in shown.values()} == {(32, 32, 3)}
    assert re.search("grid.png$", output.strip())
    again = run(capsys, *common, "--output", tmp_path / "again")
    assert again[1].splitlines()[:4] == output.splitlines()[:4]
    assert (tmp_path / "again" / "grid.png").read_bytes() == (tmp_path / "out" / "grid.png").read_bytes()


def test_mistakes_end_in_one_line(model_folder, image_files, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for images, more, message in [
        ([tmp_path / "empty"], (), "empty: no image in this folder"),
        ([tmp_path / "nowhere"], (), "nowhere: no such file or folder"),
        ([tmp_path / "broken.png"], (), "broken.png"),
        (image_files, ("--rows", 0), "--rows 0: at least 1"),
        (image_files, ("--steps", 1), "at least 2 steps"),
    ]:
        common = ("--checkpoint", model_folder, "--output", tmp_path / "out", "--images", *images)
        code, output, error = run(capsys, *common, *more)
        assert (code, output) == (1, "") and error.startswith("error: ") and message in error, error
    assert not (tmp_path / "out").exists()
