"""The loss that training minimises: next-token cross entropy plus the reconstruction loss, over one batch.

    loss = text_weight * sum(cross entropies) / supervised tokens  +  weight * reduction(per-image losses)

Both losses divide by counts of the whole batch, so packing, micro-batches and devices change a loss only by rounding.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from ross_jax.config import ConfigError
from ross_jax.models.layers import RematPolicy, apply
from ross_jax.models.ross import Ross, RossConfig, normalise
from ross_jax.objectives.objective import Batch, Objective, Params, Taps
from ross_jax.objectives.reconstruction import ReconstructionConfig, make_objective
from ross_jax.objectives.text import IGNORE, gather_supervised, supervised_order, token_losses
from ross_jax.sharding import constrain
from ross_jax.tree import merge

NO_IMAGE = 0
"""The identity of empty image slots, which no image has."""


def real_images(batch: Batch) -> Bool[Array, "batch images"]:
    """True where a slot holds an image."""
    return batch["image_start"] < batch["tokens"].shape[1]


class Counts(NamedTuple):
    """Counts of a whole batch.

    Attributes:
      tokens: supervised tokens.
      images: images.
      items: image slots that the reduction counts.
    """

    tokens: Int[Array, ""]
    images: Float[Array, ""]
    items: Float[Array, ""]


class ImageMean(NamedTuple):
    """The mean of per-image losses over the images of a batch; 0 without any."""

    def counted(self, batch: Batch) -> Bool[Array, "batch images"]:
        """Slots whose losses are summed: those with an image."""
        return real_images(batch)

    def mean(self, summed: Float[Array, ""], counts: Counts) -> Float[Array, ""]:
        """The loss.

        Args:
          summed: sum of the counted losses of a batch or a micro-batch.
          counts: of the whole batch.
        """
        return summed / jnp.maximum(counts.images, 1.0)


class OfficialMean(NamedTuple):
    """The reference's mean: text-only rows count too, as soon as the batch has an image.

    `mean over rows * m / (m + 1e-6)` with m = draws x images. One conversation with at most one image in a row.

    Attributes:
      draws: noise levels of each image.
    """

    draws: int

    def counted(self, batch: Batch) -> Bool[Array, "batch images"]:
        """The only slot of each row that holds a conversation, with an image or without.

        Raises:
          ConfigError: rows have several slots, so they are not the reference's.
        """
        slots = batch["image_start"].shape[1]
        if slots != 1:
            raise ConfigError(
                "config.reconstruction.compat 'official' averages over rows of one conversation with one image slot, "
                f"and rows have {slots}; set config.data.packing.images to 1 and config.data.packing.layout to 'pad'"
            )
        return jnp.any(batch["segments"] != 0, axis=1, keepdims=True)

    def mean(self, summed: Float[Array, ""], counts: Counts) -> Float[Array, ""]:
        """The loss. Arguments as in `ImageMean`."""
        weight = self.draws * counts.images
        return summed / jnp.maximum(counts.items, 1.0) * (weight / (weight + 1e-6))


Reduction = ImageMean | OfficialMean
"""Turns per-image losses into the reconstruction loss: `mean(sum(losses where counted(batch)), counts)`."""


class Losses(NamedTuple):
    """Both losses of a batch; each is 0 where it is switched off.

    Attributes:
      sources: sums of each source, in the order of `SOURCE_SUMS`; None if the batch does not say its sources.
    """

    text: Float[Array, ""]
    reconstruction: Float[Array, ""]
    sources: Float[Array, "sources sums"] | None = None


SOURCE_SUMS = ("text", "tokens", "reconstruction", "images", "conversations")
"""Sums over a source: of cross entropies and of per-image losses; numbers of what they are sums over; conversations."""


@dataclasses.dataclass(frozen=True)
class Loss:
    """The loss of a run as a function of parameters and batch; `make_loss` composes it.

    Attributes:
      model: the module.
      objective: computes per-image losses. None: no reconstruction loss.
      reduction: turns per-image losses into the reconstruction loss.
      text_weight, weight: factors of the two losses. With a text weight of 0 no logits are computed.
      chunk: memory for logits, as in `next_token_loss`.
      supervised: most supervised positions of a row, if the packing plan has such a limit; no logits beyond it.
      sources: number of sources whose losses are summed apart; 0: none are.

    Low-rank updates with dropout draw their masks by place in the batch, unlike all other noise.
    """

    model: Ross
    objective: Objective | None
    reduction: Reduction
    text_weight: float = 1.0
    weight: float = 1.0
    chunk: int = 1024
    supervised: int | None = None
    sources: int = 0

    def counts(self, batch: Batch) -> Counts:
        """Counts of a whole batch, which sums are divided by."""
        tokens, images = jnp.sum(batch["targets"] != IGNORE), jnp.sum(real_images(batch).astype(jnp.float32))
        items = jnp.sum(self.reduction.counted(batch).astype(jnp.float32)) if self.objective else images
        return Counts(tokens, images, items)

    def zeros(self, batch: Batch) -> Losses:
        """Losses of no row, to which those of micro-batches are added."""
        sums = jnp.zeros((self.sources, len(SOURCE_SUMS))) if self._counts_sources(batch) else None
        return Losses(jnp.zeros(()), jnp.zeros(()), sums)

    def _counts_sources(self, batch: Batch) -> bool:
        return self.sources > 0 and "sources" in batch

    def weighted_sum(self, losses: Losses) -> Float[Array, ""]:
        """`text_weight * text + weight * reconstruction`."""
        reconstruction = self.weight * losses.reconstruction if self.objective else 0.0
        return self.text_weight * losses.text + reconstruction

    def __call__(
        self,
        params: Params,
        frozen: Params,
        batch: Batch,
        counts: Counts,
        key: Shaped[Array, ""],
        part: int | Int[Array, ""] = 0,
    ) -> tuple[Float[Array, ""], Losses]:
        """The loss and its two parts, of a batch or of a micro-batch.

        Args:
          params, frozen: the trained part of the parameters and the rest.
          counts: of the whole batch, also where `batch` is a micro-batch.
          key: of the step; an image's noise comes from the key and the image's identity.
          part: number of the micro-batch.
        """
        tree = merge(params, frozen)
        images = normalise(self.model.config, batch["images"]) if "images" in batch else None
        output = apply(
            self.model,
            tree,
            *(batch[name] for name in ("tokens", "positions", "segments")),
            images,
            batch["image_start"],
            features=batch.get("image_features"),
            taps=self.objective.taps if self.objective else (),
            rngs={"dropout": jax.random.fold_in(jax.random.fold_in(key, NO_IMAGE), part)} if self.model.dropout else {},
        )
        tokens = self._text(tree, output.hidden, batch)
        text = jnp.sum(tokens) / jnp.maximum(counts.tokens, 1)
        per_image, reconstruction = self._reconstruction(tree, frozen, output.taps, batch, counts, key)
        by_source = self._by_source(batch, *jax.lax.stop_gradient((tokens, per_image)))
        losses = Losses(text, reconstruction, by_source)
        return self.weighted_sum(losses), losses

    def _by_source(
        self, batch: Batch, tokens: Float[Array, "batch places"], per_image: Float[Array, "batch images"]
    ) -> Float[Array, "sources sums"] | None:
        """`SOURCE_SUMS` of each source.

        Args:
          tokens: cross entropies of the positions, or of the places of supervised ones.
          per_image: loss of each image slot.
        """
        if not self._counts_sources(batch):
            return None
        at, targets = batch["sources"], batch["targets"]
        starts = jnp.minimum(batch["image_start"], at.shape[1] - 1)
        of_image = jnp.where(real_images(batch), jnp.take_along_axis(at, starts, axis=1), -1)
        first = (batch["positions"] == 0) & (batch["segments"] != 0)
        places = at
        if self.supervised is not None and self.text_weight:
            places = jnp.take_along_axis(at, supervised_order(targets, self.supervised), axis=1)

        def sums(source: Int[Array, ""]) -> Float[Array, "sums"]:
            here = at == source
            found = (
                jnp.sum(jnp.where(places == source, tokens, 0.0)) if self.text_weight else 0.0,
                jnp.sum(here & (targets != IGNORE)),
                jnp.sum(jnp.where(of_image == source, per_image, 0.0)) if self.objective else 0.0,
                jnp.sum(of_image == source),
                jnp.sum(here & first),
            )
            return jnp.stack([jnp.asarray(each, jnp.float32) for each in found])

        return jax.vmap(sums)(jnp.arange(self.sources))

    def _text(
        self, tree: Params, hidden: Float[Array, "batch seq embed"], batch: Batch
    ) -> Float[Array, "batch places"]:
        """Cross entropies of the supervised tokens."""
        if not self.text_weight:
            return jnp.zeros((len(hidden), 1))
        hidden, targets = constrain(hidden, "batch"), batch["targets"]
        with jax.named_scope("text_loss"):
            if self.supervised is not None:
                hidden, targets = gather_supervised(hidden, targets, self.supervised)
            head = apply(self.model, tree, method="head_kernel")
            return token_losses(hidden, targets, head, self.model.dtype, self.chunk)

    def _reconstruction(
        self, tree: Params, frozen: Params, taps: Taps, batch: Batch, counts: Counts, key: Array
    ) -> tuple[Float[Array, "batch images"], Float[Array, ""]]:
        """The objective's loss of each image slot, and reduced over images."""
        if self.objective is None:
            return jnp.zeros(batch["image_start"].shape), jnp.zeros(())
        counted = self.reduction.counted(batch)
        targets = self.objective.unpack(frozen, batch)
        if targets is None:
            with jax.named_scope("targets"):
                targets = self.objective.targets(frozen, batch, counted.reshape(-1))
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(batch["image_ids"].reshape(-1))
        with jax.named_scope("reconstruction"):
            losses = self.objective.loss(tree, frozen, taps, targets, keys.reshape(counted.shape))
        return losses, self.reduction.mean(jnp.sum(jnp.where(counted, losses, 0.0)), counts)


def make_reduction(compat: str, objective: Objective | None) -> Reduction:
    """The reduction of `config.reconstruction.compat`."""
    if compat == "official" and objective is not None:
        return OfficialMean(max(1, objective.noise_levels))
    return ImageMean()


def make_loss(
    model: RossConfig,
    reconstruction: ReconstructionConfig,
    dtype: DTypeLike = jnp.float32,
    remat: RematPolicy = "none",
    dropout: float = 0.0,
    **text: Any,
) -> Loss:
    """The loss of a run.

    Args:
      dtype, remat: of encoder and language model.
      dropout: of low-rank updates.
      text: `text_weight`, `chunk`, `supervised` and `sources` of `Loss`.
    """
    dtype = jnp.dtype(dtype)
    objective = make_objective(model, reconstruction, dtype)
    reduction = make_reduction(reconstruction.compat, objective)
    return Loss(Ross(model, dtype, remat, dropout), objective, reduction, weight=reconstruction.weight, **text)
