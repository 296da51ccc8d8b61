"""Golden files: recorded inputs and outputs of the reference, and which of them have been used."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from ross_jax.config import UserError
from ross_jax.convert.sources import read_json
from ross_jax.data.conversation import IGNORE, IMAGE_ID


@dataclasses.dataclass
class Golden:
    """Recorded tensors by name.

    Attributes:
      facts: of `fixture.json` beside the file: what config.json does not record.
      gradient_norms: of `grad_norms.json`: foreign key -> L2 norm.
      inputs: names that were read as inputs.
    """

    tensors: dict[str, np.ndarray]
    facts: dict[str, Any]
    gradient_norms: dict[str, float]
    inputs: set[str] = dataclasses.field(default_factory=set)

    def take(self, name: str) -> np.ndarray:
        """An input; it counts as covered."""
        if name not in self.tensors:
            raise UserError(f"golden file: input {name!r} is missing, which other tensors of it need")
        self.inputs.add(name)
        return self.tensors[name]

    def has(self, prefix: str) -> bool:
        """Whether any tensor's name begins with `prefix`."""
        return any(name.startswith(prefix) for name in self.tensors)

    def children(self, prefix: str) -> list[str]:
        """Distinct next components of the names that begin with `prefix`."""
        names = [name.removeprefix(prefix).split("/")[0] for name in self.tensors if name.startswith(prefix)]
        return list(dict.fromkeys(names))


def read_golden(path: Path) -> Golden:
    """Reads a golden file and the facts beside it.

    Raises:
      UserError: no such file, or one that cannot be read.
    """
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # the library raises its own type, which it does not export
        raise UserError(f"{path}: not a safetensors file that can be read ({error})") from error
    beside = {name: path.parent / name for name in ("fixture.json", "grad_norms.json")}
    facts, norms = ({} if not file.is_file() else read_json(file) for file in beside.values())
    return Golden(tensors, facts, norms)


@dataclasses.dataclass(frozen=True)
class Merged:
    """A batch as the reference lays it out after pictures are spliced in.

    Attributes:
      tokens: ids, 0 at pictures and padding.
      labels: -100 at pictures and padding; not shifted.
      mask: 1 at valid positions.
      positions: counted over valid positions, 0 at padding.
      image_start: [batch, slots] first index of each picture, row length if none.
      image_rows: [batch, slots] which picture of the batch is meant.
      first, last: index of the first picture's first and last token in the unpadded row, -1 without one.
    """

    tokens: np.ndarray
    labels: np.ndarray
    mask: np.ndarray
    positions: np.ndarray
    image_start: np.ndarray
    image_rows: np.ndarray
    first: np.ndarray
    last: np.ndarray


def merge(
    input_ids: np.ndarray,
    labels: np.ndarray,
    attention_mask: np.ndarray,
    image_tokens: int,
    max_length: int,
    left: bool = False,
) -> Merged:
    """The reference's `prepare_inputs_labels_for_multimodal`, for ids instead of embeddings.

    Args:
      input_ids: [batch, text] with -200 where a picture goes.
      image_tokens: N.
      max_length: rows are cut to it after pictures are in.
      left: pad on the left.
    """
    rows, next_image = [], 0
    for ids, wanted, valid in zip(input_ids, labels, attention_mask, strict=True):
        ids, wanted = ids[valid != 0], wanted[valid != 0]
        row_ids, row_labels, starts, images = [], [], [], []
        for token, label in zip(ids.tolist(), wanted.tolist(), strict=True):
            if token == IMAGE_ID:
                starts.append(len(row_ids))
                images.append(next_image + len(images))
                row_ids += [0] * image_tokens
                row_labels += [IGNORE] * image_tokens
            else:
                row_ids.append(token)
                row_labels.append(label)
        # A row without pictures uses up the dummy picture that the data set gives it.
        next_image += max(len(images), 1)
        rows.append((row_ids[:max_length], row_labels[:max_length], starts, images or [next_image - 1]))
    length = max(len(ids) for ids, *_ in rows)
    slots = max(len(images) for *_, images in rows)
    batch = len(rows)
    tokens, mask, positions = (np.zeros((batch, length), np.int32) for _ in range(3))
    merged_labels = np.full((batch, length), IGNORE, np.int32)
    image_start = np.full((batch, slots), length, np.int32)
    image_rows = np.zeros((batch, slots), np.int32)
    first = np.array([starts[0] if starts else -1 for *_, starts, _ in rows], np.int32)
    for b, (ids, wanted, starts, images) in enumerate(rows):
        offset = length - len(ids) if left else 0
        here = slice(offset, offset + len(ids))
        tokens[b, here], merged_labels[b, here], mask[b, here] = ids, wanted, 1
        positions[b, here] = np.arange(len(ids))
        image_start[b, : len(starts)] = np.array(starts, np.int32) + offset
        image_rows[b, : len(images)] = images
    last = np.where(first < 0, -1, first + image_tokens - 1).astype(np.int32)
    return Merged(tokens, merged_labels, mask, positions, image_start, image_rows, first, last)
