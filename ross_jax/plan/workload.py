"""What a step is fed, where no data set is at hand to count it: the recipe's figures and stated assumptions."""

import dataclasses
from functools import partial
from pathlib import Path

import jax

from ross_jax.config import ConfigError
from ross_jax.data.batches import RowShape, empty_batch
from ross_jax.sharding import batch_sharding
from ross_jax.training.cached import compute, needs_pixels, spared_components
from ross_jax.training.recipe import RunConfig
from ross_jax.training.state import abstract_tree

EPOCHS = {"blip_laion_cc_sbu_558k": 558_128, "llava_v1_5_mix665k": 665_298, "cambrian737k": 737_000}
"""Conversations of the published data sets, by the name of their file."""
TEXT_TOKENS = {"plain": 35}
"""Mean tokens of text in a caption, by template; of a conversation `CONVERSATION_TOKENS`."""
CONVERSATION_TOKENS = 300
IMAGES = {"plain": 1.0}
MIXED_IMAGES = 0.94
"""Pictures per conversation: one per caption; of LLaVA-1.5's mix, 94 % of the conversations have one."""
FILLED = 0.95
"""Share of a packed row's positions that hold a token."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """A step's input.

    Attributes:
      rows: of the global batch.
      conversations, tokens, pictures: in them, on average; padding and empty slots not counted.
      epoch: conversations of an epoch; None if unknown.
      assumptions: one line for each figure that was not measured.
    """

    rows: int
    conversations: float
    tokens: float
    images: float
    epoch: int | None
    assumptions: list[str]


def assume(
    config: RunConfig,
    multiple: int,
    rows: int | None = None,
    tokens: float | None = None,
    images: float | None = None,
    epoch: int | None = None,
) -> Workload:
    """A step's input from a recipe.

    Args:
      multiple: what the rows must be a multiple of.
      rows: of the global batch; None: as many as the packing plan would have, from the figures below.
      tokens: mean of a conversation, pictures included; None: assumed.
      images: mean of a conversation; None: assumed.
      epoch: conversations; None: known from the name of the recipe's data, or unknown.

    Raises:
      ConfigError: rows that do not divide among the devices.
    """
    packing, template, image_tokens = config.data.packing, config.text.template, config.model.vision.num_tokens
    lines = []
    if not packing.images:
        images = 0.0
    if images is None:
        images = IMAGES.get(template, MIXED_IMAGES)
        lines.append(f"{images:g} pictures per conversation (--pictures)")
    if tokens is None:
        text = TEXT_TOKENS.get(template, CONVERSATION_TOKENS)
        tokens = images * image_tokens + text
        lines.append(f"{tokens:.0f} tokens per conversation: {text} of text and {image_tokens} per picture (--tokens)")
    per_row = min(FILLED * packing.length / tokens, packing.images / images if images else float("inf"))
    if packing.layout == "pad":
        per_row = 1.0
    lines.append(f"{per_row:.2f} conversations per row of {packing.length} tokens and {packing.images} pictures")
    if rows is None:
        rows = multiple * max(1, round(config.data.batch / per_row / multiple))
        lines.append(
            f"{rows} rows per step: for {config.data.batch} conversations, as a multiple of {multiple} (--rows)"
        )
    elif rows < 1 or rows % multiple:
        raise ConfigError(
            f"--rows={rows}: must be a multiple of {multiple}, the devices that share a batch times step.accumulate"
        )
    if epoch is None:
        known = [EPOCHS.get(Path(source.path).stem) for source in config.data.sources]
        epoch = sum(known) if all(known) else None
        lines.append(
            f"{epoch} conversations per epoch, as published (--epoch)"
            if epoch
            else "the data set's size is not known here: no hours (--epoch)"
        )
    conversations = rows * per_row
    return Workload(rows, conversations, conversations * tokens, conversations * images, epoch, lines)


def abstract_batch(
    config: RunConfig, mesh: jax.sharding.Mesh, rows: int, cached: tuple[str, ...] = ()
) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch of a step as shapes, rows split over the mesh.

    Args:
      cached: parts that the run reads from a cache, as `launch/cache.py` writes them by default.

    Raises:
      ConfigError: a part that the run has no use for.
    """
    vision, packing = config.model.vision, config.data.packing
    one = empty_batch(1, RowShape(packing.length, packing.images, vision.num_tokens, vision.image_size))
    if not needs_pixels(config, cached):
        del one["images"]
    tree = abstract_tree(config.model, config.freeze, mesh)
    params = {name: tree[name] for name in spared_components(config, cached)}
    side = vision.image_size
    images = jax.ShapeDtypeStruct((packing.images, side, side, 3), "uint8")
    made = jax.eval_shape(partial(compute, config, cached), params, images)
    for fields in made.values():
        one |= {name: jax.ShapeDtypeStruct((1, *array.shape), array.dtype) for name, array in fields.items()}
    sharding = batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((rows, *array.shape[1:]), array.dtype, sharding=sharding)
        for name, array in one.items()
    }
