"""Losses of each source: those of a batch in which the others have no targets and no images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ross_jax.objectives.loss import SOURCE_SUMS
from ross_jax.training.metrics import source_metrics
from tiny import Run, make_batch


def of_conversations(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The batch with a source for each conversation: 0, 1, 2 in turn, and none of source 3."""
    rows = len(batch["tokens"])
    number = 2 * np.arange(rows)[:, None] + batch["segments"] - 1
    return batch | {"sources": np.where(batch["segments"] > 0, number % 3, 0).astype(np.int32)}


def without_others(batch: dict[str, np.ndarray], source: int) -> dict[str, np.ndarray]:
    length = batch["tokens"].shape[1]
    starts = np.minimum(batch["image_start"], length - 1)
    other = np.take_along_axis(batch["sources"], starts, axis=1) != source
    changed = {
        "targets": np.where(batch["sources"] == source, batch["targets"], -100),
        "image_start": np.where(other, length, batch["image_start"]),
    }
    return batch | {name: values.astype(np.int32) for name, values in changed.items()}


@pytest.fixture(scope="module")
def alone():
    """A run that learns nothing and knows no sources."""
    return Run(learning_rate=0.0)


@pytest.mark.parametrize(("accumulate", "supervised"), [(1, None), pytest.param(2, 20, marks=pytest.mark.slow)])
def test_losses_of_sources(alone, accumulate, supervised):
    batch = of_conversations(make_batch())
    found = Run(sources=4, accumulate=accumulate, supervised=supervised).run(batch)
    table = dict(zip(SOURCE_SUMS, found["sources"].T, strict=True))
    assert table["conversations"].tolist() == [6, 5, 5, 0]
    assert table["tokens"].sum() == found["supervised_tokens"] and table["images"].sum() == found["images"]
    metrics = source_metrics(("a", "b", "c", "d"), found["sources"])
    assert {name for name in metrics if name.endswith("/d")} == {"conversations/d"}
    for number, name in enumerate("abc"):
        step = jax.device_put(jnp.zeros((), jnp.int32), alone.shardings.step)  # noise depends on it
        alone.state = alone.state._replace(step=step)
        expected = alone.run({key: each for key, each in without_others(batch, number).items() if key != "sources"})
        for loss in ("text_loss", "reconstruction_loss"):
            assert metrics[f"{loss}/{name}"] == pytest.approx(expected[loss], rel=1e-5)
