"""Runs that train the denoiser alone on images without text: data, training, reports and continuing."""

import dataclasses
import io
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.features import image_feature

from ross_jax.config import ConfigError, UserError
from ross_jax.data.images import decode, preprocess
from ross_jax.data.packing import PackingConfig
from ross_jax.data.pipeline import DataConfig
from ross_jax.data.sources import SourceConfig
from ross_jax.evaluation.reconstruction import make_callbacks, read_images
from ross_jax.inference.model import load
from ross_jax.inference.reconstruct import visual_outputs
from ross_jax.objectives.objective import Sampling
from ross_jax.objectives.reconstruction import ReconstructionConfig
from ross_jax.sharding import MeshConfig
from ross_jax.training.loop import LoopConfig, check
from ross_jax.training.optimizer import OptimizerConfig
from ross_jax.training.recipe import EvaluationConfig, RunConfig, TextConfig
from ross_jax.training.run import Run
from ross_jax.training.state import FreezeConfig
from ross_jax.training.step import StepConfig
from ross_jax.tree import flatten, merge
from tiny import RANDOM, STAGE2
from tiny_model import SIZED, write_model

CLASSES = ("n01440764", "n01443537")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A model, and images in ImageNet's layout: 10 to train on, 4 held out."""
    folder = tmp_path_factory.mktemp("data")
    write_model(folder / "model")
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 4)):
        for i in range(count):
            path = folder / split / CLASSES[i % 2] / f"{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path, "JPEG")
    return folder


def make_config(data: Path, **changes) -> RunConfig:
    config = RunConfig(
        init_random=RANDOM,
        model=SIZED,
        init=(str(data / "model"),),
        text=TextConfig("qwen_2", str(data / "model" / "files" / "language"), weight=0.0),
        image_mode="square",
        data=DataConfig(
            sources=(SourceConfig(str(data / "train"), "images"),),
            packing=PackingConfig(length=256, images=1, layout="pad"),
            batch=4,
            epochs=2,
        ),
        freeze=FreezeConfig((r"denoiser/.*",), dtype="float32", autoencoder_dtype="float32"),
        optimizer=OptimizerConfig(1e-3),
        step=StepConfig(dtype="float32", remat="none"),
        mesh=MeshConfig(2, 1, -1),
        loop=LoopConfig(log=2, save=2, evaluate=4),
        evaluation=EvaluationConfig(
            (SourceConfig(str(data / "val"), "images"),), rows=3, shown=2, sampling=Sampling("dpm", 3)
        ),
    )
    return dataclasses.replace(config, **changes)


def train(config: RunConfig, folder: Path, **arguments) -> Run:
    run = Run(config, folder)
    run.train(make_callbacks(config, run.mesh), **arguments)
    return run


def tree(run: Run) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flatten(merge(run.state.params, run.state.frozen)).items()}


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An uninterrupted run, its directory, and its parameters before the first step."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    before = tree(Run(make_config(data), folder))
    (folder / "metrics.jsonl").write_text('{"step": 0, "evaluation/psnr": 1.0}\n')  # left by an interrupted start
    return train(make_config(data), folder), folder, before


def test_only_the_denoiser_moves(whole):
    run, _, before = whole
    assert run.step == run.steps == 6
    moved = {path for path, leaf in tree(run).items() if not np.array_equal(leaf, before[path])}
    assert moved == {path for path in before if path.startswith("denoiser/")} - {"denoiser/position_embedding"}


def test_reports_evaluations_and_nothing_of_text(whole):
    _, folder, _ = whole
    found = lines(folder)
    evaluations = [line for line in found if "evaluation/psnr" in line]
    steps = [line for line in found if line not in evaluations]
    assert [line["step"] for line in evaluations] == [0, 4, 6]
    assert [line["step"] for line in steps] == [2, 4, 6]
    assert not any("text_loss" in line or "supervised_tokens" in line for line in steps)
    assert all(line["loss"] == line["reconstruction_loss"] for line in steps)
    ceilings = {line["evaluation/psnr_autoencoder"] for line in evaluations}
    assert len(ceilings) == 1 and all(np.isfinite(line["evaluation/psnr"]) for line in evaluations)
    assert len({line["evaluation/latent_error"] for line in evaluations}) == 3


@pytest.mark.slow
def test_continues_bit_for_bit(data, whole, tmp_path):
    run, folder, _ = whole
    cut = train(make_config(data), tmp_path, stop_at=lambda step: step == 3)
    assert cut.step == 3
    expected = tree(run)
    for path, leaf in tree(train(make_config(data), tmp_path)).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
    evaluations = [[line for line in lines(at) if "evaluation/psnr" in line] for at in (tmp_path, folder)]
    assert evaluations[0] == evaluations[1]


