"""Runs on a few images: reports, checkpoints, and continuing after an interruption."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

from configs import ross
from convert.foreign import TINY, component, import_model
from older import without_digests
from ross_jax import checkpoints, run_checkpoints
from ross_jax.config import ConfigError, UserError
from ross_jax.convert.exporting import export, read_config
from ross_jax.convert.importing import load, plan_import, write
from ross_jax.convert.tensors import open_tensors
from ross_jax.data.packing import PackingConfig
from ross_jax.data.pipeline import DataConfig
from ross_jax.data.sources import SourceConfig
from ross_jax.inference.model import load as load_model
from ross_jax.models.ross import abstract_params
from ross_jax.models.tiny_autoencoder import TinyAutoencoderConfig
from ross_jax.sharding import MeshConfig
from ross_jax.training.callback import Callback
from ross_jax.training.loop import LoopConfig, check
from ross_jax.training.optimizer import OptimizerConfig
from ross_jax.training.recipe import RunConfig, TextConfig
from ross_jax.training.run import Run
from ross_jax.training.state import FreezeConfig
from ross_jax.training.step import StepConfig
from ross_jax.tree import flatten, merge
from tiny import CONFIG, RANDOM, STAGE2
from tokenizer_fixtures import byte_level_tokenizer

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 records about 6 images, and a tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(folder / "images" / f"{i}.png")
    records = [
        {
            "id": f"sample {i}",
            **({"image": f"{i % 6}.png"} if i % 4 else {}),
            "conversations": [
                {"from": "human", "value": ("<image>\n" if i % 4 else "") + "What is it?"},
                {"from": "gpt", "value": "ab"[i % 2] * (1 + i % 5)},
            ],
        }
        for i in range(24)
    ]
    (folder / "data.json").write_text(json.dumps(records))
    byte_level_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def make_config(data, mesh: MeshConfig = MeshConfig(1, 2, 4), **changes) -> RunConfig:  # noqa: B008
    model = dataclasses.replace(CONFIG, language=dataclasses.replace(CONFIG.language, vocab_size=320))
    config = RunConfig(
        init_random=RANDOM,
        model=model,
        text=TextConfig("qwen_2", str(data / "tokenizer")),
        data=DataConfig(
            sources=(SourceConfig(str(data / "data.json"), images=(str(data / "images"),)),),
            packing=PackingConfig(length=256, images=2),
            batch=8,
            epochs=2,
        ),
        freeze=STAGE2,
        optimizer=OptimizerConfig(1e-3, ((r"denoiser/.*", 1e-4),)),
        step=StepConfig(dtype="float32", remat="none", text_chunk=128),
        mesh=mesh,
        loop=LoopConfig(log=1, save=2, keep=2, images=2),
    )
    return dataclasses.replace(config, **changes)


def parameters(run: Run) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flatten(run.state.params).items()}


class Drawer(Callback):
    """Draws an image whose height is the step, and checks the state."""

    def images(self, step, state, batch):
        assert int(state.step) == step and "images" in batch
        return np.full((step, 6, 3), step, np.uint8)


class Dictated:
    """A training step that changes nothing and takes its reconstruction losses from a list."""

    def __init__(self, losses: list[float]):
        self._losses = iter(losses)

    def __call__(self, state, batch):
        names = ("loss", "text_loss", "gradient_norm", "images", "tokens", "supervised_tokens")
        metrics = {name: jnp.ones(()) for name in names} | {"reconstruction_loss": jnp.float32(next(self._losses))}
        return state._replace(step=state.step + 1), metrics


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Directory, parameters and number of steps of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run = Run(make_config(data), folder)
    assert run.train([Drawer()]) == run.steps > 4
    return folder, parameters(run), run.steps


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_reports_every_step(whole):
    folder, _, steps = whole
    found = lines(folder)
    assert [line["step"] for line in found] == list(range(1, steps + 1))
    names = {"text_loss", "reconstruction_loss", "gradient_norm", "supervised_tokens", "images_per_second"}
    assert names | {"tokens_per_second", "input_wait", "memory_gb", "learning_rate/rest"} <= set(found[0])
    assert found[-1]["text_loss"] < found[0]["text_loss"]
    assert list((folder / "tensorboard").iterdir())


def test_a_finished_run_is_a_model(whole):
    folder, params, steps = whole
    config = read_config(folder)
    restored = checkpoints.restore_model(folder, abstract_params(config))
    for path, leaf in params.items():
        np.testing.assert_array_equal(flatten(restored)[path], leaf)
    assert set(restored) == {"vision", "projector", "language", "denoiser", "autoencoder"}
    assert sorted(int(path.name) for path in (folder / "steps").iterdir() if path.name.isdigit())[-1] == steps
    assert (folder / "files" / "language" / "tokenizer.json").is_file()


def test_continues_bit_for_bit(data, whole, tmp_path):
    """A run that stopped after three steps, with half a line of metrics, ends bit for bit like an uninterrupted run."""
    _, expected, steps = whole
    folder = tmp_path / "run"
    assert Run(make_config(data), folder).train(stop_at=lambda step: step == 3) == 3
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "text_lo')
    run = Run(make_config(data), folder)
    assert run.step == 3
    assert run.train() == steps
    for path, leaf in parameters(run).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
    assert [line["step"] for line in lines(folder)] == list(range(1, steps + 1))
    assert Run(make_config(data), folder).train() == steps  # a finished run does nothing


@pytest.mark.slow
def test_continues_on_another_mesh(data, whole, tmp_path):
    _, expected, steps = whole
    folder = tmp_path / "run"
    Run(make_config(data), folder).train(stop_at=lambda step: step == 2)
    run = Run(make_config(data, MeshConfig(2, 1, 1) if jax.device_count() == 2 else MeshConfig(1, 1, -1)), folder)
    assert run.train() == steps
    for path, leaf in parameters(run).items():
        np.testing.assert_allclose(leaf, expected[path], atol=2e-4, err_msg=path)


def test_another_config_is_refused_with_what_differs(data, whole):
    folder, *_ = whole
    with pytest.raises(ConfigError, match=r"optimizer.learning_rate: 0.001 there, 0.5 now"):
        Run(make_config(data, optimizer=OptimizerConfig(0.5, ((r"denoiser/.*", 1e-4),))), folder)


def test_another_tokenizer_is_refused(data, whole, tmp_path):
    """To continue the run, and to ask its model. The tokenizer of the run has the bytes that it was given."""
    folder = shutil.copytree(whole[0], tmp_path / "run")
    model = load_model(folder, ("language",))
    given, used = data / "tokenizer", folder / "files" / "language"
    assert {p.name: p.read_bytes() for p in used.iterdir()} == {p.name: p.read_bytes() for p in given.iterdir()}
    assert model.tokenizer("a b").input_ids == byte_level_tokenizer()("a b").input_ids
    changed = json.loads((used / "tokenizer.json").read_text())
    changed["pre_tokenizer"]["add_prefix_space"] = True
    (used / "tokenizer.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=rf"^{used}/tokenizer\.json: damaged"):
        Run(make_config(data), folder)
    without_digests(folder)
    with pytest.raises(UserError, match=f"^tokenizer {used}: this is not the tokenizer .*: the ids of a text"):
        assert load_model(folder, ("language",)).tokenizer
    manifest = json.loads((folder / checkpoints.MANIFEST).read_text())
    manifest["tokenizer"]["vocabulary"] = "another"
    (folder / checkpoints.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"^config.text.tokenizer {given}: this is not .*: its vocabulary.; put"):
        Run(make_config(data), folder)


def test_continues_a_run_older_than_a_field(data, whole, tmp_path):
    """A run whose record lacks `model.autoencoder.kind` continues; another difference is refused."""
    file = without_digests(shutil.copytree(whole[0], tmp_path / "run")) / "run.json"
    recorded = json.loads(file.read_text())
    assert recorded["config"]["model"]["autoencoder"].pop("kind") == "kl"
    file.write_text(json.dumps(recorded))
    assert Run(make_config(data), tmp_path / "run").step == whole[2]
    recorded["config"]["model"]["autoencoder"]["layers_per_block"] = 2
    file.write_text(json.dumps(recorded))
    with pytest.raises(ConfigError, match=r"model.autoencoder.layers_per_block: 2 there, 1 now"):
        Run(make_config(data), tmp_path / "run")


def flip(path: Path) -> None:
    """Flips bits all over a file. Some bytes of Orbax's files belong to nothing."""
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 40, len(content), len(content) // 20):
        content[place] ^= 4
    path.write_bytes(content)


