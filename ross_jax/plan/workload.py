"""The input of a planned step. No data set is opened: sizes come from the recipe and from stated assumptions."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import jax

from ross_jax.config import ConfigError, Count, Range, Size
from ross_jax.data.batches import RowShape, empty_batch
from ross_jax.sharding import batch_sharding
from ross_jax.training.cached import compute, needs_pixels, spared_components
from ross_jax.training.recipe import RunConfig

EPOCHS = {"blip_laion_cc_sbu_558k": 558_128, "llava_v1_5_mix665k": 665_298, "cambrian737k": 737_000}
"""Published data sets: name of their file -> conversations."""
TEXT_TOKENS = {"plain": 35}
"""Template -> mean tokens of text in a conversation. `plain` is the template of captions."""
CONVERSATION_TOKENS = 300
"""Mean tokens of text in a conversation of every other template."""
IMAGES = {"plain": 1.0}
"""Template -> mean images of a conversation."""
MIXED_IMAGES = 0.94
"""Mean images of a conversation of every other template: the share of LLaVA-1.5's mix that has an image."""
FILLED = 0.95
"""Share of a packed row's positions that hold a token."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What is planned, beside recipe and topology.

    Attributes:
      recipe: the recipe's name in reports.
      objective: `train` plans a training step, `generate` prefill and decoding.
      rows: rows of a global batch. None: as many as the packing plan would have, or one prompt per replica.
      tokens: mean tokens of a conversation, images included. None: assumed.
      images: mean images of a conversation. None: assumed.
      epoch: conversations of an epoch. None: known from the name of the recipe's data, or unknown.
      cached: parts that the run reads from a cache: `targets`, `features`.
      prompt: tokens of a prompt, with `generate`.
      new_tokens: tokens that are generated for each prompt, with `generate`.
      dump: folder to write the optimised HLO to.
    """

    recipe: str
    objective: Literal["train", "generate"] = "train"
    rows: Size | None = None
    tokens: Annotated[float, Range(1.0, 2.0**20)] | None = None
    images: Annotated[float, Range(0.0, 4096.0)] | None = None
    epoch: Count | None = None
    cached: tuple[str, ...] = ()
    prompt: Size = 1024
    new_tokens: Size = 256
    dump: Path | None = None


@dataclasses.dataclass(frozen=True)
class Workload:
    """A step's input.

    Attributes:
      rows: rows of the global batch.
      conversations, tokens, images: mean number in a batch; padding and empty slots do not count.
      epoch: conversations of an epoch; None if unknown.
      assumptions: one line for each figure that was not measured.
    """

    rows: int
    conversations: float
    tokens: float
    images: float
    epoch: int | None
    assumptions: list[str]


def assume_batch(config: RunConfig, options: Options, multiple: int) -> Workload:
    """The batch of a training step.

    Args:
      multiple: the number of rows must be a multiple of this.

    Raises:
      ConfigError: rows that do not divide among the devices.
    """
    packing, template, image_tokens = config.data.packing, config.text.template, config.model.vision.num_tokens
    images, tokens, rows = options.images, options.tokens, options.rows
    lines = []
    if not packing.images:
        images = 0.0
    if images is None:
        images = IMAGES.get(template, MIXED_IMAGES)
        lines.append(f"{images:g} images per conversation (--images)")
    if tokens is None:
        text = TEXT_TOKENS.get(template, CONVERSATION_TOKENS)
        tokens = images * image_tokens + text
        lines.append(f"{tokens:.0f} tokens per conversation: {text} of text and {image_tokens} per image (--tokens)")
    per_row = min(FILLED * packing.length / tokens, packing.images / images if images else float("inf"))
    if packing.layout == "pad":
        per_row = 1.0
    lines.append(f"{per_row:.2f} conversations per row of {packing.length} tokens and {packing.images} images")
    if rows is None:
        rows = multiple * max(1, round(config.data.batch / per_row / multiple))
        lines.append(
            f"{rows} rows per step: for {config.data.batch} conversations, as a multiple of {multiple} (--rows)"
        )
    elif rows < 1 or rows % multiple:
        raise ConfigError(
            f"--rows={rows}: must be a multiple of {multiple}, the devices that share a batch times step.accumulate"
        )
    epoch = options.epoch or _published_epoch(config)
    if options.epoch is None:
        known = f"{epoch} conversations per epoch, as published (--epoch)"
        lines.append(known if epoch else "the data set's size is not known here: no hours (--epoch)")
    conversations = rows * per_row
    return Workload(rows, conversations, conversations * tokens, conversations * images, epoch, lines)


def _published_epoch(config: RunConfig) -> int | None:
    known = [EPOCHS.get(Path(source.path).stem) for source in config.data.sources]
    return sum(known) if all(known) else None


def assume_prompts(config: RunConfig, options: Options, replicas: int) -> Workload:
    """The prompts of a generation, each with one image.

    Args:
      replicas: devices that share the prompts.

    Raises:
      ConfigError: prompts that do not divide among the devices, or that are shorter than an image.
    """
    rows, prompt = options.rows or replicas, options.prompt
    if rows % replicas:
        raise ConfigError(f"--rows={rows}: must be a multiple of {replicas}, the devices that share a batch")
    if config.model.vision.num_tokens > prompt:
        raise ConfigError(f"--prompt={prompt}: an image alone has {config.model.vision.num_tokens} tokens")
    lines = [
        f"{rows} prompts (--rows) of {prompt} tokens with an image (--prompt)",
        f"{options.new_tokens} new tokens for each prompt (--new_tokens)",
    ]
    return Workload(rows, float(rows), float(rows * prompt), float(rows), None, lines)


def abstract_batch(
    config: RunConfig, mesh: jax.sharding.Mesh, rows: int, cached: tuple[str, ...] = ()
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a training step's batch, its rows split over the mesh.

    Args:
      cached: parts that the run reads from a cache, as `launch/cache.py` writes them by default.

    Raises:
      ConfigError: a part that the run has no use for.
    """
    vision, packing = config.model.vision, config.data.packing
    one = empty_batch(1, RowShape(packing.length, packing.images, vision.num_tokens, vision.image_size))
    if not needs_pixels(config, cached):
        del one["images"]
    tree = config.abstract_tree(mesh)
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
