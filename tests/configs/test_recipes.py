"""Recipes: shapes, parameter counts and sharding, without allocating arrays."""

import dataclasses
import itertools
import math

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from configs import language_only, llava, ross
from ross_jax.config import ConfigError, from_dict
from ross_jax.models.ross import abstract_params
from ross_jax.sharding import AXES, MeshConfig, make_mesh, parameter_shardings
from ross_jax.training.recipe import RunConfig
from ross_jax.tree import flatten

LANGUAGE_PARAMETERS = {
    "qwen2_7b": 7_615_616_512,
    "vicuna_7b": 6_738_415_616,
    "vicuna_13b": 13_015_864_320,
    "llama3_8b": 8_030_261_248,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_3b": 3_085_938_688,
    "qwen2_5_7b": 7_615_616_512,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "llama3_1_8b": 8_030_261_248,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
}
"""Published numbers of parameters."""
PAPER = list(LANGUAGE_PARAMETERS)[:4]
PARTS = [
    *itertools.product(("siglip", "clip"), PAPER, ross.STAGES),
    *itertools.product(["siglip2"], sorted(set(ross.LLMS) - set(PAPER)), ["finetune"]),
]


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("recipe", [ross, llava], ids=["ross", "llava"])
@pytest.mark.parametrize(("encoder", "llm", "stage"), PARTS)
def test_recipe(recipe, encoder, llm, stage):
    config = from_dict(RunConfig, recipe.get_config(f"encoder={encoder},llm={llm},stage={stage}").to_dict())
    tree = abstract_params(config.model)
    assert count(tree["language"]) == LANGUAGE_PARAMETERS[llm]
    assert ("denoiser" in tree) == ("autoencoder" in tree) == (recipe is ross)
    flat = flatten(tree)
    trained = {path.partition("/")[0] for path in flat if config.freeze.trains(path)}
    expected = {"projector", "denoiser"} | ({"language"} if stage == "finetune" else set())
    assert trained == expected & set(tree)
    assert (config.data.batch, config.optimizer.learning_rate) == ((256, 1e-3) if stage == "pretrain" else (128, 2e-5))
    # Fully sharded over 64 chips, each chip holds its share, except for the autoencoder and small leaves.
    mesh = AbstractMesh((1, 64, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    shardings = parameter_shardings(flat, mesh)
    held = {path: math.prod(shardings[path].shard_shape(leaf.shape)) for path, leaf in flat.items()}
    whole = [path for path, leaf in flat.items() if held[path] == math.prod(leaf.shape) > 2**22]
    assert [path for path in whole if not path.startswith("autoencoder")] == []
    trained = sum(size for path, size in held.items() if not path.startswith("autoencoder"))
    assert trained < 0.03 * count(tree)


def test_low_rank_updates():
    """In 7B, 323 million parameters of factors train in place of the language model, and the rest as before."""
    config = from_dict(RunConfig, ross.get_config("llm=qwen2_7b,tune=lora").to_dict())
    flat = flatten(config.abstract_tree(make_mesh(MeshConfig(1, 8, 1))))
    trained = {path: math.prod(leaf.shape) for path, leaf in flat.items() if config.freezing.trains(path)}
    assert {path.partition("/")[0] for path in trained} == {"language", "projector", "denoiser"}
    factors = [path for path in trained if path.startswith("language/")]
    widths = 2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944)
    assert sum(trained[path] for path in factors) == 28 * 128 * widths and len(factors) == 14
    assert {config.optimizer.group(path) for path in factors} == {"rest"}
    with pytest.raises(ConfigError, match="stage=pretrain does not train the language model"):
        ross.get_config("stage=pretrain,tune=lora")


def test_language_only_is_ross_without_images():
    arguments = "encoder=siglip,llm=qwen2_7b,stage=finetune"
    whole, alone = (from_dict(RunConfig, recipe.get_config(arguments).to_dict()) for recipe in (ross, language_only))
    assert alone.data.packing == dataclasses.replace(whole.data.packing, images=0)
    assert alone.model.language == whole.model.language and alone.reconstruction.kind == "none"
    assert {path.partition("/")[0] for path in flatten(abstract_params(alone.model)) if alone.freeze.trains(path)} == {
        "language"
    }
    assert (alone.step, alone.optimizer, alone.mesh) == (whole.step, whole.optimizer, whole.mesh)


@pytest.mark.parametrize("recipe", [ross, llava], ids=["ross", "llava"])
def test_the_encoder_learns_on_request(recipe):
    for part, trains in (("", False), ("vision=frozen", False), ("vision=trained,stage=pretrain", True)):
        config = from_dict(RunConfig, recipe.get_config(part).to_dict())
        tree = abstract_params(config.model)
        assert {config.freeze.trains(f"vision/{path}") for path in flatten(tree["vision"])} == {trains}


KINDS = {
    "kind=denoise": ({"denoiser", "autoencoder"}, 64),
    "kind=pixel": ({"regressor"}, 768),
    "kind=latent": ({"regressor", "autoencoder"}, 64),
    "kind=latent2pixel": ({"regressor", "autoencoder"}, 64),
    "kind=latent,teacher=siglip": ({"regressor", "teacher"}, 1152),
    "kind=latent,teacher=clip": ({"regressor", "teacher"}, 1024),
    "kind=latent,teacher=dinov2": ({"regressor", "teacher"}, 1024),
    "kind=none": (set(), None),
}


@pytest.mark.parametrize("parts", KINDS)
def test_kinds(parts):
    """Each kind has only the components it needs, trains no target encoder, and shards large leaves."""
    config = from_dict(RunConfig, ross.get_config(f"{parts},stage=pretrain").to_dict())
    added, size = KINDS[parts]
    tree = abstract_params(config.model)
    assert set(tree) == {"vision", "projector", "language"} | added
    reader = config.model.denoiser or config.model.regressor
    assert size in (None, reader and (getattr(reader, "latent_size", None) or getattr(reader, "out_size", None)))
    flat = flatten(tree)
    trained = {path.partition("/")[0] for path in flat if config.freeze.trains(path)}
    assert trained == {"projector"} | (added & {"denoiser", "regressor"})
    assert (config.loop.expected_reconstruction is not None) == (parts == "kind=denoise")
    shardings = parameter_shardings(flat, AbstractMesh((1, 64, 1), AXES, axis_types=(AxisType.Auto,) * 3))
    for path, leaf in flat.items():
        if math.prod(leaf.shape) > 2**22 and not path.startswith("autoencoder"):
            assert math.prod(shardings[path].shard_shape(leaf.shape)) < math.prod(leaf.shape), path


def test_expected_losses():
    """Expected losses are those that Ross reports: about 1 to 0.3 in stage 1, 0.1 to 0.3 in stage 2; LLaVA has none."""
    low, high = ross.get_config("stage=pretrain").loop.expected_reconstruction
    assert low < 0.3 and high > 1
    assert ross.get_config("stage=finetune").loop.expected_reconstruction == (0.1, 0.3)
    assert llava.get_config().loop.expected_reconstruction is None


def test_learning_rates_of_stage_one():
    config = from_dict(RunConfig, ross.get_config("stage=pretrain").to_dict())
    for path in ("denoiser/blocks/mlp/up/kernel", "regressor/linear_0/kernel"):
        assert config.optimizer.rates()[config.optimizer.group(path)] == 1e-4
    assert config.optimizer.rates()["rest"] == 1e-3
    assert config.optimizer.group("projector/linear_0/kernel") == "rest"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("llm=qwen2_8b", "qwen2_7b"),
        ("encodr=clip", "did you mean 'encoder'"),
        ("stage=tune", "finetune"),
        ("vision=traned", "trained"),
        ("kind=pixels", "did you mean 'pixel'"),
        ("kind=pixel,teacher=dinov2", "teacher='dinov2' is of kind=latent, not kind=pixel"),
    ],
)
def test_typos_name_the_nearest(arguments, message):
    with pytest.raises(ConfigError, match=message):
        ross.get_config(arguments)
