"""A PyTorch DataLoader that reads images with the same transforms. The module needs the extra `parity`."""

import io
from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler

from ross_jax.data.images import ImageConfig, preprocess
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
            return torch.from_numpy(preprocess(image.convert("RGB"), self._config).copy())


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
