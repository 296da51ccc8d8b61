"""Reconstructive Visual Instruction Tuning (Ross, ICLR 2025) in JAX/Flax.

    import ross_jax

    model = ross_jax.load("runs/demo/denoise/seed0/finetune")
    print(model.ask("photo.jpg", "How many marks?"))

Names are imported when they are first used, so that `import ross_jax` is quick and leaves JAX alone.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ross_jax.api import export_model as export_model
    from ross_jax.api import import_model as import_model
    from ross_jax.api import train as train
    from ross_jax.command_line import load_recipe as load_recipe
    from ross_jax.config import ConfigError as ConfigError
    from ross_jax.config import UserError as UserError
    from ross_jax.config import from_dict as from_dict
    from ross_jax.config import to_dict as to_dict
    from ross_jax.data.images import ImageConfig as ImageConfig
    from ross_jax.data.packing import PackingConfig as PackingConfig
    from ross_jax.data.pipeline import DataConfig as DataConfig
    from ross_jax.data.sources import SourceConfig as SourceConfig
    from ross_jax.inference.model import Model as Model
    from ross_jax.inference.model import load as load
    from ross_jax.inference.prompts import Request as Request
    from ross_jax.models.autoencoder import AutoencoderConfig as AutoencoderConfig
    from ross_jax.models.denoiser import DenoiserConfig as DenoiserConfig
    from ross_jax.models.language import LanguageConfig as LanguageConfig
    from ross_jax.models.projector import ProjectorConfig as ProjectorConfig
    from ross_jax.models.regressor import RegressorConfig as RegressorConfig
    from ross_jax.models.ross import RossConfig as RossConfig
    from ross_jax.models.tiny_autoencoder import TinyAutoencoderConfig as TinyAutoencoderConfig
    from ross_jax.models.vision import VisionConfig as VisionConfig
    from ross_jax.objectives.objective import Sampling as Sampling
    from ross_jax.objectives.reconstruction import ReconstructionConfig as ReconstructionConfig
    from ross_jax.sharding import MeshConfig as MeshConfig
    from ross_jax.training.loop import LoopConfig as LoopConfig
    from ross_jax.training.optimizer import OptimizerConfig as OptimizerConfig
    from ross_jax.training.recipe import EvaluationConfig as EvaluationConfig
    from ross_jax.training.recipe import RunConfig as RunConfig
    from ross_jax.training.recipe import TextConfig as TextConfig
    from ross_jax.training.state import FreezeConfig as FreezeConfig
    from ross_jax.training.step import StepConfig as StepConfig

__version__ = "0.1.0"


def _check_shapes(names: list[str]) -> None:
    """Compares annotated shapes of modules that are imported later with what comes. `1` means this package."""
    wanted = ["ross_jax" if name == "1" else name for name in names if name not in ("", "0")]
    if wanted:
        from jaxtyping import install_import_hook

        install_import_hook(wanted, "beartype.beartype")


_check_shapes(os.environ.get("ROSS_JAX_CHECK_SHAPES", "").split(","))

_MODULES = {
    "api": ("export_model", "import_model", "train"),
    "command_line": ("load_recipe",),
    "config": ("ConfigError", "UserError", "from_dict", "to_dict"),
    "data.images": ("ImageConfig",),
    "data.packing": ("PackingConfig",),
    "data.pipeline": ("DataConfig",),
    "data.sources": ("SourceConfig",),
    "inference.model": ("Model", "load"),
    "inference.prompts": ("Request",),
    "models.autoencoder": ("AutoencoderConfig",),
    "models.denoiser": ("DenoiserConfig",),
    "models.language": ("LanguageConfig",),
    "models.projector": ("ProjectorConfig",),
    "models.regressor": ("RegressorConfig",),
    "models.ross": ("RossConfig",),
    "models.tiny_autoencoder": ("TinyAutoencoderConfig",),
    "models.vision": ("VisionConfig",),
    "objectives.objective": ("Sampling",),
    "objectives.reconstruction": ("ReconstructionConfig",),
    "sharding": ("MeshConfig",),
    "training.loop": ("LoopConfig",),
    "training.optimizer": ("OptimizerConfig",),
    "training.recipe": ("EvaluationConfig", "RunConfig", "TextConfig"),
    "training.state": ("FreezeConfig",),
    "training.step": ("StepConfig",),
}
"""Module -> its public names."""
_HOMES = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll] the imports above are what it reads


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