NAMED = r"(array \S+ is damaged|d/\S+: damaged)"
"""What is said of a file with values: chunks have a checksum each, and Orbax's merged file has a digest."""


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("d/*")), key=lambda path: path.stat().st_size)


def test_falls_back_to_a_sound_step(data, whole, tmp_path, caplog):
    """A damaged step is named and marked, and the run continues from the one before, to the same parameters."""
    folder, params, steps = tmp_path / "run", *whole[1:]
    shutil.copytree(whole[0], folder)
    config = make_config(data)
    newest, before = steps, steps - config.loop.save
    assert sorted(path.name for path in (folder / "steps").iterdir()) == sorted([str(before), str(newest)])
    flip(largest(folder / "steps" / str(newest) / "params"))
    run = Run(config, folder)
    assert run.step == before
    said = rf"step {newest} is damaged.* {before}: .*/steps/{newest}/params.*{NAMED}"
    assert re.search(said, caplog.text)
    mark = folder / "steps" / str(newest) / "DAMAGED"
    assert "damaged" in mark.read_text()
    assert checkpoints.parameter_folders(folder)[-1] == folder / "steps" / str(before) / "params"
    assert run.train() == newest and not mark.exists()
    for path, leaf in parameters(Run(config, folder)).items():
        np.testing.assert_array_equal(leaf, params[path], err_msg=path)


