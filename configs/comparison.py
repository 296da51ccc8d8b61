"""Compares the kinds of reconstruction, with few labelled answers and many images.

  --config=configs/comparison.py:stage=arm,kind=denoise,seed=0,root=runs/comparison

  stage   base (all components learn from captions, without reconstruction; all arms of a seed start from its result)
          | arm (language model, projector and reconstruction head learn from few labels and many images)
  kind    reconstruction of an arm: none (LLaVA) | pixel | latent | latent2pixel | denoise (Ross)
  seed    seed of parameters, order and noise
  root    folder of data, tokenizer, autoencoder and runs

`python launch/compare.py` trains and scores all arms. The amounts of data were chosen by one criterion: a run
without reconstruction is better than chance, but worse than the demo with all its labels.
"""

from ml_collections import ConfigDict

from configs import demo
from ross_jax.config import to_dict
from ross_jax.demo.dataset import DatasetConfig
from ross_jax.models.ross import HEADS
from ross_jax.objectives.reconstruction import kinds
from ross_jax.storage import location
from ross_jax.training.recipe import complete

KINDS = kinds()
SEEDS = (0, 1, 2, 3, 4)
DATASET = DatasetConfig(pretrain=6000, finetune=1, heldout_per_type=360, labels_per_type=32, unlabelled=6000)
"""Captions for the base; 32 labels for each of 9 types of question (288 in all) and unlabelled images for the arms;
held-out questions."""
LABELS_REPEATED = 10
"""Times that a label is seen while each image is seen once."""
STAGES = {
    "base": {"template": "plain", "learning_rate": 3e-3, "epochs": 6, "length": 256, "images": 4},
    "arm": {"template": "qwen_2", "learning_rate": 1e-3, "epochs": 3, "length": 66, "images": 2},
}
DEFAULTS = {"stage": "arm", "kind": "denoise", "seed": "0", "root": "runs/comparison"}
CHOICES = {"stage": tuple(STAGES), "kind": KINDS}


def get_config(arguments: str | None = None) -> ConfigDict:
    """The recipe as a ConfigDict that command-line flags can override."""
    parts = demo.parse(arguments, DEFAULTS, CHOICES)
    root, seed = location(parts["root"]), int(parts["seed"])
    base = parts["stage"] == "base"
    kind, stage = "none" if base else parts["kind"], STAGES[parts["stage"]]
    init = [str(root / "model")] if demo.needs_autoencoder(kind) else []
    images = [str(root / "data" / "images")]
    if base:
        sources = [{"path": str(root / "data" / "pretrain.json"), "images": images}]
    else:
        init.append(str(root / "base" / f"seed{seed}" / "pretrain"))
        labels = {"path": str(root / "data" / "labels.json"), "images": images}
        sources = [labels] * LABELS_REPEATED + [{"path": str(root / "data" / "unlabelled"), "kind": "images"}]
    return complete(
        {
            "model": to_dict(demo.model_config(root / "autoencoder", kind)),
            "init": init,
            "init_random": ["vision", "projector", "language"] if base else [],
            "text": {"template": stage["template"], "tokenizer": str(root / "tokenizer")},
            "image_mode": "square",
            "data": {
                "sources": sources,
                "packing": {"length": stage["length"], "images": stage["images"]},
                "batch": 32,
                "epochs": stage["epochs"],
                "seed": seed,
                "cache": str(root / "cache"),
            },
            "freeze": {
                "trainable": [".*"] if base else [rf"(language|projector|{'|'.join(HEADS)})/.*"],
                "dtype": "float32",
                "autoencoder_dtype": "float32",
            },
            "optimizer": {"algorithm": "muon", "learning_rate": stage["learning_rate"], "b2": 0.98},
            "reconstruction": {"kind": kind, "draws": 2, "remat": "none"},
            "step": {"dtype": "float32", "remat": "none"},
            "loop": {"log": 50, "save": 500, "keep": 1},
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
            "seed": seed,
        }
    )
