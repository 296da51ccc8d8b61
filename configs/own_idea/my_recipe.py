"""A recipe that uses `my_idea.py`: --config=configs/own_idea/my_recipe.py:idea=objective,tokenizer=DIR

idea        objective (colours of patches) | denoiser
tokenizer   folder of a tokenizer with the token <|im_end|>
"""

import dataclasses

import my_idea  # registers what it has

from ross_jax.config import to_dict
from ross_jax.models.autoencoder import AutoencoderConfig
from ross_jax.models.language import LanguageConfig
from ross_jax.models.projector import ProjectorConfig
from ross_jax.models.ross import RossConfig
from ross_jax.objectives.reconstruction import add_heads
from ross_jax.training.recipe import complete, parse_parts

IDEAS = {"objective": "patch_colour", "denoiser": "denoise"}
MODEL = RossConfig(
    vision=my_idea.PatchConfig("patches", 28, 7, 32, 32, 1, 1, "gelu", 1e-6, select_layer=-1),
    projector=ProjectorConfig("mlp", 32, 64),
    language=LanguageConfig(512, 64, 128, 2, 8, 4, 8, 1e4, 1e-6),
)


def get_config(arguments=None):
    parts = parse_parts(arguments, {"idea": "objective", "tokenizer": "tokenizer"}, {"idea": IDEAS})
    model = MODEL
    if parts["idea"] == "denoiser":
        latents = AutoencoderConfig((8, 8, 8), 1, 4, 4, 0.5, 0.1, (False,) * 3, (False,) * 3, False)
        model = dataclasses.replace(model, autoencoder=latents)
    denoiser = {"block": "mean", "width": 32, "num_heads": 4}
    model = add_heads(model, IDEAS[parts["idea"]], denoiser=denoiser, regressor={"width": 32})
    return complete(
        {
            "model": to_dict(model),
            "init_random": ["vision", "projector", "language", "autoencoder"],
            "text": {"template": "qwen_2", "tokenizer": parts["tokenizer"]},
            "data": {
                "sources": [{"kind": "colours", "path": "colours", "count": 16}],
                "packing": {"length": 256, "images": 1},
                "batch": 4,
            },
            "freeze": {"trainable": [".*"]},
            "optimizer": {"learning_rate": 1e-3},
            "reconstruction": {"kind": IDEAS[parts["idea"]]},
            "step": {"dtype": "float32", "remat": "none"},
            "loop": {"log": 1},
        }
    )