def test_no_sound_step(data, whole, tmp_path):
    """All that is damaged is named, nothing is marked. Neither is a model with damaged parameters asked."""
    folder = shutil.copytree(whole[0], tmp_path / "run")
    for step in (folder / "steps").iterdir():
        (step / "optimizer" / "_METADATA").unlink()
    with pytest.raises(UserError, match=r"no step can be read:\n.*_METADATA.*\n.*_METADATA.*\nRestore one of them"):
        Run(make_config(data), folder)
    assert not list(folder.rglob("DAMAGED"))
    flip(largest(folder / "frozen"))
    with pytest.raises(UserError, match=rf"/frozen.*{NAMED}"):
        Run(make_config(data), folder)
    with pytest.raises(UserError, match=rf"/frozen.*{NAMED}"):
        load_model(folder)


@pytest.mark.parametrize("damage", ["removed", "truncated", "flipped", "valid JSON"])
def test_a_run_without_its_record(data, whole, tmp_path, damage):
    """Is refused, and adopted on request, with the config that is given then."""
    folder, config = shutil.copytree(whole[0], tmp_path / "run"), make_config(data)
    path = folder / "run.json"
    record = json.loads(path.read_text())
    damages = {"removed": path.unlink, "truncated": lambda: os.truncate(path, 100), "flipped": lambda: flip(path)}
    damages["valid JSON"] = lambda: path.write_text(json.dumps(record | {"rows_per_step": record["rows_per_step"] * 2}))
    damages[damage]()
    with pytest.raises(UserError, match=r"run\.json.*--adopt rebuild it"):
        Run(config, folder)
    assert Run(config, folder, adopt=True).step == whole[2]
    assert json.loads(path.read_text()) == record
    (folder / "ross_jax.json").unlink()
    with pytest.raises(UserError, match=r"no ross_jax\.json in it"):
        Run(config, folder, adopt=True)


