"""The README's Python example runs unchanged."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

from tiny_model import write_model

README = Path(__file__).parents[1] / "README.md"


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    """The example runs in a folder that has the models and images it names."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    example = next(block for block in blocks if "import ross_jax" in block)
    paths = [Path(path) for path in re.findall(r'"((?:[\w.-]+/)+[\w.-]+)"', example)]
    models = {path for path in paths if not path.suffix}
    images = {path for path in paths if path.suffix}
    assert models and images
    for path in models:
        write_model(tmp_path / path)
    for path in images:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(tmp_path / path)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, str(README), "exec"), {})
    assert capsys.readouterr().out.endswith("\n")
    assert Image.open("reconstruction.png").size == (32, 32)
