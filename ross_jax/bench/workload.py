"""Made-up conversations and batches, to measure steps without a data set."""

import dataclasses

import numpy as np

from ross_jax.data.batches import Batch, RowShape, empty_batch, expand, place
from ross_jax.data.conversation import IGNORE, IMAGE_ID, EncodedConversation
from ross_jax.data.packing import Lengths, PackingConfig, PackingPlan, PlanSettings, make_plan
from ross_jax.training.recipe import RunConfig

PARTS = (
    (158_000, True, 250, 0.5),  # LLaVA's own: conversations, descriptions, reasoning
    (40_000, False, 900, 0.8),  # ShareGPT
    (83_000, True, 150, 0.4),  # VQAv2
    (72_000, True, 300, 0.4),  # GQA
    (9_000, True, 70, 0.3),  # OKVQA
    (80_000, True, 150, 0.4),  # OCRVQA
    (66_000, True, 100, 0.3),  # A-OKVQA
    (22_000, True, 100, 0.4),  # TextCaps
    (48_000, True, 300, 0.6),  # RefCOCO
    (86_000, True, 400, 0.6),  # Visual Genome
)
"""The data sets of LLaVA-1.5's stage 2: conversations, whether they have an image, median tokens of text, standard
deviation of the tokens' logarithm. The first two are published, the others are estimated from turns per image."""
PROMPT_SHARE = 0.4
"""Share of a conversation's text that is prompt, and not supervised."""


def conversation_lengths(count: int, image_tokens: int) -> Lengths:
    """Lengths of `count` conversations like those of LLaVA-1.5's stage 2. They never change.

    Args:
      image_tokens: N, tokens per image.
    """
    random = np.random.RandomState(0)
    sizes, image_counts, medians, spreads = (np.array(column) for column in zip(*PARTS, strict=True))
    part = random.choice(len(PARTS), count, p=sizes / sizes.sum())
    text = np.exp(np.log(medians[part]) + spreads[part] * random.standard_normal(count))
    text = np.clip(np.round(text), 16, 2048).astype(np.int32)
    images = image_counts[part].astype(np.int32)
    return Lengths(text + images * image_tokens, images, text - _prompt(text))


def _prompt(text: np.ndarray) -> np.ndarray:
    return np.maximum(1, PROMPT_SHARE * text).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Workload:
    """The packed conversations that a step's batch is made from.

    Attributes:
      shape: S, I, N and the side of an image.
      vocabulary: number of token ids.
    """

    lengths: Lengths
    plan: PackingPlan
    packing: PackingConfig
    shape: RowShape
    vocabulary: int

    @property
    def tokens_per_step(self) -> float:
        """Mean tokens of a step; padding does not count."""
        return float(self.lengths.tokens[self.plan.samples].sum(dtype=np.int64)) / self.plan.steps

    @property
    def images_per_step(self) -> float:
        """Mean images of a step; empty slots do not count."""
        return float(self.lengths.images[self.plan.samples].sum(dtype=np.int64)) / self.plan.steps

    @property
    def step(self) -> int:
        """The step of the plan whose number of images, then of tokens, is nearest to the mean."""
        rows = self.plan.rows_per_step

        def distance(step: int) -> tuple[float, float]:
            samples = np.concatenate([self.plan.row(row) for row in range(step * rows, (step + 1) * rows)])
            image_count, tokens = self.lengths.images[samples].sum(), self.lengths.tokens[samples].sum()
            return abs(image_count - self.images_per_step), abs(tokens - self.tokens_per_step)

        return min(range(self.plan.steps), key=distance)

    def batch(self) -> Batch:
        """The batch of that step, with random ids and images. A conversation's image stands before its text."""
        random = np.random.RandomState(0)
        batch = empty_batch(self.plan.rows_per_step, self.shape)
        first, side = self.step * self.plan.rows_per_step, self.shape.image_size
        for row in range(self.plan.rows_per_step):
            for sample, location in self.plan.locations(first + row, self.lengths):
                conversation = expand(self._conversation(sample, random), self.shape.image_tokens)
                count = len(conversation.image_start)
                pixels = [random.randint(0, 256, (side, side, 3), np.uint8) for _ in range(count)]
                place(batch, row, location, conversation, pixels)
        return batch

    def _conversation(self, sample: int, random: np.random.RandomState) -> EncodedConversation:
        images = int(self.lengths.images[sample])
        text = int(self.lengths.tokens[sample]) - images * self.shape.image_tokens
        ids = np.append([IMAGE_ID] * images, random.randint(1, self.vocabulary, text)).astype(np.int32)
        labels = ids.copy()
        labels[: len(ids) - int(self.lengths.supervised[sample])] = IGNORE
        return EncodedConversation(ids, labels)


def make_workload(config: RunConfig, multiple: int, rows: int | None = None) -> Workload:
    """Conversations, packed as the recipe says.

    Args:
      multiple: the number of rows of a step must be a multiple of this.
      rows: rows of a step. None: as many as hold `config.data.batch` conversations.

    Raises:
      UserError: a row is too short for any conversation.
    """
    vision, packing = config.model.vision, config.data.packing
    lengths = conversation_lengths(max(4000, 20 * config.data.batch), vision.num_tokens)
    plan = make_plan(lengths, PlanSettings(packing, config.data.batch, multiple, rows))
    shape = RowShape(packing.length, packing.images, vision.num_tokens, vision.image_size)
    return Workload(lengths, plan, packing, shape, config.model.language.vocab_size)
