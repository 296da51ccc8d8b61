"""A PyTorch DataLoader that reads images with the same transforms. The module needs the extra `parity`."""

import io
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler

from ross_jax.data.images import ImageConfig
from ross_jax.data.samples import LazyImage

_FOREVER = 2**40


class Images(Dataset):
    """Images as uint8[height, width, 3], decoded by Pillow and resized as a recipe says."""

    def __init__(self, images: Sequence[LazyImage], config: ImageConfig):
        self._images, self._config = images, config

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(io.BytesIO(self._images[index].read())) as image:
            return torch.from_numpy(np.array(transform(image.convert("RGB"), self._config)))


def transform(image: Image.Image, config: ImageConfig) -> Image.Image:
    """A square RGB image, as LLaVA's `expand2square` and the encoder's processor make it."""
    if config.mode == "pad" and image.width != image.height:
        side = max(image.size)
        square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in config.mean))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    edge = config.shortest_edge or (config.size if config.mode == "crop" else None)
    if edge is None:
        return image.resize((config.size, config.size), config.resample)
    image = image.resize([edge * length // min(image.size) for length in image.size], config.resample)
    left, top = (image.width - config.size) // 2, (image.height - config.size) // 2
    return image.crop((left, top, left + config.size, top + config.size))


class Loader:
    """Endless batches of images in random order.

    Args:
      batch: images per batch.
      workers: worker processes.
    """

    def __init__(self, images: Sequence[LazyImage], config: ImageConfig, batch: int, workers: int):
        dataset = Images(images, config)
        sampler = RandomSampler(dataset, replacement=True, num_samples=_FOREVER)
        self._batches = iter(
            DataLoader(dataset, batch, sampler=sampler, num_workers=workers, multiprocessing_context="fork")
        )

    def __iter__(self) -> Iterator[int]:
        """Number of images of each batch."""
        return (len(batch) for batch in self._batches)