def test_training_sees_what_inference_sees(data, whole):
    """Visual outputs of a batch's images equal those of `Model.visual_outputs`."""
    run, folder, _ = whole
    model = load(folder)
    (batch, *_) = run.data.batches()
    assert len(batch["tokens"]) == 4 and (batch["targets"] == -100).all()
    prompts = {tuple(row[row > 0]) for row in batch["tokens"]}
    assert len(prompts) == 1  # neither class nor file name
    ends = (batch["segments"] > 0).sum(axis=1)
    np.testing.assert_array_equal(ends, batch["image_start"][:, 0] + SIZED.vision.num_tokens)  # the image ends the row
    found = jax.jit(lambda params, batch: visual_outputs(SIZED, params, batch))(
        model.params, jax.tree.map(jnp.asarray, batch)
    )
    expected = model.visual_outputs(list(batch["images"][:, 0]))
    np.testing.assert_allclose(found[:, 0], expected, atol=2e-5)
    names = sorted((data / "train").rglob("*.JPEG"))
    pixels = {preprocess(decode(name.read_bytes(), ""), run.config.images).tobytes() for name in names}
    assert {image.tobytes() for image in batch["images"][:, 0]} <= pixels


def test_conversations_are_left_out(data, whole, tmp_path):
    """The images of a LLaVA file give the batches of an image folder; conversations are ignored."""
    run, *_ = whole
    names = sorted(str(path.relative_to(data / "train")) for path in (data / "train").rglob("*.JPEG"))
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A tench."}]
    (tmp_path / "data.json").write_text(json.dumps([{"image": name, "conversations": turns} for name in names]))
    source = SourceConfig(str(tmp_path / "data.json"), images=(str(data / "train"),))
    config = make_config(data)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=(source,)))
    for expected, found in zip(run.data.batches(), Run(config, tmp_path / "run").data.batches(), strict=True):
        for name, rows in expected.items():
            np.testing.assert_array_equal(found[name], rows, err_msg=name)


@pytest.mark.slow
def test_mock_imagenet(data, tmp_path, monkeypatch):
    """A run trains on TFDS's mock ImageNet, whose images Pillow encodes instead of TensorFlow."""

    def encode(self, pixels: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, self.encoding_format)
        return buffer.getvalue()

    monkeypatch.setattr(image_feature._ImageEncoder, "_encode_image", encode)
    train_split, heldout = (SourceConfig("imagenet2012", "tfds", split=split) for split in ("train", "validation"))
    config = make_config(data, evaluation=EvaluationConfig((heldout,), count=3, sampling=Sampling("dpm", 3)))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=(train_split,), epochs=1))
    with tfds.testing.mock_data(num_examples=8):
        run = train(config, tmp_path)
    assert run.step == run.steps == 2
    found = lines(tmp_path)
    assert [line["step"] for line in found if "evaluation/psnr" in line] == [0, 2]
    assert {line["images"] for line in found if "images" in line} == {4.0}


@pytest.mark.slow
def test_nothing_supervised_still_stops_a_run_with_a_text_loss(data, tmp_path):
    config = make_config(data, freeze=STAGE2, loop=LoopConfig(log=1))
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, weight=1.0))
    with pytest.raises(UserError, match="step 1: the batch has no supervised token"):
        Run(config, tmp_path).train()


def test_a_step_without_images_stops_a_run_without_text_loss():
    good = {"reconstruction_loss": 1.0, "gradient_norm": 1.0, "images": 3.0}
    check([good], 6)
    with pytest.raises(UserError, match="step 7: the batch has no image"):
        check([good, {**good, "images": 0.0}], 6)
    with pytest.raises(UserError, match="step 6: reconstruction_loss is not finite"):
        check([{**good, "reconstruction_loss": float("nan")}], 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reconstruction": ReconstructionConfig("none")}, "there is no loss"),
        ({"evaluation": EvaluationConfig()}, "evaluation.sources is empty"),
        ({"model": dataclasses.replace(SIZED, denoiser=None)}, "denoiser"),
    ],
)
def test_configs_that_make_no_run(data, changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(data, **changes)
    with pytest.raises(ValueError, match="cannot be negative"):
        TextConfig("v1", "tokenizer", weight=-1.0)


def test_evaluation_needs_images(data, tmp_path):
    (tmp_path / "text.json").write_text(json.dumps([{"conversations": [{"from": "human", "value": "Hello"}]}]))
    config = make_config(data, evaluation=EvaluationConfig((SourceConfig(str(tmp_path / "text.json")),)))
    with pytest.raises(ConfigError, match="none of the samples that were looked at has an image"):
        read_images(config)