def test_a_directory_that_does_not_give_back(data, tmp_path, monkeypatch):
    """A run that could not be restored is refused before its first step."""
    monkeypatch.setattr(run_checkpoints, "restore", lambda folder, tree: {"array": np.zeros(1000)})
    with pytest.raises(UserError, match="what was written there cannot be read back"):
        Run(make_config(data), tmp_path / "run")


def test_rows_that_the_devices_do_not_divide(moved):
    config, folder = moved
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"rows_per_step": 7}))
    with pytest.raises(UserError, match=r"the run has 7 rows per step, which 2 .* does not divide"):
        Run(config, folder)


@pytest.fixture
def moved(data, whole, tmp_path) -> tuple[RunConfig, Path]:
    """Config and directory of a copy of the run, and of its data."""
    without_digests(shutil.copytree(whole[0], tmp_path / "run"))
    shutil.copytree(data, tmp_path / "data")
    text = (tmp_path / "run" / "run.json").read_text()
    (tmp_path / "run" / "run.json").write_text(text.replace(str(data), str(tmp_path / "data")))
    return make_config(tmp_path / "data"), tmp_path / "run"


def rewrite(config: RunConfig, old: str, new: str) -> None:
    path = Path(config.data.sources[0].path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    os.utime(path, ns=(0, 0))  # another time, however coarse the file system's clock is


def test_changed_data_is_refused_until_it_is_accepted(moved):
    """Changed texts of equal or other length are refused; accepted data is the run's own from then on."""
    config, folder = moved
    for old, new, change in (
        ('"aa"', '"bb"', "another text in 24 records as before"),
        ('"bb"', '"bbbb"', r"\d+ bytes before, \d+ now"),
    ):
        before = (folder / "run.json").read_text()
        rewrite(config, old, new)
        with pytest.raises(UserError, match=rf"data has changed.*\n  .*data\.json: {change}\n.*--accept_changed_data"):
            Run(config, folder)
        assert (folder / "run.json").read_text() == before
        Run(config, folder, accept_changed_data=True)
    Run(config, folder)


def test_text_is_hashed_again_only_where_size_or_time_differ(moved, monkeypatch):
    config, folder = moved
    os.utime(config.data.sources[0].path, ns=(0, 0))
    Run(config, folder)  # another time and the same text
    hashing = SimpleNamespace(sha256=lambda: pytest.fail("hashed again"))
    monkeypatch.setattr("ross_jax.data.records.hashlib", hashing)
    Run(config, folder)


def test_a_run_without_fingerprints_continues_and_gets_them(moved):
    """Runs of earlier versions know the lengths of their data only."""
    config, folder = moved
    record = json.loads((folder / "run.json").read_text())
    sources = record.pop("sources")
    (folder / "run.json").write_text(json.dumps(record))
    rewrite(config, '"aa"', '"seven tokens"')
    with pytest.raises(UserError, match=r"was trained on other data.*--accept_changed_data"):
        Run(config, folder)
    rewrite(config, '"seven tokens"', '"aa"')
    Run(config, folder)
    (found,) = json.loads((folder / "run.json").read_text())["sources"]
    assert found == sources[0] | {"path": found["path"], "time": 0}


def test_starts_from_a_model(data, whole, tmp_path):
    """A run starts with the parameters that another run left, unless its model differs."""
    folder, params, _ = whole
    run = Run(make_config(data, init=(str(folder),)), tmp_path / "second")
    for path, leaf in parameters(run).items():
        np.testing.assert_array_equal(leaf, params[path], err_msg=path)
    smaller = dataclasses.replace(run.config.model.denoiser, depth=1)
    model = dataclasses.replace(run.config.model, denoiser=smaller)
    with pytest.raises(ConfigError, match=r"its denoiser differs: depth: 2 there, 1 in config.model"):
        Run(make_config(data, init=(str(folder),), model=model), tmp_path / "third")
    model = dataclasses.replace(run.config.model, image_resample=2)
    with pytest.raises(ConfigError, match=r"its vision differs: image_resample: 3 there, 2 in config.model"):
        Run(make_config(data, init=(str(folder),), model=model), tmp_path / "third")
    tiny = TinyAutoencoderConfig(8, 8, (1, 1, 1), (1, 1, 1), 4)
    model = dataclasses.replace(run.config.model, autoencoder=tiny)
    with pytest.raises(ConfigError, match=r"its autoencoder differs: .*; kind: kl there, tiny in config.model"):
        Run(make_config(data, init=(str(folder),), model=model), tmp_path / "fourth")


@pytest.mark.slow
def test_trains_on_the_latents_of_a_tiny_autoencoder(data, tmp_path):
    """Training keeps the imported tiny autoencoder bit for bit; other components start random."""
    tiny = component(tmp_path / "foreign", TINY)
    model = import_model(tmp_path / "model", tiny)
    sizes = dataclasses.replace(make_config(data).model, autoencoder=read_config(model).autoencoder)
    run = Run(make_config(data, model=sizes, init=(str(model),)), tmp_path / "run")
    run.train(stop_at=lambda step: step == 2)
    losses = [line["reconstruction_loss"] for line in lines(tmp_path / "run")]
    assert len(losses) == 2 and all(0.1 < loss < 10 for loss in losses)
    plan = plan_import([str(tiny)])
    for path, leaf in flatten(load(plan)).items():
        np.testing.assert_array_equal(flatten(run.state.frozen)[path], leaf, err_msg=path)
    plan.close()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text_loss": float("nan")}, "step 7: text_loss is not finite"),
        ({"gradient_norm": float("inf")}, "step 7: gradient_norm is not finite"),
        ({"supervised_tokens": 0}, "step 7: the batch has no supervised token"),
    ],
)
def test_bad_steps_stop_the_run(values, message):
    good = {"text_loss": 1.0, "reconstruction_loss": 1.0, "gradient_norm": 1.0, "supervised_tokens": 5}
    check([good], 6)
    with pytest.raises(UserError, match=message):
        check([good, {**good, **values}], 6)


