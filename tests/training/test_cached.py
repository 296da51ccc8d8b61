"""A run that reads a cache has the losses of a run on pixels; a cache that does not fit the run is refused."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from ross_jax.config import ConfigError, UserError
from ross_jax.data.packing import PackingConfig
from ross_jax.data.pipeline import DataConfig
from ross_jax.data.precomputed import Precomputed
from ross_jax.data.sources import SourceConfig
from ross_jax.models.regressor import RegressorConfig
from ross_jax.objectives.reconstruction import ReconstructionConfig
from ross_jax.sharding import MeshConfig, batch_sharding, make_mesh
from ross_jax.training.cached import parameters_hash
from ross_jax.training.loop import LoopConfig
from ross_jax.training.optimizer import OptimizerConfig
from ross_jax.training.precompute import CacheConfig, precompute
from ross_jax.training.recipe import RunConfig, TextConfig
from ross_jax.training.run import Run, open_data
from ross_jax.training.state import FreezeConfig
from ross_jax.training.step import StepConfig
from tiny import CONFIG, RANDOM
from tokenizer_fixtures import byte_level_tokenizer

TRAINABLE = (r"language/.*", r"projector/.*", r"denoiser/.*", r"regressor/.*")
FREEZE = FreezeConfig(TRAINABLE, dtype="float32", autoencoder_dtype="float32")
MODEL = dataclasses.replace(CONFIG, language=dataclasses.replace(CONFIG.language, vocab_size=320))
TEACHER = dataclasses.replace(CONFIG.vision, hidden_size=48, intermediate_size=64, image_size=42)
WITH_TEACHER = dataclasses.replace(
    MODEL, denoiser=None, autoencoder=None, teacher=TEACHER, regressor=RegressorConfig("features", 64, 48, 32)
)
REGRESS = ReconstructionConfig("latent", distance="cosine")
BOTH = ("targets", "features")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 records and a tokenizer. Every third record has two of 6 images, every fourth none; one image is broken."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    names = [[] if i % 4 == 0 else [f"{i % 6}.png", f"{i % 5}.png"][: 1 + (i % 3 == 0)] for i in range(24)]
    names[7] = ["broken.png"]
    (folder / "broken.png").write_bytes(b"none")
    records = [
        {
            "id": f"sample {i}",
            **({"image": names[i]} if names[i] else {}),
            "conversations": [
                {"from": "human", "value": "<image>\n" * len(names[i]) + "What is it?"},
                {"from": "gpt", "value": "ab"[i % 2] * (1 + i % 5)},
            ],
        }
        for i in range(24)
    ]
    (folder / "data.json").write_text(json.dumps(records))
    byte_level_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def make_config(data: Path, **changes) -> RunConfig:
    config = RunConfig(
        init_random=RANDOM,
        model=MODEL,
        text=TextConfig("qwen_2", str(data / "tokenizer")),
        data=DataConfig(
            sources=(SourceConfig(str(data / "data.json"), images=(str(data),)),),
            packing=PackingConfig(length=256, images=3),
            batch=8,
            epochs=1,
        ),
        freeze=FREEZE,
        optimizer=OptimizerConfig(1e-2, warmup_ratio=0.0),
        step=StepConfig(dtype="float32", remat="none", text_chunk=128),
        mesh=MeshConfig(1, 2, 4),
        loop=LoopConfig(log=1, save=100),
    )
    return dataclasses.replace(config, **changes)


def reading(config: RunConfig, cache: Path) -> RunConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, precomputed=str(cache)))


def make_cache(config: RunConfig, folder: Path, what=BOTH, **changes):
    """Makes a cache of several shards whose sizes are no multiples of the rows."""
    settings = CacheConfig(what, **{"rows": 3, "shard_bytes": 8 * 2048, **changes})
    return precompute(config, folder, settings, lambda _: None, lambda _: None)


def losses(folder: Path) -> np.ndarray:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return np.array([[line[name] for name in ("text_loss", "reconstruction_loss", "gradient_norm")] for line in lines])


def convolutions(run: Run) -> int:
    """Number of convolutions in the step: one in the vision encoder, many in the autoencoder."""
    rows = next(run.data.batches())
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(run.mesh)) for name, x in rows.items()
    }
    with jax.set_mesh(run.mesh):
        return run.train_step.lower(run.state, batch).as_text().count("stablehlo.convolution")


CASES = [
    pytest.param({}, ("targets",), True, 1, id="denoise, targets", marks=pytest.mark.slow),
    pytest.param({}, BOTH, False, 0, id="denoise, features"),
    pytest.param(
        {"model": WITH_TEACHER, "reconstruction": REGRESS},
        BOTH,
        False,
        0,
        id="latent, teacher, features",
        marks=pytest.mark.slow,
    ),
]
"""(changes of the config, parts of the cache, whether pixels are read, convolutions left in the step)"""


@pytest.mark.parametrize(("changes", "what", "pixels", "left"), CASES)
def test_losses_are_those_of_the_pixels(data, tmp_path, changes, what, pixels, left):
    """A run on a cache has the losses of a run on pixels, does not run the cached components, and continues."""
    config = make_config(data, **changes)
    assert Run(config, tmp_path / "pixels").train() == 3
    made = make_cache(config, tmp_path / "cache", what)
    assert made.missing == 0 and made.broken == 1
    with_cache = reading(config, tmp_path / "cache")
    run = Run(with_cache, tmp_path / "cached")
    assert ("images" in next(run.data.batches())) == pixels
    assert convolutions(run) == left
    assert run.train(stop_at=lambda step: step == 2) == 2
    assert run.data.broken == 1
    assert Run(with_cache, tmp_path / "cached").train() == 3
    expected = losses(tmp_path / "pixels")
    assert expected[2, 1] != pytest.approx(expected[0, 1], rel=1e-3)  # the run learns, so that gradients matter
    np.testing.assert_allclose(losses(tmp_path / "cached"), expected, rtol=1e-6)


@pytest.mark.slow
def test_stored_dtypes(data, tmp_path):
    """bfloat16 halves the bytes of targets; features keep the dtype that the step computes."""
    config = make_config(data, step=StepConfig(dtype="bfloat16", remat="none", text_chunk=128))
    make_cache(config, tmp_path / "full")
    make_cache(config, tmp_path / "half", dtype="bfloat16", rows=40, shard_bytes=2**20)
    full, half = Precomputed(tmp_path / "full"), Precomputed(tmp_path / "half")
    assert full.layout.shards > 1 == half.layout.shards
    assert full.layout.record_bytes("features") == half.layout.record_bytes("features") == 1 + 2 * 4 * 32
    assert full.layout.record_bytes("targets") == 1 + 4 * 2 * 8 * 8 * 4 == 2 * half.layout.record_bytes("targets") - 1
    for name, exact in full.read(3).items():
        rounded = half.read(3)[name]
        assert str(rounded.dtype) == "bfloat16" and np.ptp(exact.astype(np.float32)) > 0
        np.testing.assert_array_equal(exact.astype(rounded.dtype), rounded)
    made = make_cache(config, tmp_path / "full")
    assert made.images == 0


# Caches that are refused

TRAINED = dataclasses.replace(FREEZE, trainable=(*TRAINABLE, r"vision/.*"))
OTHER_VAE = dataclasses.replace(
    MODEL, autoencoder=dataclasses.replace(MODEL.autoencoder, scaling_factor=0.7, norm_groups=2)
)
LARGER = dataclasses.replace(MODEL, vision=dataclasses.replace(MODEL.vision, image_size=29))
LAYER = dataclasses.replace(MODEL, vision=dataclasses.replace(MODEL.vision, select_layer=-1))
PIXELS = dataclasses.replace(MODEL, denoiser=None, autoencoder=None, regressor=RegressorConfig("pixels", 64, 768, 32))
REFUSED = {
    "autoencoder": (
        {"model": OTHER_VAE},
        r"targets.autoencoder.norm_groups: 4 there, 2 now\n  targets.autoencoder.scaling_factor: 0.5 there, 0.7 now",
    ),
    "resolution": ({"model": LARGER}, r"images.image.size: 28 there, 29 now"),
    "normalisation": (
        {"model": dataclasses.replace(MODEL, image_mean=(0.4, 0.5, 0.5))},
        r"images.image.mean: \[0.5, 0.5, 0.5\] there, \[0.4, 0.5, 0.5\] now",
    ),
    "mode": ({"image_mode": "crop"}, r"something else:\n  images.image.mode: 'pad' there, 'crop' now\nMake"),
    "layer": ({"model": LAYER}, r"features.vision.select_layer: -2 there, -1 now"),
    "activations": ({"step": StepConfig(dtype="bfloat16")}, r"features.activations: 'float32' there, 'bfloat16' now"),
    "teacher": (
        {"model": WITH_TEACHER, "reconstruction": REGRESS},
        r"targets.autoencoder.channels: \[8, 8, 8\] there, None",
    ),
    "trained encoder": ({"freeze": TRAINED}, r"config.data.precomputed: .*the vision encoder learn.*vision=frozen"),
}


@pytest.fixture(scope="module")
def cache(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "made"
    make_cache(make_config(data), folder)
    return folder


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_was_made_of_something_else(data, cache, changes, message):
    config = make_config(data, **changes)
    with pytest.raises(UserError, match=message):
        open_data(reading(config, cache), make_mesh(config.mesh))


def test_other_images(data, cache, tmp_path):
    records = json.loads((data / "data.json").read_text())
    (tmp_path / "data.json").write_text(json.dumps(records[1:]))
    config = make_config(data)
    sources = (SourceConfig(str(tmp_path / "data.json"), images=(str(data),)),)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))
    with pytest.raises(UserError, match=r"images.counts_hash: .*\n  images.source_hash: "):
        open_data(reading(config, cache), make_mesh(config.mesh))


def test_other_parameters(data, cache, tmp_path):
    """A cache made by other parameters is refused before the run writes anything."""
    with pytest.raises(
        UserError, match=r"features.vision.parameters_hash: .*\n  targets.autoencoder.parameters_hash: "
    ):
        Run(reading(make_config(data, seed=1), cache), tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_cache_that_is_of_no_use(data, tmp_path):
    """A run without targets refuses a cache of targets alone, and reads the features of a cache that has both."""
    config = make_config(data)
    make_cache(config, tmp_path / "targets", ("targets",))
    baseline = dataclasses.replace(config, reconstruction=ReconstructionConfig("none"))
    with pytest.raises(ConfigError, match=r"of no use: targets: config.reconstruction.kind is 'none', which has none"):
        open_data(reading(baseline, tmp_path / "targets"), make_mesh(config.mesh))
    make_cache(config, tmp_path / "both")
    batch = next(open_data(reading(baseline, tmp_path / "both"), make_mesh(config.mesh)).batches())
    assert "image_features" in batch and not [x for x in batch if x == "images" or x.startswith("image_targets")]
    regressed = dataclasses.replace(config, model=PIXELS, reconstruction=ReconstructionConfig("pixel"))
    batch = next(open_data(reading(regressed, tmp_path / "both"), make_mesh(config.mesh)).batches())
    assert {"image_features", "images"} <= batch.keys()  # the objective regresses pixels
    drawn = dataclasses.replace(config, loop=LoopConfig(images=5))
    assert "images" in next(open_data(reading(drawn, tmp_path / "both"), make_mesh(config.mesh)).batches())


@pytest.mark.parametrize(
    ("changes", "what", "message"),
    [
        (
            {"model": PIXELS, "reconstruction": ReconstructionConfig("pixel")},
            BOTH,
            "'pixel' names no target encoder",
        ),
        ({"reconstruction": ReconstructionConfig("none")}, ("targets",), "kind is 'none', which has none"),
        ({"freeze": TRAINED}, ("features",), "has the vision encoder learn"),
    ],
)
def test_what_cannot_be_cached(data, tmp_path, changes, what, message):
    with pytest.raises(ConfigError, match=message):
        make_cache(make_config(data, **changes), tmp_path / "cache", what)
    assert not (tmp_path / "cache").exists()


# Interrupted, shared and damaged caches


@pytest.mark.slow
def test_what_is_missing_is_made_anew(data, cache, tmp_path):
    """Two processes complete one cache, a lost shard is made again, and another config is refused."""
    config = make_config(data)
    first = make_cache(config, tmp_path / "cache", processes=2, process=1)
    assert first.missing > 0
    with pytest.raises(UserError, match=r"not complete: run the same launch/cache.py again"):
        Precomputed(tmp_path / "cache")
    with pytest.raises(UserError, match=r"parts.targets.image_targets_mean.dtype: 'float32' there, 'bfloat16' now"):
        make_cache(config, tmp_path / "cache", dtype="bfloat16")
    second = make_cache(config, tmp_path / "cache", processes=2, process=0)
    assert second.missing == 0 and first.images + second.images == Precomputed(cache).layout.records
    lost = sorted((tmp_path / "cache").glob("features-*"))[1]
    lost.unlink()
    with pytest.raises(UserError, match=f"{lost.name}: missing"):
        open_data(reading(config, tmp_path / "cache"), make_mesh(config.mesh))
    assert make_cache(config, tmp_path / "cache").images == Precomputed(cache).layout.shard_records
    for path in cache.glob("*.arrayrecord"):
        assert path.read_bytes() == (tmp_path / "cache" / path.name).read_bytes(), path.name
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UserError, match="other: is not empty, and holds no cache"):
        make_cache(config, tmp_path / "other")


def test_the_hash_is_of_every_bit_wherever_it_is():
    rng = np.random.default_rng(0)
    tree = {"a": {"kernel": rng.normal(size=(8, 4)).astype(np.float32)}, "b": np.zeros(3, jax.numpy.bfloat16)}
    expected = parameters_hash(tree)
    mesh = make_mesh(MeshConfig(1, 2, 4))
    split = jax.device_put(
        tree["a"]["kernel"], jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tensor"))
    )
    assert parameters_hash({"a": {"kernel": split}, "b": tree["b"]}) == expected
    flipped = tree["a"]["kernel"].copy()
    flipped.view(np.uint32)[5, 2] ^= 1
    swapped = tree["a"]["kernel"][::-1].copy()
    renamed = {"a": {"bias": tree["a"]["kernel"]}, "b": tree["b"]}
    others = [{"a": {"kernel": x}, "b": tree["b"]} for x in (flipped, swapped, swapped.reshape(4, 8))]
    wider = {"a": tree["a"], "b": tree["b"].astype(np.float32)}
    assert len({expected, *map(parameters_hash, [*others, renamed, wider])}) == 6
