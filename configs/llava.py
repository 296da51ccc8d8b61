"""The LLaVA-1.5 baseline: a recipe with the components of `configs/ross.py`, without reconstruction.

--config=configs/llava.py:encoder=clip,llm=vicuna_7b,stage=finetune
"""

from ml_collections import ConfigDict

from configs import ross


def get_config(arguments: str | None = None) -> ConfigDict:
    """The recipe as a ConfigDict that command-line flags can override."""
    return ross.get_config(",".join(filter(None, [arguments, "kind=none"])))
