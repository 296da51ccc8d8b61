"""Real colour photographs that need no download: files in the wheels of scikit-image and scikit-learn.

The files are read where pip installed them. Neither package is imported.
"""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from ross_jax.config import UserError

Split = Literal["train", "heldout"]


@dataclasses.dataclass(frozen=True)
class Photograph:
    """A photograph in an installed package.

    Attributes:
      package: import name of the package.
      file: path inside the package.
      split: the part of the data set that all of the photograph's crops belong to.
    """

    package: str
    file: str
    split: Split

    @property
    def path(self) -> Path:
        """Location of the file.

        Raises:
          UserError: the package is not installed, or does not have the file.
        """
        spec = importlib.util.find_spec(self.package)
        folders = list(spec.submodule_search_locations or ()) if spec else []
        for folder in folders:
            if (Path(folder) / self.file).is_file():
                return Path(folder) / self.file
        reason = f"has no {self.file} in this version" if folders else "is not installed"
        raise UserError(f"the demo's photographs: {self.package} {reason}; run `pip install -e '.[demo]'`")


PHOTOGRAPHS = {
    "astronaut": Photograph("skimage", "data/astronaut.png", "train"),
    "cat": Photograph("skimage", "data/chelsea.png", "train"),
    "flower": Photograph("sklearn", "datasets/images/flower.jpg", "train"),
    "galaxies": Photograph("skimage", "data/hubble_deep_field.jpg", "train"),
    "motorcycle_left": Photograph("skimage", "data/motorcycle_left.png", "train"),
    "motorcycle_right": Photograph("skimage", "data/motorcycle_right.png", "train"),
    "retina": Photograph("skimage", "data/retina.jpg", "train"),
    "rocket": Photograph("skimage", "data/rocket.jpg", "train"),
    "tissue": Photograph("skimage", "data/ihc.png", "train"),
    "coffee": Photograph("skimage", "data/coffee.png", "heldout"),
    "pagoda": Photograph("sklearn", "datasets/images/china.jpg", "heldout"),
}
"""Photographs by name. Both pictures of the motorcycle's stereo pair show one scene, so both are for training."""


def load_photographs(split: Split) -> dict[str, np.ndarray]:
    """Photographs of one part: name -> uint8 [height, width, 3], RGB.

    Raises:
      UserError: the `demo` extra is not installed.
    """
    chosen = {name: photo.path for name, photo in PHOTOGRAPHS.items() if photo.split == split}
    return {name: np.asarray(Image.open(path).convert("RGB")) for name, path in chosen.items()}
