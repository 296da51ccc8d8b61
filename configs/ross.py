"""Ross at full size. The recipe is composed of parts:

  --config=configs/ross.py:encoder=siglip,llm=qwen2_7b,stage=finetune

  encoder   siglip (SO400M/14@384) | siglip2 (the same size) | clip (ViT-L/14@336)
  llm       qwen2_7b | vicuna_7b | vicuna_13b | llama3_8b, those of the paper
            | qwen2_5_0_5b | qwen2_5_1_5b | qwen2_5_3b | qwen2_5_7b | qwen3_0_6b | qwen3_1_7b | qwen3_4b | qwen3_8b
            | llama3_1_8b | llama3_2_1b | llama3_2_3b
  stage     pretrain (projector and denoiser learn) | finetune (all components but vision encoder and autoencoder learn)
  tune      full | lora (stage=finetune: low-rank updates of the language model; projector and head learn in full)
  vision    frozen | trained (the vision encoder learns too)
  kind      reconstruction: denoise (Ross^D) | pixel | latent | latent2pixel (Ross^R) | none (LLaVA), or another
            objective of the registry
  teacher   target encoder of kind=latent: autoencoder | siglip | clip | dinov2

Hyper-parameters come from the paper and the reference. Point `config.data.sources`, `config.text.tokenizer` and
`config.init` at your files.
"""

import dataclasses
import json
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from ross_jax.config import ConfigError, to_dict
from ross_jax.convert import known
from ross_jax.convert.autoencoder import autoencoder_config
from ross_jax.convert.language import language_config
from ross_jax.convert.vision import NORMALISATION, teacher_config, vision_config
from ross_jax.models.denoiser import default_width
from ross_jax.models.projector import ProjectorConfig
from ross_jax.models.ross import HEADS, RossConfig
from ross_jax.objectives.reconstruction import add_heads, find_objective, kinds
from ross_jax.storage import location
from ross_jax.training.recipe import complete, parse_parts

ENCODERS = {
    "siglip": "google/siglip-so400m-patch14-384",
    "siglip2": "google/siglip2-so400m-patch14-384",
    "clip": "openai/clip-vit-large-patch14-336",
}
BILINEAR = ("siglip2",)
"""Encoders whose images are resized bilinearly; those of others bicubically."""
LLMS = {
    "qwen2_7b": ("Qwen/Qwen2-7B-Instruct", "qwen_2"),
    "vicuna_7b": ("lmsys/vicuna-7b-v1.5", "v1"),
    "vicuna_13b": ("lmsys/vicuna-13b-v1.5", "v1"),
    "llama3_8b": ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3"),
    "qwen2_5_0_5b": ("Qwen/Qwen2.5-0.5B-Instruct", "qwen2_5"),
    "qwen2_5_1_5b": ("Qwen/Qwen2.5-1.5B-Instruct", "qwen2_5"),
    "qwen2_5_3b": ("Qwen/Qwen2.5-3B-Instruct", "qwen2_5"),
    "qwen2_5_7b": ("Qwen/Qwen2.5-7B-Instruct", "qwen2_5"),
    "qwen3_0_6b": ("Qwen/Qwen3-0.6B", "qwen3"),
    "qwen3_1_7b": ("Qwen/Qwen3-1.7B", "qwen3"),
    "qwen3_4b": ("Qwen/Qwen3-4B", "qwen3"),
    "qwen3_8b": ("Qwen/Qwen3-8B", "qwen3"),
    "llama3_1_8b": ("meta-llama/Llama-3.1-8B-Instruct", "llama3"),
    "llama3_2_1b": ("meta-llama/Llama-3.2-1B-Instruct", "llama3"),
    "llama3_2_3b": ("meta-llama/Llama-3.2-3B-Instruct", "llama3"),
}
"""Name -> hub id and conversation template."""
HEADS_PATTERN = rf"({'|'.join(HEADS)})/.*"
"""Pattern of parameter paths: the head of any kind of reconstruction."""
STAGES = {
    "pretrain": {
        "trainable": (r"projector/.*", HEADS_PATTERN),
        "learning_rate": 1e-3,
        "groups": ((HEADS_PATTERN, 1e-4),),
        "batch": 256,
        "data": ("blip_laion_cc_sbu_558k.json", "images"),
        "expected": {"denoise": (0.2, 1.1)},
    },
    "finetune": {
        "trainable": (r"language/.*", r"projector/.*", HEADS_PATTERN),
        "learning_rate": 2e-5,
        "groups": (),
        "batch": 128,
        "data": ("cambrian737k.jsonl", "images"),
        "expected": {"denoise": (0.1, 0.3)},
    },
}
"""Stage -> hyper-parameters. `expected`: kind -> range of the reconstruction loss that is reported for it."""
TUNE = {
    "full": {},
    "lora": {
        "lora": {"rank": 128, "alpha": 256.0},
        "optimizer": {"learning_rate": 2e-4, "groups": [[rf"projector/.*|{HEADS_PATTERN}", 2e-5]]},
    },
}
"""How the language model learns -> sections of the config that differ. Those of LoRA are LLaVA's."""
VISION = {"frozen": (), "trained": (r"vision/.*",)}
TEACHERS = {
    "autoencoder": None,
    "siglip": "google/siglip-so400m-patch14-384",
    "clip": "openai/clip-vit-large-patch14-336",
    "dinov2": "facebook/dinov2-large",
}
"""Name -> hub id of a vision encoder; None for the autoencoder."""
AUTOENCODER = "black-forest-labs/FLUX.1-dev/vae"
DEFAULTS = {
    "encoder": "siglip",
    "llm": "qwen2_7b",
    "stage": "finetune",
    "tune": "full",
    "vision": "frozen",
    "kind": "denoise",
    "teacher": "autoencoder",
}


