"""Launchers read data from a bucket, and write there what they make of it, as on a disk."""

import contextlib
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from bucket import ADDRESS, server  # noqa: F401
from launcher import RECIPE, REPOSITORY, environment, load_script, losses, train
from ross_jax.api import export_model
from ross_jax.config import to_dict
from ross_jax.inference.model import load
from ross_jax.storage import copy_tree, location
from tiny_model import SIZED

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("server")]


@pytest.fixture(scope="module")
def there(recipe, server):  # noqa: F811
    """The recipe in the bucket, where its data and its tokenizer lie, too."""
    copy_tree(recipe.parent, location(f"{ADDRESS}/made"))
    path = location(f"{ADDRESS}/made/recipe.py")
    path.write_text(RECIPE.format(model=to_dict(SIZED), data=f"{ADDRESS}/made"))
    return path


def test_a_run_on_what_was_computed_before(whole, there, tmp_path):
    """Arrays are computed from images in the bucket, stored there, and read from there in place of images."""
    script = str(REPOSITORY / "launch" / "cache.py")
    command = [sys.executable, script, f"--config={there}", f"--output={ADDRESS}/computed"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "25 images in" in done.stdout and f"{ADDRESS}/computed: complete" in done.stdout
    flags = (f"--config.data.precomputed={ADDRESS}/computed", f"--config.data.local_cache={tmp_path}/local")
    done = train(there, tmp_path / "run", *flags)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(whole), rtol=1e-6)


def test_data_is_looked_at(there, recipe, tmp_path):
    main = load_script("inspect_data").main
    pages = {}
    for source, page in ((recipe, f"{tmp_path}/page.html"), (there, f"{ADDRESS}/page.html")):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert main(["--check", f"--config={source}", f"--html={page}"]) == 0
        pages[said.getvalue()] = location(page).read_text().replace(str(source), "")
    assert len(pages) == 1 and "0.png" in str(pages)
    asked = ["--template", "qwen_2", "--tokenizer", f"{recipe.parent}/tokenizer"]
    assert main([*asked, "--data", f"{ADDRESS}/made/data.json", "--json", f"{ADDRESS}/ids.json"]) == 0
    assert main([*asked, "--data", f"{recipe.parent}/data.json", "--json", f"{tmp_path}/ids.json"]) == 0
    assert location(f"{ADDRESS}/ids.json").read_text() == (tmp_path / "ids.json").read_text()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert main([*asked, "--data", "hdfs://a/b.json"]) == 1
    assert said.getvalue().startswith("error: hdfs://a/b.json: hdfs:// is not supported")


def test_a_model_is_used(model_folder, tmp_path, capsys):
    """Its questions and images lie in the bucket, and answers, predictions and reconstructions come to lie there."""
    root = location(f"{ADDRESS}/used")
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    rows = [{"question_id": i, "image": "a.png", "question": f"Is it {i}?", "answer": "yes"} for i in range(3)]
    (tmp_path / "pope.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "in.jsonl").write_text('{"id": 1, "image": "a.png", "prompt": "What?"}\n')
    copy_tree(tmp_path, root)
    copy_tree(model_folder, root / "model")

    def run(name: str, *args) -> tuple[int, str]:
        given = [str(arg) for arg in ("--checkpoint", root / "model", *args)]
        return load_script(name).main(given), capsys.readouterr().err

    asked = ("--max-new-tokens", 4, "--input", root / "in.jsonl", "--output")
    assert run("generate", *asked, root / "out.jsonl")[0] == 0
    answer = load(model_folder).ask(tmp_path / "a.png", "What?", max_new_tokens=4)
    assert json.loads((root / "out.jsonl").read_text()) == {"id": 1, "answer": answer}
    assert run("generate", *asked, root / "in.jsonl") == (
        1,
        f"error: {root}/in.jsonl: holds the requests; name another file for the answers\n",
    )
    pope = ("--benchmark", "pope", "--data", root, "--max-new-tokens", 4, "--processes", 2, "--output", root / "scores")
    assert run("evaluate", *pope, "--process", 0)[0] == 0 and not (root / "scores" / "results.json").exists()
    assert run("evaluate", *pope, "--process", 1)[0] == 0
    assert json.loads((root / "scores" / "results.json").read_text())["pope"]["answered"] == 3
    assert run("evaluate", "--rescore", "--output", root / "none") == (
        1,
        f"error: {root}/none: no predictions in it\n",
    )
    assert run("reconstruct", "--images", root, "--steps", 2, "--output", root / "drawn") == (0, "")
    drawn = {path.name for path in (root / "drawn").iterdir()}
    assert drawn == {"a.picture.png", "a.reconstruction.png", "a.autoencoder.png", "grid.png"}


def test_an_export_for_transformers_is_that_of_a_disk(model_folder, tmp_path):
    found = []
    for place in (tmp_path / "made", f"{ADDRESS}/exports/made"):
        folder = export_model(model_folder, place, layout="llava")
        files = [path for path in folder.rglob("*") if path.is_file()]
        found.append({path.relative_to(folder).as_posix(): path.read_bytes() for path in files})
    assert found[0] == found[1]


def test_benchmarks_are_read(tmp_path):
    evaluate = load_script("evaluate")
    folder = tmp_path / "benchmarks"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "1.jpg").write_bytes(b"an image")
    (folder / "POPE.tsv").write_text('index\tquestion\tanswer\timage\n1\t"Is\n it?"\tYes\timages/1.jpg\n')
    (folder / "Questions.csv").write_text("lndex,Question,Options,Correct Answer\n1,Open?,(a) Open (b) Closed,(a)\n")
    (folder / "exact.jsonl").write_text('{"question": "Who?", "answer": "me", "image": "1.jpg"}\n')
    copy_tree(folder, location(f"{ADDRESS}/benchmarks"))
    found = []
    for place in (str(folder), f"{ADDRESS}/benchmarks"):
        args = evaluate.make_parser().parse_args(
            ["--benchmark", "pope", "mmvp", f"exact={place}/exact.jsonl", "--data", place, "--output", "scores"]
        )
        questions = {name: each.questions for name, each in evaluate.read_all(args).items()}
        found.append(
            [(name, each.question, each.answers, each.fields) for name, some in questions.items() for each in some]
        )
        assert [questions[name][0].images[0].read() for name in ("pope", "mmvp", "exact")] == [b"an image"] * 3
    assert found[0] == found[1] and len(found[0]) == 3
