r"""A finished Ross whose denoiser alone is trained further, on images alone, to show what its visual outputs hold:

  --config=configs/imagenet_denoiser.py:encoder=siglip,llm=qwen2_7b,root=/data/imagenet \
      --config.init="('runs/ross-7b',)" --config.text.tokenizer=runs/ross-7b/files/language

  encoder, llm   as in `configs/ross.py`; those of the model
  root           a folder with `train/` and `val/`, whose pictures may lie in folders below. Without it: TFDS's
                 `imagenet2012`, prepared by you (`tfds build imagenet2012 --file_format=array_record`), from
                 TFDS_DATA_DIR if that is set

Each picture stands behind an empty question, as in `launch/reconstruct.py`; class names are not read. No text loss, no
logits, and no gradient beyond the denoiser. Pictures of the validation split are reconstructed every
`config.loop.evaluate` steps. Any other pictures: set `config.data.sources` and `config.evaluation.sources`.

Five epochs of ImageNet-1K are the paper's. The other hyper-parameters are ours: the denoiser's learning rate of
stage 1, and its batch.
"""

from ml_collections import ConfigDict

from configs import ross
from ross_jax.config import to_dict
from ross_jax.training.recipe import complete, parse_parts

DEFAULTS = {"encoder": "siglip", "llm": "qwen2_7b", "root": ""}
PROMPT = 64
"""Tokens left for the template's text before an image; the longest, Vicuna's, takes some 40."""


def sources(root: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Sources of training and of evaluation."""
    if not root:
        splits = ({"path": "imagenet2012", "kind": "tfds", "split": split} for split in ("train", "validation"))
    else:
        splits = ({"path": f"{root}/{folder}", "kind": "images"} for folder in ("train", "val"))
    train, heldout = splits
    return [train], [heldout]


def get_config(arguments: str | None = None) -> ConfigDict:
    """The recipe as a ConfigDict that command-line flags can override."""
    parts = parse_parts(arguments, DEFAULTS, {"encoder": ross.ENCODERS, "llm": ross.LLMS})
    model = ross.model_config(parts["encoder"], parts["llm"])
    _, template = ross.LLMS[parts["llm"]]
    train, heldout = sources(parts["root"])
    # One image per row, in whole blocks of 128 tokens.
    length = -(-(model.vision.num_tokens + PROMPT) // 128) * 128
    return complete(
        {
            "model": to_dict(model),
            "init": [],
            "text": {"template": template, "tokenizer": "tokenizer", "weight": 0.0},
            "image_mode": "pad",
            "data": {
                "sources": train,
                "packing": {"length": length, "images": 1, "layout": "pad"},
                "batch": 256,
                "epochs": 5,
                "cache": "cache",
            },
            "freeze": {"trainable": [r"denoiser/.*"], "autoencoder_dtype": "bfloat16"},
            "optimizer": {"learning_rate": 1e-4, "warmup_ratio": 0.03, "weight_decay": 0.0},
            "step": {"dtype": "bfloat16", "remat": "full"},
            "loop": {"log": 50, "save": 1000, "evaluate": 1000},
            "evaluation": {"sources": heldout},
            "mesh": {"data": -1, "fsdp": -1, "tensor": 1},
            "seed": 0,
        }
    )
