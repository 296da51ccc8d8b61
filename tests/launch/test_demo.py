"""launch/demo.py on little data: an interrupted demo continues and writes its files."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launcher import REPOSITORY, environment
from ross_jax.demo.questions import ANSWERS
from ross_jax.inference.model import load

pytest.importorskip("skimage", reason="the `demo` extra is not installed")
pytest.importorskip("sklearn", reason="the `demo` extra is not installed")


def start(root: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, str(REPOSITORY / "launch" / "demo.py"), "--quick", "--root", str(root), *flags]
    return subprocess.Popen(
        command, env=environment(devices=2), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_interrupted_and_continued(tmp_path):
    root = tmp_path / "demo"
    process = start(root, "--baseline")
    for line in process.stderr:
        if "finetune: training" in line:
            process.send_signal(signal.SIGTERM)
            break
    process.communicate(timeout=600)
    assert process.returncode and not (root / "summary.json").exists()
    first = (root / "denoise/seed0/pretrain/metrics.jsonl").read_bytes()

    process = start(root, "--baseline", "--denoiser", "--lora")
    output, log = process.communicate(timeout=900)
    assert process.returncode == 0, log
    assert re.search(r"\n  language .* trained +<- ", log) and "ross_jax:" not in log, log
    assert (root / "denoise/seed0/pretrain/metrics.jsonl").read_bytes() == first  # stage 1 is not repeated
    summary = json.loads((root / "summary.json").read_text())
    for kind in ("denoise", "none", "denoise+lora"):
        answers = summary["scores"][kind]["0"]["answers"]
        assert [row["type"] for row in answers] == list(ANSWERS) and {row["count"] for row in answers} == {12}
        kind, _, stage = kind.partition("+")
        model = load(root / kind / "seed0" / (stage or "finetune"))
        assert model.template == "qwen_2"
    assert load(root / "denoise/seed0/finetune").params.keys() >= {"denoiser", "autoencoder"}
    scores = summary["scores"]["denoise"]["0"]["reconstruction"]
    assert 0 <= scores["nearest"] <= 1 and scores["psnr_autoencoder"] > scores["psnr_own"]
    assert summary["scores"]["none"]["0"]["reconstruction"] is None
    assert (
        "Ross^D" in output
        and "Ross^D, LoRA: mean accuracy" in output
        and "LLaVA" in output
        and "brighter_end" in output
    )
    assert set(summary["denoisers"]) == {"0"} and "seed 0, denoiser alone" in output
    assert summary["denoisers"]["0"]["psnr_autoencoder"] == scores["psnr_autoencoder"]
    for name in ("losses.png", "denoise/seed0/pictures.png", "denoise/seed0/denoiser.png", "denoise/seed0/lora.png"):
        assert str(root / name) in output
        assert np.asarray(Image.open(root / name)).std() > 10

    process = start(root)
    output, log = process.communicate(timeout=300)
    assert process.returncode == 0 and "steps are done" in log and "compiling" not in log, log
    again = json.loads((root / "summary.json").read_text())["scores"]
    assert again == {"denoise": summary["scores"]["denoise"]} and "LLaVA" not in output


def test_a_root_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    process = start(tmp_path / "file" / "demo")
    _, log = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "error: " in log and str(tmp_path / "file") in log and "Traceback" not in log