def test_no_checkpoint_of_a_bad_step(data, tmp_path):
    """A run stops at a loss that is not finite, and keeps the checkpoint before that step."""
    run = Run(make_config(data), tmp_path / "run")
    run.train_step = Dictated([1.0, 1.0, 1.0, float("nan"), 1.0])
    with pytest.raises(UserError, match="step 4: reconstruction_loss is not finite"):
        run.train()
    assert checkpoints.latest_step(tmp_path / "run") == 2 and len(lines(tmp_path / "run")) == 3


@pytest.mark.slow
def test_a_run_exports_what_it_trained(data, tmp_path):
    """After import, training and export, only trained tensors differ from the reference's checkpoint."""
    golden = Path(__file__).parents[1] / "golden" / "siglip_qwen2" / "checkpoint"
    plan = plan_import([str(golden)])
    write(plan, tmp_path / "model")
    plan.close()
    freeze = FreezeConfig((r"projector/.*",), dtype="float32", autoencoder_dtype="float32")
    config = make_config(data, model=plan.config, freeze=freeze, init=(str(tmp_path / "model"),))
    run = Run(config, tmp_path / "run")
    run.train(stop_at=lambda step: step == 2)  # the first step's learning rate is zero
    export(tmp_path / "run", tmp_path / "back", "ross")
    with open_tensors(golden) as before, open_tensors(tmp_path / "back") as after:
        assert set(before) == set(after)
        moved = {key for key in before if not np.array_equal(before.read(key), after.read(key))}
    assert moved == {f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (golden / "config.json").read_text()
    )