def choices() -> dict[str, Collection[str]]:
    """Part of the recipe -> the values that it can have."""
    return {
        "encoder": ENCODERS,
        "llm": LLMS,
        "stage": STAGES,
        "tune": TUNE,
        "vision": VISION,
        "teacher": TEACHERS,
        "kind": kinds(),
    }


def parse(arguments: str | None) -> dict[str, str]:
    """Parts of the recipe from `encoder=...,llm=...,...`; parts that are not named have their defaults.

    Raises:
      ConfigError: a part or a value is unknown (the message names the nearest), a teacher is given for another kind
        than `latent`, or low-rank updates for a stage in which the language model does not learn.
    """
    chosen = parse_parts(arguments, DEFAULTS, choices())
    if chosen["teacher"] != DEFAULTS["teacher"] and chosen["kind"] != "latent":
        raise ConfigError(f"teacher={chosen['teacher']!r} is of kind=latent, not kind={chosen['kind']}")
    if chosen["tune"] != DEFAULTS["tune"] and chosen["stage"] == "pretrain":
        raise ConfigError(f"tune={chosen['tune']}: stage=pretrain does not train the language model")
    return chosen


def _settings(part: str, published: Mapping[str, Any], folders: Mapping[str, str]) -> Mapping[str, Any]:
    """The config.json of a part: the one in its folder, or the published one."""
    if part not in folders:
        return published
    path = location(folders[part]) / "config.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error


def model_config(
    encoder: str,
    llm: str,
    kind: str = "denoise",
    teacher: str = "autoencoder",
    folders: Mapping[str, str] = {},
) -> RossConfig:
    """Sizes of the published components, put together.

    Args:
      folders: `encoder`, `llm` or `autoencoder` -> folder with the config.json of its sizes. Others: published.
    """
    vision = vision_config(_settings("encoder", known.VISION_TOWERS[ENCODERS[encoder]], folders), encoder)
    settings = _settings("llm", known.LANGUAGE_MODELS[LLMS[llm][0]], folders)
    language = language_config(settings["model_type"], settings, llm)
    mean, std = NORMALISATION[vision.kind]
    config = RossConfig(
        vision=vision,
        projector=ProjectorConfig("mlp", vision.hidden_size, language.hidden_size, 2),
        language=language,
        image_mean=mean,
        image_std=std,
        image_resample=2 if encoder in BILINEAR else 3,
    )
    objective = find_objective(kind)
    if TEACHERS[teacher]:
        tower = teacher_config(known.VISION_TOWERS[TEACHERS[teacher]], teacher)
        mean, std = NORMALISATION[tower.kind]
        config = dataclasses.replace(config, teacher=tower, teacher_mean=mean, teacher_std=std)
    elif objective and "autoencoder" in objective.requires(config):
        published = known.AUTOENCODERS[AUTOENCODER]
        autoencoder = autoencoder_config(_settings("autoencoder", published, folders), AUTOENCODER)
        config = dataclasses.replace(config, autoencoder=autoencoder)
    denoiser = {"width": default_width(3), "depth": 3}
    return add_heads(config, kind, denoiser=denoiser, regressor={"width": language.hidden_size})


def get_config(arguments: str | None = None, folders: Mapping[str, str] = {}) -> ConfigDict:
    """The recipe as a ConfigDict that command-line flags can override. `folders` are those of `model_config`."""
    parts = parse(arguments)
    kind = parts["kind"]
    stage = STAGES[parts["stage"]]
    _, template = LLMS[parts["llm"]]
    annotations, images = stage["data"]
    groups = stage["groups"] if find_objective(kind) else ()
    tune = TUNE[parts["tune"]]
    return complete(
        {
            "model": to_dict(model_config(parts["encoder"], parts["llm"], kind, parts["teacher"], folders)),
            "init": [],
            "text": {"template": "plain" if parts["stage"] == "pretrain" else template, "tokenizer": "tokenizer"},
            "image_mode": "pad",
            "data": {
                "sources": [{"path": annotations, "images": [images]}],
                "packing": {"length": 2048, "images": 2},
                "batch": stage["batch"],
            },
            "freeze": {
                "trainable": [*stage["trainable"], *VISION[parts["vision"]]],
                "autoencoder_dtype": "bfloat16",
            },
            "optimizer": {
                "learning_rate": stage["learning_rate"],
                "groups": [list(group) for group in groups],
                "warmup_ratio": 0.03,
                "weight_decay": 0.0,
                **tune.get("optimizer", {}),
            },
            "lora": tune.get("lora", {}),
            "reconstruction": {"kind": kind},
            "step": {"dtype": "bfloat16", "remat": "full"},
            "loop": {"expected_reconstruction": stage["expected"].get(kind)},
            "mesh": {"data": -1, "fsdp": -1, "tensor": 1},
            "seed": 0,
        }
    )
