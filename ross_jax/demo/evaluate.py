"""Evaluation of a trained demo model on held-out photographs: answers to questions, and reconstructions."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from ross_jax.demo.scoring import Accuracy, score_answers
from ross_jax.evaluation.images import is_nearest, psnr, to_uint8
from ross_jax.inference.model import Model
from ross_jax.inference.prompts import Request, read_images
from ross_jax.inference.reconstruct import autoencode, target_images
from ross_jax.objectives.reconstruction import reconstructor

LONGEST_ANSWER = 6
"""Tokens to generate. The longest correct answer takes three, stop token included."""
ROWS = 60
"""Pictures computed at once."""
IMAGES = 32
"""Number of held-out pictures to reconstruct."""


def read_heldout(data: Path) -> list[dict[str, Any]]:
    """Records of a data set's held-out questions."""
    return json.loads((data / "heldout.json").read_text())


def answer_heldout(model: Model, data: Path) -> list[Accuracy]:
    """Accuracy of each question type on the held-out questions."""
    records = read_heldout(data)
    requests = [
        Request(data / "images" / record["image"], record["conversations"][0]["value"], max_new_tokens=LONGEST_ANSWER)
        for record in records
    ]
    predictions = model.ask_many(requests, ROWS)
    return score_answers([r["type"] for r in records], [r["answer"] for r in records], predictions)


@dataclasses.dataclass(frozen=True)
class Reconstructions:
    """Held-out pictures and their reconstructions, uint8 [items, side, side, 3].

    Attributes:
      originals: the pictures, at the size of reconstructions.
      autoencoder: encoded and decoded by the autoencoder, an upper bound; None for a model without autoencoder.
      own: reconstructed from each picture's visual outputs.
      other: reconstructed from the visual outputs of the previous picture in the list, a lower bound.
    """

    originals: UInt8[np.ndarray, "items side side 3"]
    autoencoder: UInt8[np.ndarray, "items side side 3"] | None
    own: UInt8[np.ndarray, "items side side 3"]
    other: UInt8[np.ndarray, "items side side 3"]

    def scores(self) -> dict[str, float]:
        """`psnr_NAME`: mean PSNR in dB of each attribute; `nearest`: share of `own` nearest to its original."""
        kinds = {"autoencoder": self.autoencoder, "own": self.own, "other": self.other}
        made = {name: images for name, images in kinds.items() if images is not None}
        values = {f"psnr_{name}": float(psnr(images, self.originals).mean()) for name, images in made.items()}
        return {**values, "nearest": float(is_nearest(self.own, self.originals).mean())}


def reconstruct_heldout(model: Model, data: Path, count: int = IMAGES, seed: int = 0) -> Reconstructions:
    """Reconstructs `count` held-out pictures, spread evenly over all of them.

    Args:
      model: a model with the components that reconstruct, loaded in float32.
      data: folder of the data set.
      count: number of pictures.
      seed: seed of the noise. `own` and `other` start from the same noise.
    """
    records = list({record["image"]: record for record in read_heldout(data)}.values())
    records = [records[i * len(records) // count] for i in range(min(count, len(records)))]
    images = read_images([data / "images" / record["image"] for record in records], model.image_config)
    outputs = jnp.asarray(model.visual_outputs(images, ROWS))
    objective = reconstructor(model.config)
    make = jax.jit(lambda params, given, keys: objective.reconstruct(params, params, given, keys).pixels)
    keys = jax.random.split(jax.random.key(seed), len(images))
    own, other = (make(model.params, given, keys) for given in (outputs, jnp.roll(outputs, 1, axis=0)))
    originals = target_images(model.config, np.stack(images))
    ceiling = None
    if model.config.autoencoder is not None:
        ceiling = to_uint8(jax.jit(partial(autoencode, model.config))(model.params, np.stack(images)))
    return Reconstructions(to_uint8(originals), ceiling, to_uint8(own), to_uint8(other))
