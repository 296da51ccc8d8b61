"""From nothing to a score, with the commands of the guide: prepare, import, both stages, export, ask, score."""

import gzip
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from hub_mirror import serve
from launcher import REPOSITORY, environment
from tokenizer_fixtures import byte_level_tokenizer

pytestmark = pytest.mark.slow

GOLDEN = REPOSITORY / "tests" / "golden" / "siglip_qwen2"
SMALL = (
    "--config.model.denoiser.width=32 --config.model.denoiser.num_heads=4 --config.model.denoiser.depth=1 "
    "--config.step.dtype=float32 --config.step.remat=none --config.data.packing.length=256 --config.data.batch=4 "
    "--config.loop.log=1"
)
ARCHIVES = ("coco", "gqa", "ocr_vqa", "textvqa", "vg", "ai2d", "chartqa", "docvqa", "dvqa")


def picture(number: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def record(number: int, image: str) -> dict:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "ab"[number % 2]}]
    return {"id": str(number), "image": image, "conversations": turns}


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    """Tiny files under the names of the public ones."""
    root = tmp_path_factory.mktemp("mirror")
    parts = {"vision_tower": "google/siglip-so400m-patch14-384", "llm": "Qwen/Qwen2-7B-Instruct"}
    for folder, repo in (parts | {"vae": "black-forest-labs/FLUX.1-dev/vae"}).items():
        shutil.copytree(GOLDEN / folder, root / "models" / repo)
    byte_level_tokenizer().save_pretrained(root / "models" / parts["llm"])
    (root / "models" / parts["llm"] / "README.md").write_text("not needed")
    older = root / "models" / "lmsys" / "vicuna-7b-v1.5"  # has no safetensors
    older.mkdir(parents=True)
    for name in ("config.json", "pytorch_model.bin"):
        (older / name).write_text("{}")
    pretrain = root / "datasets" / "liuhaotian" / "LLaVA-Pretrain"
    pretrain.mkdir(parents=True)
    captions = [record(i, f"00000/{i}.jpg") for i in range(8)]
    (pretrain / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(captions))
    with zipfile.ZipFile(pretrain / "images.zip", "w") as archive:
        for i in range(8):
            archive.writestr(f"00000/{i}.jpg", picture(i))
        archive.writestr(
            "padding", np.random.default_rng(0).bytes(24 * 2**20)
        )  # the hub's client keeps 10 MB at a time
    cambrian = root / "datasets" / "nyu-visionx" / "Cambrian-10M"
    (cambrian / "jsons").mkdir(parents=True)
    lines = [json.dumps(record(i, f"{name}/{i}.png")) for i, name in enumerate(ARCHIVES)]
    (cambrian / "jsons" / "Cambrian737k.jsonl").write_text("\n".join(lines) + "\n")
    for i, name in enumerate(ARCHIVES):
        prefix = "" if name == "gqa" else f"{name}/"  # an archive without its own name
        info, content = tarfile.TarInfo(f"{prefix}{i}.png"), picture(i)
        info.size = len(content)
        with gzip.open(cambrian / f"{name}.tar.gz", "wb") as packed, tarfile.open(fileobj=packed, mode="w") as archive:
            archive.addfile(info, io.BytesIO(content))
    with serve(root) as served:
        yield served


def run(mirror, line: str, status: int = 0) -> subprocess.CompletedProcess:
    """Runs a command of the guide."""
    program, *arguments = shlex.split(line)
    assert program == "python"
    found = environment() | {"HF_ENDPOINT": mirror.url, "HF_HOME": str(mirror.root / "home")}
    command = [sys.executable, str(REPOSITORY / arguments[0]), *arguments[1:]]
    done = subprocess.run(command, capture_output=True, text=True, env=found, check=False, timeout=600)
    assert done.returncode == status and "Traceback" not in done.stderr, f"{line}\n{done.stdout}\n{done.stderr}"
    return done


def next_commands(done: subprocess.CompletedProcess) -> list[str]:
    return done.stdout.split(" Next:\n")[1].splitlines()


