"""Greedy generation: stopping, padding, and agreement with the full forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ross_jax.inference.generate import generate
from ross_jax.models.language import LanguageConfig
from ross_jax.models.projector import ProjectorConfig
from ross_jax.models.ross import Ross, RossConfig
from ross_jax.models.vision import VisionConfig

CONFIG = RossConfig(
    vision=VisionConfig("siglip", 28, 14, 16, 24, 2, 2, "gelu_tanh", 1e-6),
    projector=ProjectorConfig("mlp", 16, 24),
    language=LanguageConfig(50, 24, 32, 2, 4, 2, 6, 1e4, 1e-6, qkv_bias=True),
)
COUNT = CONFIG.vision.num_tokens
compiled = jax.jit(generate, static_argnums=(0, 6, 7, 8, 9))


@pytest.fixture(scope="module")
def params():
    module = Ross(CONFIG)
    spec = module.input_spec()
    tree = jax.jit(module.init)(jax.random.key(0), *(jnp.zeros(s.shape, s.dtype) for s in spec))["params"]
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(
        structure, [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


def prompt(rng: np.random.Generator, text: int, padding: int = 0):
    """A row of `padding` pads, two ids, an image and `text` more ids."""
    length = padding + 2 + COUNT + text
    tokens = np.zeros((1, length), np.int32)
    tokens[0, padding : padding + 2] = rng.integers(1, 50, 2)
    tokens[0, padding + 2 + COUNT :] = rng.integers(1, 50, text)
    segments = (np.arange(length) >= padding).astype(np.int32)[None]
    return tokens, segments, np.array([[padding + 2]], np.int32)


def greedy_by_full_forward(params, tokens, image, start, steps):
    """Greedy decoding without a cache: a forward pass for each new id, over a row padded to its final length."""
    model, given = Ross(CONFIG), tokens.shape[1]
    row = np.pad(tokens, [(0, 0), (0, steps)])
    positions = np.arange(row.shape[1])[None]

    @jax.jit
    def scores(*batch):
        output = model.apply({"params": params}, *batch)
        return model.apply({"params": params}, output.hidden, method="logits")[0]

    for length in range(given, given + steps):
        segments = (positions < length).astype(np.int32)
        row[0, length] = scores(row, positions, segments, image, start)[length - 1].argmax()
    return row[0, given:].tolist()


def test_equals_the_full_forward_pass(params):
    rng = np.random.default_rng(0)
    tokens, segments, start = prompt(rng, 3)
    image = rng.normal(size=(1, 1, 28, 28, 3)).astype(np.float32)
    result = compiled(CONFIG, params, tokens, segments, image, start, 6, None, jnp.float32, True)
    expected = greedy_by_full_forward(params, tokens, image, start, 6)
    assert result.tokens[0].tolist() == expected
    assert len(set(expected)) > 1  # constant answers would hide errors
    assert result.logits.argmax(-1)[0].tolist() == expected


def test_left_padding_changes_nothing(params):
    rng = np.random.default_rng(1)
    image = rng.normal(size=(2, 1, 28, 28, 3)).astype(np.float32)
    short, long = prompt(np.random.default_rng(2), 1, padding=4), prompt(np.random.default_rng(3), 5)
    both = [np.concatenate(pair) for pair in zip(short, long, strict=True)]
    together = compiled(CONFIG, params, both[0], both[1], image, both[2], 5)
    for i, (tokens, segments, start) in enumerate([prompt(np.random.default_rng(2), 1), long]):
        alone = compiled(CONFIG, params, tokens, segments, image[i : i + 1], start, 5)
        assert together.tokens[i].tolist() == alone.tokens[0].tolist()


def test_stop_token_ends_a_row(params):
    rng = np.random.default_rng(0)
    tokens, segments, start = prompt(rng, 3)
    image = rng.normal(size=(1, 1, 28, 28, 3)).astype(np.float32)
    free = compiled(CONFIG, params, tokens, segments, image, start, 6).tokens[0].tolist()
    stop = free[2]
    first = free.index(stop)
    result = compiled(CONFIG, params, tokens, segments, image, start, 6, stop)
    assert result.tokens[0].tolist() == free[: first + 1] + [stop] * (5 - first)
    assert result.lengths.tolist() == [first + 1]
    several = compiled(CONFIG, params, tokens, segments, image, start, 6, (49, stop), jnp.float32)
    assert several.tokens[0, : first + 1].tolist() == free[: first + 1] and several.lengths.tolist() == [first + 1]


def test_each_row_has_its_own_limit(params):
    tokens = np.tile(np.array([[3, 4, 5]], np.int32), (3, 1))
    none, empty = np.zeros((3, 0, 28, 28, 3), np.float32), np.zeros((3, 0), np.int32)
    limit = jax.jit(generate, static_argnums=(0, 6))
    result = limit(CONFIG, params, tokens, np.ones_like(tokens), none, empty, 4, limits=np.array([4, 0, 2]))
    assert result.lengths.tolist() == [4, 0, 2]
    assert result.tokens[2, :2].tolist() == result.tokens[0, :2].tolist()


def test_text_without_images(params):
    tokens = np.array([[3, 4, 5]], np.int32)
    none = np.zeros((1, 0, 28, 28, 3), np.float32)
    empty = np.zeros((1, 0), np.int32)
    result = compiled(CONFIG, params, tokens, np.ones_like(tokens), none, empty, 4)
    unused = compiled(
        CONFIG, params, tokens, np.ones_like(tokens), np.ones((1, 1, 28, 28, 3)), np.array([[3]], np.int32), 4
    )
    assert result.tokens.tolist() == unused.tokens.tolist()
