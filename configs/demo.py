"""The demo: a tiny Ross on 64-pixel images, trained from scratch on a CPU. `bash launch/demo.sh` runs it.

  --config=configs/demo.py:stage=finetune,kind=denoise,seed=0,root=runs/demo

  stage   pretrain (all components but the autoencoder learn, on captions)
          | finetune (all components but the autoencoder learn, on questions)
          | lora (in place of finetune: low-rank updates of the language model; projector and head learn in full)
          | denoiser (after both: only the denoiser learns, on images without text, as in a small version of
            `configs/imagenet_denoiser.py`)
  kind    reconstruction: denoise (Ross) | pixel | latent | latent2pixel | none (LLaVA)
  seed    seed of parameters, order and noise
  root    folder of data, tokenizer, autoencoder and runs

The demo has no pretrained encoder or language model, so stage 1 trains them too, unlike in the full-size recipes. The
optimizer is Muon instead of AdamW, because Muon needs fewer steps at this size.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from ross_jax.config import ConfigError, to_dict
from ross_jax.convert.autoencoder import autoencoder_config
from ross_jax.models.language import LanguageConfig
from ross_jax.models.projector import ProjectorConfig
from ross_jax.models.ross import HEADS, RossConfig
from ross_jax.models.vision import VisionConfig
from ross_jax.objectives.reconstruction import add_heads, find_objective, kinds
from ross_jax.storage import location
from ross_jax.training.recipe import complete, parse_parts

DEFAULTS = {"stage": "finetune", "kind": "denoise", "seed": "0", "root": "runs/demo"}
PARTS = ("pretrain", "finetune", "heldout")
"""Parts of the data set."""
STAGES = {
    "pretrain": {"data": ("pretrain",), "template": "plain", "epochs": 5, "length": 256, "images": 4},
    "finetune": {"data": ("finetune",), "template": "qwen_2", "epochs": 6, "length": 66, "after": "pretrain"},
    "lora": {
        "data": ("finetune",),
        "template": "qwen_2",
        "epochs": 6,
        "length": 66,
        "after": "pretrain",
        "trainable": rf"(projector|{'|'.join(HEADS)})/.*",
        "rank": 16,
    },
    "denoiser": {
        "data": ("pretrain", "finetune"),
        "template": "qwen_2",
        "text_weight": 0.0,
        "trainable": "denoiser/.*",
        "draws": 8,
        "learning_rate": 1e-3,
        "epochs": 2,
        "length": 19,
        "after": "finetune",
        "evaluate": 150,
    },
}
EVERY_STAGE = {
    "text_weight": 1.0,
    "trainable": ".*",
    "rank": 0,
    "draws": 2,
    "learning_rate": 3e-3,
    "images": 1,
    "after": None,
    "evaluate": 0,
}
"""Default settings of a stage. `after`: the stage whose model a stage starts from. `rank`: of low-rank updates."""
CHOICES = {"stage": tuple(STAGES), "kind": kinds()}


def parse(
    arguments: str | None,
    defaults: Mapping[str, str] = DEFAULTS,
    choices: Mapping[str, Sequence[str]] = CHOICES,
) -> dict[str, str]:
    """Parts of the recipe from `name=value,...`; parts that are not named have their defaults.

    Raises:
      ConfigError: a part or a value is unknown (the message names the nearest), or stage and kind do not fit.
    """
    chosen = parse_parts(arguments, defaults, choices)
    if not chosen["seed"].isdecimal():
        raise ConfigError(f"seed={chosen['seed']!r}: a whole number, 0 or more")
    if chosen["stage"] == "denoiser" and chosen["kind"] != "denoise":
        raise ConfigError(f"stage=denoiser: kind={chosen['kind']} has no denoiser")
    return chosen


def needs_autoencoder(kind: str) -> bool:
    """Whether a kind of reconstruction needs an autoencoder."""
    objective = find_objective(kind)
    return objective is not None and "autoencoder" in objective.requires(RossConfig())


def model_config(autoencoder: Path, kind: str = "denoise") -> RossConfig:
    """Sizes of the demo's model. The autoencoder's sizes are read from `config.json` in its folder.

    Raises:
      ConfigError: the autoencoder's folder has no `config.json`.
    """
    config = RossConfig(
        vision=VisionConfig("siglip", 64, 16, 128, 384, 5, 4, "gelu_tanh", 1e-6),
        projector=ProjectorConfig("mlp", 128, 128, 2),
        language=LanguageConfig(512, 128, 384, 4, 4, 2, 32, 1e4, 1e-6, qkv_bias=True, tied_head=True),
    )
    if needs_autoencoder(kind):
        try:
            settings = json.loads((autoencoder / "config.json").read_text())
        except FileNotFoundError as error:
            raise ConfigError(f"{autoencoder}: no config.json; `bash launch/demo.sh` trains the autoencoder") from error
        config = dataclasses.replace(config, autoencoder=autoencoder_config(settings, str(autoencoder)))
    denoiser = {"width": 128, "depth": 3, "num_heads": 4, "prediction": "v"}
    return add_heads(config, kind, denoiser=denoiser, regressor={"width": 512})


def get_config(arguments: str | None = None) -> ConfigDict:
    """The recipe as a ConfigDict that command-line flags can override."""
    parts = parse(arguments)
    root, kind = location(parts["root"]), parts["kind"]
    stage = EVERY_STAGE | STAGES[parts["stage"]]
    init = [str(root / "model")] if needs_autoencoder(kind) else []
    if stage["after"]:
        init.append(str(root / kind / f"seed{parts['seed']}" / stage["after"]))
    images = [str(root / "data" / "images")]
    sources = {part: {"path": str(root / "data" / f"{part}.json"), "images": images} for part in PARTS}
    return complete(
        {
            "model": to_dict(model_config(root / "autoencoder", kind)),
            "init": init,
            "init_random": [] if stage["after"] else ["vision", "projector", "language"],
            "text": {
                "template": stage["template"],
                "tokenizer": str(root / "tokenizer"),
                "weight": stage["text_weight"],
            },
            "image_mode": "square",
            "data": {
                "sources": [sources[part] for part in stage["data"]],
                "packing": {"length": stage["length"], "images": stage["images"]},
                "batch": 32,
                "epochs": stage["epochs"],
                "seed": int(parts["seed"]),
                "cache": str(root / "cache"),
            },
            "freeze": {"trainable": [stage["trainable"]], "dtype": "float32", "autoencoder_dtype": "float32"},
            "lora": {"rank": stage["rank"]},
            "optimizer": {"algorithm": "muon", "learning_rate": stage["learning_rate"], "b2": 0.98},
            "reconstruction": {"kind": kind, "draws": stage["draws"], "remat": "none"},
            "step": {"dtype": "float32", "remat": "none"},
            "loop": {"log": 50, "save": 500, "keep": 1, "evaluate": stage["evaluate"]},
            "evaluation": {"sources": [sources["heldout"]], "count": 32, "rows": 32},
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
            "seed": int(parts["seed"]),
        }
    )
