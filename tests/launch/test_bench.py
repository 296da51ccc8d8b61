"""`launch/bench.py`: its figures and errors. Times are not tested."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from launcher import load_script
from ross_jax.bench import generate
from ross_jax.bench.data import write_synthetic
from ross_jax.data.images import ImageConfig, preprocess
from ross_jax.models.language import LanguageConfig

bench = load_script("bench")

SMALL = ["--samples", "40", "--batch", "8", "--image-size", "16", "--image-tokens", "4", "--length", "1300"]


@pytest.mark.parametrize("layout", ["pack", "pad"])
def test_synthetic_data(tmp_path, capsys, layout):
    assert bench.main(["data", *SMALL, "--layout", layout, "--json", str(tmp_path / "out.json")]) == 0
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["conversations"] == 40 and figures["dropped"] == 0
    assert figures["steps_read"] == figures["steps"] - 1  # without the first step, which starts the threads
    assert figures["samples_per_s"] > 0 and 0 < figures["efficiency"] <= 1
    assert "samples_per_s" in capsys.readouterr().out


def test_given_data_and_errors(tmp_path, capsys):
    data = write_synthetic(tmp_path, 30)
    assert bench.main(["data", *SMALL, "--data", data, "--images", str(tmp_path), "--steps", "1"]) == 0
    capsys.readouterr()
    assert bench.main(["data", "--data", data, "--images", "/nowhere"]) == 1
    assert "error: image folder '/nowhere' does not exist" in capsys.readouterr().err
    assert bench.main(["data", *SMALL, "--batch", "40"]) == 1
    assert "lower --batch" in capsys.readouterr().err
    assert bench.main(["data", *SMALL, "--lenght", "3"]) == 1
    assert "unexpected arguments ['--lenght', '3']" in capsys.readouterr().err


SIZES = {
    "vision.image_size": 28,
    "vision.hidden_size": 32,
    "vision.intermediate_size": 48,
    "vision.num_heads": 2,
    "vision.num_layers": 2,
    "projector.in_size": 32,
    "projector.out_size": 64,
    "language.vocab_size": 96,
    "language.hidden_size": 64,
    "language.intermediate_size": 80,
    "language.num_layers": 2,
    "language.num_heads": 4,
    "language.num_kv_heads": 2,
    "language.head_dim": 16,
    "denoiser.condition_size": 64,
    "denoiser.grid": 2,
    "denoiser.width": 32,
    "denoiser.depth": 1,
    "denoiser.num_heads": 4,
    "autoencoder.channels": "(8, 8, 8, 8)",
    "autoencoder.norm_groups": 4,
}
TINY = [f"--config.model.{name}={value}" for name, value in SIZES.items()]
TINY += ["--config.data.packing.length=256", "--repeats", "1"]


def figures(tmp_path, *arguments: str) -> dict:
    assert bench.main(["step", *TINY, "--config.mesh.fsdp=8", *arguments, "--json", str(tmp_path / "out.json")]) == 0
    return json.loads((tmp_path / "out.json").read_text())


@pytest.mark.slow
def test_step(tmp_path, capsys):
    """The step runs on all devices, which are eight virtual ones here."""
    found = figures(tmp_path, "--rows", "16")
    assert found["rows"] == 16 and found["devices"] == "8 x cpu"
    assert 0.5 < found["filled"] <= 1 and found["tokens_per_s"] == pytest.approx(
        found["filled"] * 16 * 256 / found["step_s"]
    )
    assert "tokens_per_s" in capsys.readouterr().out


@pytest.mark.slow
def test_padded_rows_hold_less(tmp_path):
    found = figures(tmp_path, "--compare", "padding")
    assert found["padded_filled"] < found["filled"]
    rates = found["filled"] / found["padded_filled"] * found["padded_step_s"] / found["step_s"]
    assert found["packed_over_padded"] == pytest.approx(rates)


def test_recipes_that_cannot_be_measured(tmp_path, capsys):
    def error(*arguments: str) -> str:
        assert bench.main(["step", *arguments]) == 1
        return capsys.readouterr().err

    assert "Unknown command line flag 'lenght'" in error("--lenght=3")
    assert "--repeats 0: must be at least 1" in error("--repeats", "0")
    assert "--rows 0: must be at least 1" in error("--rows", "0")
    assert "--rows 12: must be a multiple of 8" in error("--rows", "12", "--config.mesh.fsdp=8")
    assert "nowhere.py" in error(f"--config={tmp_path}/nowhere.py")
    assert "does not divide 8 devices" in error("--config.mesh.fsdp=3")


@pytest.mark.slow
def test_without_torch_jax_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = figures(tmp_path, "--compare", "torch")
    assert "not installed" in found["torch"] and found["tokens_per_s"] > 0 and "torch_step_s" not in found


@pytest.mark.slow
def test_generation_equals_transformers(tmp_path, monkeypatch, capsys):
    """Both choose the same tokens, or the bench refuses to compare their times."""
    pytest.importorskip("torch")
    small = LanguageConfig(300, 32, 64, 2, 4, 2, 8, 1e4, 1e-6, qkv_bias=True)
    monkeypatch.setattr(generate, "LANGUAGE", small)
    monkeypatch.setattr(generate, "PROBE_BYTES", 2**20)
    command = ["generate", "--compare", "torch", "--batches", "1", "3", "--prompt", "9", "--new", "5"]
    assert bench.main([*command, "--repeats", "1", "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["batch_3_equal_tokens"] == found["queue_equal_tokens"] == 1
    assert found["queue_over_torch"] == pytest.approx(found["queue_torch_s"] / found["queue_s"])
    engine = generate.make_engine

    def broken(decoding, params):
        made = engine(decoding, params)
        return dataclasses.replace(made, params=jax.tree.map(lambda leaf: leaf[..., ::-1], made.params))

    monkeypatch.setattr(generate, "make_engine", broken)
    assert bench.main([*command, "--repeats", "1"]) == 1
    assert "they do not compute the same" in capsys.readouterr().err


def test_data_beside_torch(tmp_path):
    pytest.importorskip("torch")
    out = tmp_path / "out.json"
    small = ["--samples", "60", "--steps", "2", "--batch", "8", "--image-size", "16", "--image-tokens", "4"]
    assert bench.main(["data", *small, "--compare", "torch", "--workers", "1", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["images_per_s"] > 0 and found["torch_images_per_s"] > 0 and found["workers"] == 1
    assert 0 < found["decode_share"] < 1 and found["read_share"] + found["decode_share"] + found["resize_share"] < 1


@pytest.mark.parametrize(("mode", "shortest_edge"), [("pad", None), ("square", None), ("square", 12), ("crop", None)])
def test_torch_reads_the_same_pixels(mode, shortest_edge):
    pytest.importorskip("torch")
    from ross_jax.bench.data_peer import transform

    config = ImageConfig(10, mode=mode, shortest_edge=shortest_edge)
    for size in ((31, 20), (20, 31), (7, 7)):
        image = Image.effect_noise(size, 90).convert("RGB")
        np.testing.assert_array_equal(np.asarray(transform(image, config)), preprocess(image, config))
