"""Ross at full size, composed of parts:

  --config=configs/ross.py:encoder=siglip,llm=qwen2_7b,stage=finetune

  encoder   siglip (SO400M/14@384) | clip (ViT-L/14@336)
  llm       qwen2_7b | vicuna_7b | vicuna_13b | llama3_8b
  stage     pretrain (projector and denoiser learn) | finetune (all but vision encoder and autoencoder)
  vision    frozen | trained (the vision encoder learns too)
  kind      of reconstruction: denoise (Ross^D) | pixel | latent | latent2pixel (Ross^R) | none (LLaVA)
  teacher   of kind=latent: autoencoder | siglip | clip | dinov2

Hyper-parameters are those of the paper and the reference. Point `config.data.sources`, `config.text.tokenizer` and
`config.init` at your files.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from ross_jax.config import ConfigError, nearest, to_dict
from ross_jax.convert import known
from ross_jax.convert.autoencoder import autoencoder_config
from ross_jax.convert.language import language_config
from ross_jax.convert.vision import NORMALISATION, teacher_config, vision_config
from ross_jax.models.denoiser import DenoiserConfig, default_width
from ross_jax.models.projector import ProjectorConfig
from ross_jax.models.regressor import RegressorConfig
from ross_jax.models.ross import TARGET_PIXELS, RossConfig
from ross_jax.training.recipe import complete

ENCODERS = {"siglip": "google/siglip-so400m-patch14-384", "clip": "openai/clip-vit-large-patch14-336"}
LLMS = {
    "qwen2_7b": ("Qwen/Qwen2-7B-Instruct", "qwen_2"),
    "vicuna_7b": ("lmsys/vicuna-7b-v1.5", "v1"),
    "vicuna_13b": ("lmsys/vicuna-13b-v1.5", "v1"),
    "llama3_8b": ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3"),
}
"""Name -> hub id and conversation template."""
READERS = r"(denoiser|regressor)/.*"
"""What reads the visual outputs, whatever the kind."""
STAGES = {
    "pretrain": {
        "trainable": (r"projector/.*", READERS),
        "learning_rate": 1e-3,
        "groups": ((READERS, 1e-4),),
        "batch": 256,
        "data": ("blip_laion_cc_sbu_558k.json", "images"),
        # Reported of Ross^D: from about 1 down to about 0.3.
        "expected": (0.2, 1.1),
    },
    "finetune": {
        "trainable": (r"language/.*", r"projector/.*", READERS),
        "learning_rate": 2e-5,
        "groups": (),
        "batch": 128,
        "data": ("cambrian737k.jsonl", "images"),
        "expected": (0.1, 0.3),
    },
}
VISION = {"frozen": (), "trained": (r"vision/.*",)}
KINDS = ("denoise", "pixel", "latent", "latent2pixel", "none")
TEACHERS = {
    "autoencoder": None,
    "siglip": "google/siglip-so400m-patch14-384",
    "clip": "openai/clip-vit-large-patch14-336",
    "dinov2": "facebook/dinov2-large",
}
"""Name -> hub id of a vision encoder."""
AUTOENCODER = "black-forest-labs/FLUX.1-dev/vae"
DEFAULTS = {
    "encoder": "siglip",
    "llm": "qwen2_7b",
    "stage": "finetune",
    "vision": "frozen",
    "kind": "denoise",
    "teacher": "autoencoder",
}
CHOICES = {
    "encoder": ENCODERS,
    "llm": LLMS,
    "stage": STAGES,
    "vision": VISION,
    "kind": KINDS,
    "teacher": TEACHERS,
}


def parse(arguments: str | None) -> dict[str, str]:
    """`encoder=...,llm=...,stage=...,vision=...,kind=...,teacher=...` over the defaults.

    Raises:
      ConfigError: an unknown part or value, and names the nearest; a teacher for another kind than `latent`.
    """
    chosen = dict(DEFAULTS)
    for item in filter(None, (arguments or "").split(",")):
        name, _, value = item.partition("=")
        if name not in CHOICES:
            raise ConfigError(f"recipe part {name!r}: no such part{nearest(name, CHOICES)}; there are {list(CHOICES)}")
        if value not in CHOICES[name]:
            raise ConfigError(f"{name}={value!r}: unknown{nearest(value, CHOICES[name])}; one of {list(CHOICES[name])}")
        chosen[name] = value
    if chosen["teacher"] != DEFAULTS["teacher"] and chosen["kind"] != "latent":
        raise ConfigError(f"teacher={chosen['teacher']!r} is of kind=latent, not kind={chosen['kind']}")
    return chosen


def model_config(encoder: str, llm: str, kind: str = "denoise", teacher: str = "autoencoder") -> RossConfig:
    """Sizes of the published components, put together."""
    vision = vision_config(known.VISION_TOWERS[ENCODERS[encoder]], encoder)
    settings = known.LANGUAGE_MODELS[LLMS[llm][0]]
    language = language_config(settings["model_type"], settings, llm)
    mean, std = NORMALISATION[vision.kind]
    config = RossConfig(
        vision=vision,
        projector=ProjectorConfig("mlp", vision.hidden_size, language.hidden_size, 2),
        language=language,
        image_mean=mean,
        image_std=std,
    )
    return dataclasses.replace(config, **reconstruction_parts(config, kind, teacher))


def reconstruction_parts(config: RossConfig, kind: str, teacher: str) -> dict[str, Any]:
    """The components that a kind of reconstruction adds to a model."""
    width = config.language.hidden_size
    if kind == "none":
        return {}
    if kind == "pixel":
        return {"regressor": RegressorConfig("pixels", width, 3 * TARGET_PIXELS**2, width)}
    if TEACHERS[teacher]:
        tower = teacher_config(known.VISION_TOWERS[TEACHERS[teacher]], teacher)
        mean, std = NORMALISATION[tower.kind]
        regressor = RegressorConfig("features", width, tower.hidden_size, width)
        return {"teacher": tower, "teacher_mean": mean, "teacher_std": std, "regressor": regressor}
    autoencoder = autoencoder_config(known.AUTOENCODERS[AUTOENCODER], AUTOENCODER)
    size = dataclasses.replace(config, autoencoder=autoencoder).latent_size
    if kind == "denoise":
        reader = {"denoiser": DenoiserConfig(width, size, config.vision.grid, default_width(3), 3)}
    else:
        reader = {"regressor": RegressorConfig("latents", width, size, width)}
    return {"autoencoder": autoencoder, **reader}


def get_config(arguments: str | None = None) -> ConfigDict:
    """The recipe as a ConfigDict that command-line flags can override."""
    parts = parse(arguments)
    kind = parts["kind"]
    stage = STAGES[parts["stage"]]
    _, template = LLMS[parts["llm"]]
    annotations, images = stage["data"]
    # A recipe is LLaVA's where nothing is reconstructed: no rate for what is not there.
    groups = () if kind == "none" else stage["groups"]
    return complete(
        {
            "model": to_dict(model_config(parts["encoder"], parts["llm"], kind, parts["teacher"])),
            "init": [],
            "text": {"template": "plain" if parts["stage"] == "pretrain" else template, "tokenizer": "tokenizer"},
            "image_mode": "pad",
            "data": {
                "sources": [{"path": annotations, "images": [images]}],
                "packing": {"length": 2048, "images": 2},
                "batch": stage["batch"],
                "cache": "cache",
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
            },
            "reconstruction": {"kind": kind},
            "step": {"dtype": "bfloat16", "remat": "full"},
            "loop": {"expected_reconstruction": stage["expected"] if kind == "denoise" else None},
            "mesh": {"data": -1, "fsdp": -1, "tensor": 1},
            "seed": 0,
        }
    )
