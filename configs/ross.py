"""Ross at full size, composed of parts:

  --config=configs/ross.py:encoder=siglip,llm=qwen2_7b,stage=finetune

  encoder   siglip (SO400M/14@384) | clip (ViT-L/14@336)
  llm       qwen2_7b | vicuna_7b | vicuna_13b | llama3_8b
  stage     pretrain (projector and denoiser learn) | finetune (all but vision encoder and autoencoder)
  vision    frozen | trained (the vision encoder learns too)

Hyper-parameters are those of the paper and the reference. Point `config.data.sources`, `config.text.tokenizer` and
`config.init` at your files.
"""

import dataclasses

from ml_collections import ConfigDict

from ross_jax.config import ConfigError, nearest, thaw
from ross_jax.convert import known
from ross_jax.convert.autoencoder import autoencoder_config
from ross_jax.convert.language import language_config
from ross_jax.convert.vision import NORMALISATION, vision_config
from ross_jax.models.denoiser import DenoiserConfig, default_width
from ross_jax.models.projector import ProjectorConfig
from ross_jax.models.ross import RossConfig
from ross_jax.training.recipe import complete

ENCODERS = {"siglip": "google/siglip-so400m-patch14-384", "clip": "openai/clip-vit-large-patch14-336"}
LLMS = {
    "qwen2_7b": ("Qwen/Qwen2-7B-Instruct", "qwen_2"),
    "vicuna_7b": ("lmsys/vicuna-7b-v1.5", "v1"),
    "vicuna_13b": ("lmsys/vicuna-13b-v1.5", "v1"),
    "llama3_8b": ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3"),
}
"""Name -> hub id and conversation template."""
STAGES = {
    "pretrain": {
        "trainable": (r"projector/.*", r"denoiser/.*"),
        "learning_rate": 1e-3,
        "groups": ((r"denoiser/.*", 1e-4),),
        "batch": 256,
        "data": ("blip_laion_cc_sbu_558k.json", "images"),
        # Reported: from about 1 down to about 0.3.
        "expected": (0.2, 1.1),
    },
    "finetune": {
        "trainable": (r"language/.*", r"projector/.*", r"denoiser/.*"),
        "learning_rate": 2e-5,
        "groups": (),
        "batch": 128,
        "data": ("cambrian737k.jsonl", "images"),
        "expected": (0.1, 0.3),
    },
}
VISION = {"frozen": (), "trained": (r"vision/.*",)}
AUTOENCODER = "black-forest-labs/FLUX.1-dev/vae"
DEFAULTS = {"encoder": "siglip", "llm": "qwen2_7b", "stage": "finetune", "vision": "frozen"}


def parse(arguments: str | None) -> dict[str, str]:
    """`encoder=...,llm=...,stage=...,vision=...` over the defaults.

    Raises:
      ConfigError: an unknown part or value; names the nearest.
    """
    chosen = dict(DEFAULTS)
    choices = {"encoder": ENCODERS, "llm": LLMS, "stage": STAGES, "vision": VISION}
    for item in filter(None, (arguments or "").split(",")):
        name, _, value = item.partition("=")
        if name not in choices:
            raise ConfigError(f"recipe part {name!r}: no such part{nearest(name, choices)}; there are {list(choices)}")
        if value not in choices[name]:
            raise ConfigError(f"{name}={value!r}: unknown{nearest(value, choices[name])}; one of {list(choices[name])}")
        chosen[name] = value
    return chosen


def model_config(encoder: str, llm: str, reconstruct: bool = True) -> RossConfig:
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
    if not reconstruct:
        return config
    denoiser = DenoiserConfig(language.hidden_size, 64, vision.grid, default_width(3), 3)
    autoencoder = autoencoder_config(known.AUTOENCODERS[AUTOENCODER], AUTOENCODER)
    return dataclasses.replace(config, denoiser=denoiser, autoencoder=autoencoder)


def get_config(arguments: str | None = None, reconstruct: bool = True) -> ConfigDict:
    """The recipe as a ConfigDict that command-line flags can override."""
    parts = parse(arguments)
    stage = STAGES[parts["stage"]]
    _, template = LLMS[parts["llm"]]
    annotations, pictures = stage["data"]
    # A recipe is LLaVA's where nothing is reconstructed: no rate for a denoiser that is not there.
    groups = stage["groups"] if reconstruct else ()
    return complete(
        {
            "model": thaw(model_config(parts["encoder"], parts["llm"], reconstruct)),
            "init": [],
            "text": {"template": "plain" if parts["stage"] == "pretrain" else template, "tokenizer": "tokenizer"},
            "image_mode": "pad",
            "data": {
                "sources": [{"path": annotations, "images": [pictures]}],
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
            "reconstruction": {"kind": "denoise" if reconstruct else "none"},
            "step": {"dtype": "bfloat16", "remat": "full"},
            "loop": {"expected_reconstruction": stage["expected"] if reconstruct else None},
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
            "seed": 0,
        }
    )
