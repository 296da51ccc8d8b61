"""Public files that the recipes of `configs/ross.py` need: where they come from, their size, their licence."""

import dataclasses
import fnmatch
from pathlib import Path

from ross_jax.config import UserError, nearest

WEIGHTS = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors", "pytorch_model*.bin")
"""Files of a model that are needed. Its `.bin` files are, where it has no safetensors, as Vicuna and CLIP."""


@dataclasses.dataclass(frozen=True)
class Item:
    """Something public that a run needs.

    Attributes:
      name: what it is.
      repo: hub id `owner/name`.
      folder: where it is kept, below the root.
      patterns: files of the repository that are needed. Those of `subfolder` are kept without it.
      gigabytes: approximate size; None where it is not known before the hub is asked.
      licence: as its page states it. Data also has the terms of the images' owners.
      kind: `model` or `dataset`, the kind of repository.
      gated: whether its page must be visited, and its terms accepted, before it can be downloaded.
    """

    name: str
    repo: str
    folder: str
    patterns: tuple[str, ...]
    gigabytes: float | None
    licence: str
    kind: str = "model"
    subfolder: str = ""
    gated: bool = False

    def wants(self, path: str) -> bool:
        """Whether a file of the repository is needed."""
        inside = not self.subfolder or path.startswith(f"{self.subfolder}/")
        name = path.removeprefix(f"{self.subfolder}/") if self.subfolder else path
        return inside and any(
            fnmatch.fnmatchcase(name, each) and name.count("/") == each.count("/") for each in self.patterns
        )

    def place(self, root: Path, path: str) -> Path:
        """Where a file of the repository is kept."""
        return root / self.folder / (path.removeprefix(f"{self.subfolder}/") if self.subfolder else path)


def _weights(part: str, repo: str, gigabytes: float, licence: str, **more: object) -> Item:
    return Item(part, repo, f"parts/{repo.rpartition('/')[2]}", WEIGHTS, gigabytes, licence, **more)  # pyright: ignore


ENCODERS = {
    "siglip": _weights("vision encoder", "google/siglip-so400m-patch14-384", 3.5, "Apache 2.0"),
    "siglip2": _weights("vision encoder", "google/siglip2-so400m-patch14-384", 4.5, "Apache 2.0"),
    "clip": _weights("vision encoder", "openai/clip-vit-large-patch14-336", 1.7, "MIT"),
}
_LLAMA3 = {"licence": "Llama 3 Community License", "gated": True}
_LLAMA31 = {"licence": "Llama 3.1 Community License", "gated": True}
_LLAMA32 = {"licence": "Llama 3.2 Community License", "gated": True}
LLMS = {
    "qwen2_7b": _weights("language model", "Qwen/Qwen2-7B-Instruct", 15.2, "Apache 2.0"),
    "vicuna_7b": _weights("language model", "lmsys/vicuna-7b-v1.5", 13.5, "Llama 2 Community License"),
    "vicuna_13b": _weights("language model", "lmsys/vicuna-13b-v1.5", 26.0, "Llama 2 Community License"),
    "llama3_8b": _weights("language model", "meta-llama/Meta-Llama-3-8B-Instruct", 16.1, **_LLAMA3),
    "qwen2_5_0_5b": _weights("language model", "Qwen/Qwen2.5-0.5B-Instruct", 1.0, "Apache 2.0"),
    "qwen2_5_1_5b": _weights("language model", "Qwen/Qwen2.5-1.5B-Instruct", 3.1, "Apache 2.0"),
    "qwen2_5_3b": _weights("language model", "Qwen/Qwen2.5-3B-Instruct", 6.2, "Qwen Research License"),
    "qwen2_5_7b": _weights("language model", "Qwen/Qwen2.5-7B-Instruct", 15.2, "Apache 2.0"),
    "qwen3_0_6b": _weights("language model", "Qwen/Qwen3-0.6B", 1.5, "Apache 2.0"),
    "qwen3_1_7b": _weights("language model", "Qwen/Qwen3-1.7B", 4.1, "Apache 2.0"),
    "qwen3_4b": _weights("language model", "Qwen/Qwen3-4B", 8.1, "Apache 2.0"),
    "qwen3_8b": _weights("language model", "Qwen/Qwen3-8B", 16.4, "Apache 2.0"),
    "llama3_1_8b": _weights("language model", "meta-llama/Llama-3.1-8B-Instruct", 16.1, **_LLAMA31),
    "llama3_2_1b": _weights("language model", "meta-llama/Llama-3.2-1B-Instruct", 2.5, **_LLAMA32),
    "llama3_2_3b": _weights("language model", "meta-llama/Llama-3.2-3B-Instruct", 6.4, **_LLAMA32),
}
AUTOENCODER = Item(
    "autoencoder",
    "black-forest-labs/FLUX.1-dev",
    "parts/FLUX.1-dev-vae",
    ("config.json", "*.safetensors"),
    0.2,
    "FLUX.1 [dev] Non-Commercial License",
    subfolder="vae",
    gated=True,
)


def _data(name: str, repo: str, file: str, gigabytes: float | None, licence: str) -> Item:
    return Item(name, repo, f"data/{repo.rpartition('/')[2]}", (file,), gigabytes, licence, "dataset")


_PRETRAIN = ("liuhaotian/LLaVA-Pretrain", "that of CC-3M, and of BLIP for its captions")
_CAMBRIAN = ("nyu-visionx/Cambrian-10M", "Apache 2.0")
_ARCHIVES = {
    "coco": 19.0,
    "gqa": 20.0,
    "ocr_vqa": 3.2,
    "textvqa": 7.0,
    "vg": 15.0,
    "ai2d": None,
    "chartqa": 0.7,
    "docvqa": None,
    "dvqa": None,
}
"""Archive of Cambrian-10M that its mix of 737 thousand conversations names -> gigabytes."""
DATA = {
    "pretrain": (
        _data("conversations", _PRETRAIN[0], "blip_laion_cc_sbu_558k.json", 0.2, _PRETRAIN[1]),
        _data("images", _PRETRAIN[0], "images.zip", 27.0, _PRETRAIN[1]),
    ),
    "finetune": (
        _data("conversations", _CAMBRIAN[0], "jsons/Cambrian737k.jsonl", 1.0, _CAMBRIAN[1]),
        *(
            _data(f"images of {name}", _CAMBRIAN[0], f"{name}.tar.gz", size, "that of its source")
            for name, size in _ARCHIVES.items()
        ),
    ),
}
"""Stage -> its conversations, and the archives of their images."""


def items(stage: str, encoder: str, llm: str) -> list[Item]:
    """Everything that a stage needs, weights first.

    Raises:
      UserError: no such stage, encoder or language model.
    """
    for flag, value, table in (("--stage", stage, DATA), ("--encoder", encoder, ENCODERS), ("--llm", llm, LLMS)):
        if value not in table:
            raise UserError(f"{flag}={value}: unknown{nearest(value, table)}; one of {list(table)}")
    return [ENCODERS[encoder], LLMS[llm], AUTOENCODER, *DATA[stage]]
