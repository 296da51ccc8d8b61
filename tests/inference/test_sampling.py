"""Sampling: scores equal those of transformers' logits processors; draws follow the probabilities."""

import jax.numpy as jnp
import numpy as np
import pytest

from ross_jax.inference.sampling import Drawing, choose, penalise, warp

ROWS, VOCAB = 6, 200


def drawing(**settings) -> Drawing:
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "penalty": 1.0, "seed": 0} | settings
    kinds = {"top_k": jnp.int32, "seed": jnp.uint32}
    return Drawing(**{name: jnp.full(ROWS, value, kinds.get(name, jnp.float32)) for name, value in defaults.items()})


@pytest.fixture(scope="module")
def scores() -> np.ndarray:
    return (4 * np.random.default_rng(0).normal(size=(ROWS, VOCAB))).astype(np.float32)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.6},
        {"top_k": 7},
        {"top_k": VOCAB + 5},
        {"top_p": 0.8},
        {"top_p": 1e-6},
        {"min_p": 0.05},
        {"penalty": 1.3},
        {"penalty": 0.7, "temperature": 1.7, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    ],
)
def test_equals_transformers(scores, settings):
    torch = pytest.importorskip("torch", reason="extra parity is not installed")
    from transformers import generation

    ids = np.random.default_rng(1).integers(0, VOCAB, (ROWS, 30))
    seen = np.zeros((ROWS, VOCAB), bool)
    seen[np.arange(ROWS)[:, None], ids] = True
    processors = generation.LogitsProcessorList()
    if "penalty" in settings:
        processors.append(generation.RepetitionPenaltyLogitsProcessor(settings["penalty"]))
    processors.append(generation.TemperatureLogitsWarper(float(settings.get("temperature", 1.0))))
    for name, warper in (
        ("top_k", generation.TopKLogitsWarper),
        ("top_p", generation.TopPLogitsWarper),
        ("min_p", generation.MinPLogitsWarper),
    ):
        if name in settings:
            processors.append(warper(settings[name]))
    expected = processors(torch.as_tensor(ids), torch.as_tensor(scores)).numpy()
    ours = drawing(**settings)
    found = np.asarray(warp(penalise(jnp.asarray(scores), jnp.asarray(seen), ours), ours))
    assert (np.isinf(found) == np.isinf(expected)).all()
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_draws_follow_the_probabilities():
    """Each token gets its share of 2,400 draws, within four standard deviations; others are never drawn."""
    probabilities = np.array([0.5, 0.25, 0.15, 0.1])
    scores = jnp.tile(jnp.log(jnp.asarray(probabilities)), (ROWS, 1))
    settings = drawing(top_k=3)._replace(seed=jnp.arange(ROWS, dtype=jnp.uint32))
    seen = jnp.zeros(scores.shape, bool)
    drawn = np.concatenate([choose(scores, seen, settings, jnp.full(ROWS, i, jnp.int32)) for i in range(400)])
    expected = probabilities[:3] / probabilities[:3].sum()
    counts = np.bincount(drawn, minlength=4)
    assert counts[3] == 0
    assert (np.abs(counts[:3] - 2400 * expected) < 4 * np.sqrt(2400 * expected * (1 - expected))).all()


def test_rows_differ_in_their_settings(scores):
    """A row that takes the most likely token does so beside rows that draw."""
    settings = drawing(temperature=50.0)
    settings = settings._replace(temperature=settings.temperature.at[2].set(0), seed=jnp.arange(ROWS, dtype=jnp.uint32))
    chosen = choose(jnp.asarray(scores), jnp.zeros(scores.shape, bool), settings, jnp.zeros(ROWS, jnp.int32))
    likely = scores.argmax(-1)
    assert chosen[2] == likely[2] and (np.asarray(chosen) != likely).sum() >= 3
