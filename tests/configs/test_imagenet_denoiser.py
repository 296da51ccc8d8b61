"""The recipe of the denoiser alone: trained components, data, and row lengths that fit each template."""

import itertools

import numpy as np
import pytest

from configs import imagenet_denoiser, ross
from ross_jax.config import ConfigError, from_dict
from ross_jax.data.encoders import build_image_encoder
from ross_jax.models.ross import abstract_params
from ross_jax.training.recipe import RunConfig
from ross_jax.tree import flatten
from tokenizer_fixtures import tokenizer_folder  # noqa: F401


@pytest.mark.parametrize(("encoder", "llm"), list(itertools.product(("siglip", "clip"), list(ross.LLMS)[:4])))
def test_recipe(encoder, llm):
    arguments = f"encoder={encoder},llm={llm}"
    config = from_dict(RunConfig, imagenet_denoiser.get_config(f"{arguments},root=/data/imagenet").to_dict())
    stage2 = from_dict(RunConfig, ross.get_config(f"{arguments},stage=finetune").to_dict())
    assert config.model == stage2.model and config.image_mode == stage2.image_mode
    assert (config.text.template, config.text.weight) == (stage2.text.template, 0.0)
    trained = {path.partition("/")[0] for path in flatten(abstract_params(config.model)) if config.freeze.trains(path)}
    assert trained == {"denoiser"}
    assert config.data.packing.length in (896, 640) and config.data.packing.images == 1
    assert [source.path for source in config.data.sources] == ["/data/imagenet/train"]
    assert [source.path for source in config.evaluation.sources] == ["/data/imagenet/val"]
    assert {source.kind for source in config.data.sources + config.evaluation.sources} == {"images"}
    assert config.loop.evaluate and config.data.epochs == 5


def test_imagenet_of_tfds():
    config = from_dict(RunConfig, imagenet_denoiser.get_config().to_dict())
    sources = config.data.sources + config.evaluation.sources
    assert [(source.path, source.kind, source.split, source.caption) for source in sources] == [
        ("imagenet2012", "tfds", "train", None),
        ("imagenet2012", "tfds", "validation", None),
    ]


@pytest.mark.parametrize(("template", "name"), [("v1", "llama2"), ("qwen_2", "qwen2"), ("llama3", "llama3")])
def test_every_prompt_fits(template, name, tokenizer_folder):  # noqa: F811
    from transformers import AutoTokenizer

    encode = build_image_encoder(template, AutoTokenizer.from_pretrained(tokenizer_folder(name)))
    ids = encode({"image": "a"}).input_ids
    assert np.count_nonzero(ids >= 0) <= imagenet_denoiser.PROMPT


@pytest.mark.parametrize(
    ("arguments", "message"),
    [("llm=qwen2_8b", "qwen2_7b"), ("rot=/data", "did you mean 'root'"), ("encoder=x", "clip")],
)
def test_typos_name_the_nearest(arguments, message):
    with pytest.raises(ConfigError, match=message):
        imagenet_denoiser.get_config(arguments)
