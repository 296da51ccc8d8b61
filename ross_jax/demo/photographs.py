"""Real colour photographs, offline: those that the wheels of scikit-image and scikit-learn ship as files.

Neither package is imported; their files are read where pip put them.
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
      file: path inside it.
      split: the side of the train / held-out split that all of its crops are on.
    """

    package: str
    file: str
    split: Split

    @property
    def path(self) -> Path:
        """Where the file is.

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
"""By name. The two halves of the stereo pair show one scene, so they are on one side."""


def load_photographs(split: Split) -> dict[str, np.ndarray]:
    """The photographs of one side of the split: name -> uint8 RGB [height, width, 3].

    Raises:
      UserError: the `demo` extra is not installed.
    """
    chosen = {name: photo.path for name, photo in PHOTOGRAPHS.items() if photo.split == split}
    return {name: np.asarray(Image.open(path).convert("RGB")) for name, path in chosen.items()}
