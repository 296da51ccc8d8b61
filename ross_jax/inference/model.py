"""A model directory, made by the importer or by a training run, as everything that inference needs."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ross_jax import checkpoints
from ross_jax.config import UserError, from_dict
from ross_jax.data.images import ImageConfig, encoder_image_config
from ross_jax.data.tokenizer import load_tokenizer
from ross_jax.models.ross import RossConfig, abstract_params
from ross_jax.tree import flatten, unflatten

TEXT_COMPONENTS = ("vision", "projector", "language")
RECONSTRUCTION_COMPONENTS = ("denoiser", "regressor", "autoencoder")
"""What pictures are made by; which of them a model has depends on its kind of reconstruction."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A restored model.

    Attributes:
      config: of the components.
      params: those that were asked for.
      template: of its conversations; None if the directory does not say.
      images: how pictures are resized.
      condition_dropout: with which the denoiser was trained, as far as the directory says.
    """

    folder: Path
    config: RossConfig
    params: dict[str, Any]
    template: str | None
    images: ImageConfig
    condition_dropout: float = 0.0

    def choose_template(self, template: str | None = None) -> str:
        """`template`, or else the model's own.

        Raises:
          UserError: there is neither.
        """
        chosen = template or self.template
        if chosen is None:
            raise UserError(f"{self.folder}: does not say its conversation template; name one")
        return chosen

    def tokenizer(self) -> Any:
        """The tokenizer that lies in the directory.

        Raises:
          UserError: none does, or it cannot be read.
        """
        return load_tokenizer(self.folder / "files" / "language")


def load_model(
    folder: str | Path,
    components: tuple[str, ...] = TEXT_COMPONENTS,
    optional: tuple[str, ...] = (),
    dtype: str | None = None,
) -> Model:
    """Restores a model on the default device.

    Args:
      folder: a model directory or a run's directory, whose latest step counts.
      components: whose parameters are restored; the others stay on disk.
      optional: restored too, where the model has them.
      dtype: of the parameters; None: as they are stored.

    Raises:
      UserError: no model there, or one without such a component.
    """
    folder = Path(folder)
    manifest = checkpoints.read_manifest(folder)
    config = from_dict(RossConfig, manifest["config"], f"{folder}: config")
    missing = [name for name in components if getattr(config, name) is None]
    if missing:
        raise UserError(f"{folder}: this model has no {', '.join(missing)}")
    stored = flatten(checkpoints.model_abstract(folder))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        path: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype or stored[path].dtype), sharding=device)
        for path, leaf in flatten(abstract_params(config)).items()
        if path.split("/")[0] in components + optional
    }
    params = checkpoints.restore_model(folder, unflatten(wanted))
    mode = manifest.get("image_mode", "pad")
    images = encoder_image_config(
        config.vision.kind, config.vision.image_size, config.image_mean, config.image_std, mode
    )
    dropout = manifest.get("reconstruction", {}).get("condition_dropout", 0.0)
    return Model(folder, config, params, manifest.get("template"), images, dropout)
