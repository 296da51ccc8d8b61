r"""Trains only the denoiser of a finished Ross, on images without text, to show what the visual outputs contain:

  --config=configs/imagenet_denoiser.py:encoder=siglip,llm=qwen2_7b,root=/data/imagenet \
      --config.init="('runs/ross-7b',)" --config.text.tokenizer=runs/ross-7b/files/language

  encoder, llm   components of the finished Ross, named as in `configs/ross.py`
  root           folder with `train/` and `val/`, with images at any depth. Without root: TFDS's `imagenet2012`, which
                 you prepare (`tfds build imagenet2012 --file_format=array_record`), read from TFDS_DATA_DIR if set

Each image stands behind an empty question, as in `launch/reconstruct.py`; class names are not read. There is no text
loss, there are no logits, and no component but the denoiser has gradients. Images of the validation split are
reconstructed every `config.loop.evaluate` steps. To use other images, set `config.data.sources` and
`config.evaluation.sources`.

Five epochs of ImageNet-1K are the paper's setting. The other hyper-parameters are this project's choice: learning rate
and batch size are the denoiser's from stage 1.
"""

from ml_collections import ConfigDict

from configs import ross
from ross_jax.config import to_dict
from ross_jax.training.recipe import complete, parse_parts

DEFAULTS = {"encoder": "siglip", "llm": "qwen2_7b", "root": ""}
PROMPT = 64
"""Number of tokens reserved for the template's text before an image. The longest text, Vicuna's, has about 40."""


def sources(root: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Data sources of training, and data sources of evaluation."""
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
