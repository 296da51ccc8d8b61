"""What a trained demo model knows about photographs that training never saw: its answers, and its reconstructions."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from ross_jax.data.images import decode, preprocess
from ross_jax.demo.scoring import Accuracy, score_answers
from ross_jax.evaluation.images import is_nearest, psnr, to_uint8
from ross_jax.inference.answer import answer
from ross_jax.inference.model import Model
from ross_jax.inference.reconstruct import autoencode, outputs_of_images, target_images
from ross_jax.objectives.reconstruction import reconstructor

LONGEST_ANSWER = 6
"""Tokens; the longest right one has three, its stop token included."""
ROWS = 60
IMAGES = 32
"""Held-out pictures that are reconstructed."""


def read_heldout(data: Path) -> list[dict[str, Any]]:
    """The held-out questions of a data set."""
    return json.loads((data / "heldout.json").read_text())


def read_images(model: Model, data: Path, records: list[dict[str, Any]]) -> list[UInt8[np.ndarray, "side side 3"]]:
    """Each record's picture, resized for the model."""
    names = [record["image"] for record in records]
    made = {
        name: preprocess(decode((data / "images" / name).read_bytes(), name), model.images, name) for name in set(names)
    }
    return [made[name] for name in names]


def answer_heldout(model: Model, data: Path) -> list[Accuracy]:
    """Accuracy of each question type on the held-out questions."""
    records = read_heldout(data)
    prompts = [{**record, "conversations": record["conversations"][:1]} for record in records]
    images = [(image,) for image in read_images(model, data, records)]
    predictions = answer(model, prompts, images, LONGEST_ANSWER, ROWS)
    return score_answers([r["type"] for r in records], [r["answer"] for r in records], predictions)


@dataclasses.dataclass(frozen=True)
class Reconstructions:
    """Held-out pictures and what became of them, uint8 [items, side, side, 3].

    Attributes:
      originals: at the autoencoder's size.
      autoencoder: its own reconstruction, the ceiling; None for a model without one.
      own: from the picture's visual outputs.
      other: from those of the picture before it in the list.
    """

    originals: UInt8[np.ndarray, "items side side 3"]
    autoencoder: UInt8[np.ndarray, "items side side 3"] | None
    own: UInt8[np.ndarray, "items side side 3"]
    other: UInt8[np.ndarray, "items side side 3"]

    def scores(self) -> dict[str, float]:
        """Mean PSNR of each in dB, and how often a reconstruction is nearest to its own picture."""
        kinds = {"autoencoder": self.autoencoder, "own": self.own, "other": self.other}
        made = {name: images for name, images in kinds.items() if images is not None}
        values = {f"psnr_{name}": float(psnr(images, self.originals).mean()) for name, images in made.items()}
        return {**values, "nearest": float(is_nearest(self.own, self.originals).mean())}


def reconstruct_heldout(model: Model, data: Path, count: int = IMAGES, seed: int = 0) -> Reconstructions:
    """Reconstructs pictures spread evenly over the held-out ones.

    Args:
      model: with all that its pictures are made by.
      seed: of the noise; each picture's noise is the same for its own and for the other's visual outputs.
    """
    records = list({record["image"]: record for record in read_heldout(data)}.values())
    records = [records[i * len(records) // count] for i in range(min(count, len(records)))]
    images = read_images(model, data, records)
    outputs = jnp.asarray(outputs_of_images(model, images, ROWS))
    objective = reconstructor(model.config)
    make = jax.jit(lambda params, given, keys: objective.reconstruct(params, params, given, keys).pixels)
    keys = jax.random.split(jax.random.key(seed), len(images))
    own, other = (make(model.params, given, keys) for given in (outputs, jnp.roll(outputs, 1, axis=0)))
    originals = target_images(model.config, np.stack(images))
    ceiling = None
    if model.config.autoencoder is not None:
        ceiling = to_uint8(jax.jit(partial(autoencode, model.config))(model.params, np.stack(images)))
    return Reconstructions(to_uint8(originals), ceiling, to_uint8(own), to_uint8(other))
