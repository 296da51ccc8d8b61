"""Golden files: inputs and outputs recorded from the reference implementation."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from ross_jax.config import UserError
from ross_jax.convert.sources import read_json
from ross_jax.data.conversation import IGNORE, IMAGE_ID
from ross_jax.storage import StorageError, local_copy


@dataclasses.dataclass
class Golden:
    """Recorded tensors by name.

    Attributes:
      facts: contents of `fixture.json` beside the file: settings that config.json does not record.
      gradient_norms: contents of `grad_norms.json` beside the file: Hugging Face key -> L2 norm of the gradient.
      inputs: names of the tensors that were read as inputs.
    """

    tensors: dict[str, np.ndarray]
    facts: dict[str, Any]
    gradient_norms: dict[str, float]
    inputs: set[str] = dataclasses.field(default_factory=set)

    def take(self, name: str) -> np.ndarray:
        """Returns the input called `name`, and notes that it was read: inputs need no comparison.

        Raises:
          UserError: the file has no such tensor.
        """
        if name not in self.tensors:
            raise UserError(f"golden file: input {name!r} is missing, but other tensors of the file need it")
        self.inputs.add(name)
        return self.tensors[name]

    def has(self, prefix: str) -> bool:
        """Whether any tensor's name begins with `prefix`."""
        return any(name.startswith(prefix) for name in self.tensors)

    def children(self, prefix: str) -> list[str]:
        """Distinct path components that follow `prefix` in the tensors' names, in the file's order."""
        names = [name.removeprefix(prefix).split("/")[0] for name in self.tensors if name.startswith(prefix)]
        return list(dict.fromkeys(names))


def read_golden(path: Path) -> Golden:
    """Reads a golden file, and `fixture.json` and `grad_norms.json` beside it if they exist.

    Raises:
      UserError: the file does not exist or cannot be read.
    """
    try:
        with local_copy(path) as copy:
            tensors = load_file(copy)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except StorageError:
        raise
    except Exception as error:  # safetensors raises an exception type that it does not export
        raise UserError(f"{path}: not a safetensors file that can be read ({error})") from error
    beside = {name: path.parent / name for name in ("fixture.json", "grad_norms.json")}
    facts, norms = ({} if not file.is_file() else read_json(file) for file in beside.values())
    return Golden(tensors, facts, norms)


@dataclasses.dataclass(frozen=True)
class Merged:
    """A batch as the reference lays it out after images are inserted.

    Attributes:
      tokens: [batch, length] ids; 0 at images and padding.
      labels: [batch, length] ids, not shifted; -100 at images and padding.
      mask: [batch, length] 1 at valid positions, 0 at padding.
      positions: [batch, length] counted over valid positions; 0 at padding.
      image_start: [batch, slots] index of each image's first token; the row's length if the slot is empty.
      image_rows: [batch, slots] index of each image in the list of all images.
      first, last: [batch] index of the first image's first and last token in the unpadded row; -1 without an image.
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
      input_ids: [batch, text] with -200 at the place of each image.
      labels: [batch, text] ids, not shifted.
      attention_mask: [batch, text] 0 at padding.
      image_tokens: number of tokens of an image (N).
      max_length: rows are cut to this length after images are inserted.
      left: pads on the left instead of the right.
    """
    rows, next_image = [], 0
    for text_ids, text_labels, valid in zip(input_ids, labels, attention_mask, strict=True):
        text_ids, text_labels = text_ids[valid != 0], text_labels[valid != 0]
        row_ids, row_labels, starts, images = [], [], [], []
        for token, label in zip(text_ids.tolist(), text_labels.tolist(), strict=True):
            if token == IMAGE_ID:
                starts.append(len(row_ids))
                images.append(next_image + len(images))
                row_ids += [0] * image_tokens
                row_labels += [IGNORE] * image_tokens
            else:
                row_ids.append(token)
                row_labels.append(label)
        # The data set gives a dummy image to a row without images: the row uses one up.
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
    for b, (row_ids, row_labels, starts, images) in enumerate(rows):
        offset = length - len(row_ids) if left else 0
        filled = slice(offset, offset + len(row_ids))
        tokens[b, filled], merged_labels[b, filled], mask[b, filled] = row_ids, row_labels, 1
        positions[b, filled] = np.arange(len(row_ids))
        image_start[b, : len(starts)] = np.array(starts, np.int32) + offset
        image_rows[b, : len(images)] = images
    last = np.where(first < 0, -1, first + image_tokens - 1).astype(np.int32)
    return Merged(tokens, merged_labels, mask, positions, image_start, image_rows, first, last)
