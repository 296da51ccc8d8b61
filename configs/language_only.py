"""The language model of `configs/ross.py` alone, on text. Rows have the same length as there, but no image slots.

--config=configs/language_only.py:encoder=siglip,llm=qwen2_7b,stage=finetune

The packing plan leaves out conversations with images. Comparing step times with other recipes shows the cost of images.
"""

from ml_collections import ConfigDict

from configs import ross


def get_config(arguments: str | None = None) -> ConfigDict:
    """The recipe as a ConfigDict that command-line flags can override."""
    config = ross.get_config(",".join(filter(None, [arguments, "kind=none"])))
    config.data.packing.images = 0
    config.freeze.trainable = ("language/.*",)
    config.init_random = ("vision", "projector")
    return config