def test_the_whole_chain(mirror, tmp_path):
    root = tmp_path / "ross"
    prepare = f"python launch/prepare.py --stage pretrain --root {root}"
    told = run(mirror, prepare, status=1)
    assert "error: 5 of 5 are missing, about 46 GB or more" in told.stderr
    assert re.search(
        r"black-forest-labs/FLUX.1-dev.*missing config.json.*Non-Commercial.*accept its terms", told.stdout
    )
    mirror.cut.add("images.zip")
    steps = next_commands(run(mirror, f"{prepare} --download"))
    assert [start for name, start in mirror.asked if name == "images.zip"][-1] > 0  # it went on where it was cut off
    assert not list(root.rglob("README.md")) and (root / "pretrain.py").is_file()
    before = len(mirror.asked)
    run(mirror, f"{prepare} --download")
    assert len(mirror.asked) == before  # nothing is downloaded twice
    imports, train, prepare = steps
    run(mirror, imports)
    first = run(mirror, f"{train} {SMALL}")
    assert "language" in first.stderr and f"<- {root}/models/start" in first.stderr
    steps = next_commands(run(mirror, f"{prepare} --download"))
    assert (root / "data" / "Cambrian-10M" / "coco.tar").is_file()
    assert "'gqa=" in (root / "finetune.py").read_text()
    train, export, ask, score = steps
    forgotten = f"--config.init=('{root}/models/start',)"
    assert "no model directory has projector" in run(mirror, f'{train} {SMALL} "{forgotten}"', status=1).stderr
    second = run(mirror, f"{train} {SMALL}")
    assert re.search(rf"projector .* trained +<- {root}/runs/pretrain\n", second.stderr)
    assert re.search(rf"data: {len(ARCHIVES)} conversations with {len(ARCHIVES)} images; 0 do not fit", second.stderr)
    assert second.stdout.endswith("steps: finished\n")
    run(mirror, export)
    assert (root / "exported" / "config.json").is_file()
    (tmp_path / "a.png").write_bytes(picture(0))
    ask = ask.replace("PICTURE", str(tmp_path / "a.png")).replace("QUESTION", "'What?' --max-new-tokens 3")
    assert run(mirror, ask).returncode == 0
    (root / "benchmarks").mkdir()
    question = {"id": 1, "image": str(tmp_path / "a.png"), "question": "What?", "answer": ["a"]}
    (root / "benchmarks" / "exact.jsonl").write_text(json.dumps(question) + "\n")
    run(mirror, score.replace("pope mmbench_en", "exact --max-new-tokens 3"))
    assert json.loads((root / "scores" / "results.json").read_text())


def test_own_data_and_what_is_wrong(mirror, tmp_path):
    """A damaged download is removed and named; pictures that are not there are counted; a file of one's own stays."""
    root = tmp_path / "ross"
    (tmp_path / "mine.json").write_text(json.dumps([record(i, f"{i}.png") for i in range(4)]))
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        (tmp_path / "pictures" / f"{i}.png").write_bytes(picture(i))
    own = f"--data {tmp_path / 'mine.json'} --images {tmp_path / 'pictures'}"
    prepare = f"python launch/prepare.py --stage finetune --root {root} {own} --download"
    weights = "model.safetensors"
    mirror.damaged.add(weights)
    told = run(mirror, prepare, status=1)
    assert f"google/siglip-so400m-patch14-384/{weights}: what came is damaged, and was removed" in told.stderr
    mirror.damaged.clear()
    told = run(mirror, prepare)
    assert re.search(r"warning: 1 of 4 conversations .* have a problem, such as .*3\.png: no such image", told.stderr)
    assert str(tmp_path / "mine.json") in (root / "finetune.py").read_text()
    older = run(mirror, f"{prepare} --llm vicuna_7b")
    assert re.search(r"vicuna-7b-v1\.5: there", older.stdout) and "missing" not in older.stdout
    kept = root / "parts" / "Qwen2-7B-Instruct" / weights
    os.truncate(kept, 100)
    (kept.parent / f".{weights}.digest").unlink()
    assert f"{kept}: is not the file that Qwen/Qwen2-7B-Instruct has" in run(mirror, prepare, status=1).stderr
    wrong = run(mirror, f"python launch/prepare.py --stage finetune --root {root} --llm qwen2_7", status=1)
    assert "--llm=qwen2_7: unknown (did you mean 'qwen2_7b'?)" in wrong.stderr