@pytest.mark.slow
def test_the_second_stage_begins_where_the_first_ended(data, tmp_path):
    """Stage 2 starts with all parameters of stage 1, changes what it trains, and exports everything."""
    golden = Path(__file__).parents[1] / "golden" / "siglip_qwen2" / "checkpoint"
    plan = plan_import([str(golden)])
    write(plan, tmp_path / "model")
    plan.close()
    stage1 = FreezeConfig((r"projector/.*", r"denoiser/.*"), dtype="float32", autoencoder_dtype="float32")
    config = make_config(data, model=plan.config, freeze=stage1, init=(str(tmp_path / "model"),))
    first = Run(config, tmp_path / "pretrain")
    first.train(stop_at=lambda step: step == 2)  # the first step's learning rate is zero
    ended = whole_tree(first)
    config = dataclasses.replace(config, freeze=STAGE2, init=(str(tmp_path / "model"), str(tmp_path / "pretrain")))
    second = Run(config, tmp_path / "finetune")
    begun = whole_tree(second)
    assert set(begun) == set(ended)
    for path, leaf in begun.items():
        np.testing.assert_array_equal(leaf, ended[path], err_msg=path)
    assert second.step == 0 and set(second.state.params) == {"language", "projector", "denoiser"}
    second.train(stop_at=lambda step: step == 2)
    export = [sys.executable, str(REPOSITORY / "launch" / "convert.py"), "export", "--format", "ross"]
    done = subprocess.run(
        [*export, "--from", str(tmp_path / "finetune"), "--output", str(tmp_path / "back")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    plan = plan_import([str(tmp_path / "back")], golden.parent / "vision_tower", golden.parent / "vae")
    write(plan, tmp_path / "again")
    plan.close()
    restored = flatten(checkpoints.restore_model(tmp_path / "again", abstract_params(plan.config)))
    for path, leaf in whole_tree(second).items():
        np.testing.assert_array_equal(restored[path], leaf, err_msg=path)
        learns = second.config.freeze.trains(path)
        moved = not np.array_equal(leaf, begun[path])
        assert learns or not moved, path
    assert any(not np.array_equal(restored[path], ended[path]) for path in ended if path.startswith("language/"))


@pytest.mark.slow
def test_a_part_of_the_recipe_unfreezes_the_encoder(data, tmp_path):
    """`vision=trained` trains the encoder in float32; `frozen`, the default, does not change it."""
    for part, dtype in (("vision=frozen", "bfloat16"), ("vision=trained", "float32")):
        freeze = FreezeConfig(tuple(ross.get_config(part).freeze.trainable))
        run = Run(make_config(data, freeze=freeze), tmp_path / part)
        before = vision(run)
        assert {str(leaf.dtype) for leaf in before.values()} == {dtype}
        run.train(stop_at=lambda step: step == 2)
        moved = {path for path, leaf in vision(run).items() if not np.array_equal(leaf, before[path])}
        assert moved == (set(before) if part == "vision=trained" else set())


def vision(run: Run) -> dict[str, np.ndarray]:
    return {path: leaf for path, leaf in whole_tree(run).items() if path.startswith("vision/")}


def whole_tree(run: Run) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flatten(merge(run.state.params, run.state.frozen)).items()}


def test_a_reconstruction_loss_outside_its_range_is_said(data, tmp_path, capsys):
    """The run warns once, with the mean of ten losses after the warmup, and continues."""
    config = make_config(data, loop=LoopConfig(log=1, save=100, expected_reconstruction=(0.1, 0.3)))
    run = Run(dataclasses.replace(config, data=dataclasses.replace(config.data, epochs=5)), tmp_path / "run")
    run.train_step = Dictated([9.0, *np.linspace(0.5, 1.4, 10), *[1.0] * 100])
    assert run.train() == run.steps >= 12
    said = re.findall(r"^warning: step 11: the reconstruction loss is (\S+) on", capsys.readouterr().err, re.MULTILINE)
    assert said == ["0.950"]


def board_images(folder: Path) -> list[tuple[int, str, tuple[int, int]]]:
    """(step, tag, (height, width)) of each image in a run's TensorBoard files."""
    found = []
    for file in sorted((folder / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:  # each record: length, checksum, event, checksum
            length = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                if value.HasField("image"):
                    found.append((event.step, value.tag, (value.image.height, value.image.width)))
    return found


def test_images_go_to_tensorboard(whole):
    folder, _, steps = whole
    assert board_images(folder) == [(step, "reconstruction", (step, 6)) for step in range(2, steps + 1, 2)]
