"""Preparation of the demo: everything its runs start from, made once under a root folder.

data/          pictures and conversations
tokenizer/     tokenizer in Hugging Face's layout
autoencoder/   autoencoder in diffusers' layout
model/         the autoencoder imported as a model directory, which runs start from
"""

from collections.abc import Callable
from pathlib import Path

from ross_jax.convert.importing import plan_import, write
from ross_jax.demo.autoencoder import FitConfig, write_autoencoder
from ross_jax.demo.dataset import DatasetConfig, write_dataset
from ross_jax.demo.once import file_hash, make_once
from ross_jax.demo.tokenizer import write_tokenizer


def prepare(
    root: Path, dataset: DatasetConfig, fit: FitConfig, progress: Callable[[str], None] = lambda _: None
) -> None:
    """Makes each folder that does not exist yet.

    Args:
      root: folder that everything is written under.
      dataset: size of the data set.
      fit: size and training of the autoencoder.
      progress: called with a line before each part.

    Raises:
      UserError: the `demo` extra is not installed; a folder cannot be written.
    """
    progress(f"{root / 'data'}: pictures and conversations")
    write_dataset(root / "data", dataset)
    progress(f"{root / 'tokenizer'}: the words of these conversations")
    write_tokenizer(root / "tokenizer", root / "data")
    progress(f"{root / 'autoencoder'}: fitted to these pictures (about a minute)")
    write_autoencoder(root / "autoencoder", root / "data", fit, progress)
    weights = root / "autoencoder" / "diffusion_pytorch_model.safetensors"
    settings = {"content": file_hash(root / "autoencoder" / "config.json", weights)}
    make_once(root / "model", settings, lambda target: _import(root / "autoencoder", target))


def _import(origin: Path, target: Path) -> None:
    plan = plan_import([str(origin)])
    try:
        write(plan, target)
    finally:
        plan.close()
