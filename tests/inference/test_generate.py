"""Greedy generation: stopping, padding, and agreement with the full forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ross_jax.inference.generate import Decoding, Prompts, generate
from ross_jax.models.language import LanguageConfig, unstack
from ross_jax.models.projector import ProjectorConfig
from ross_jax.models.ross import Ross, RossConfig
from ross_jax.models.vision import VisionConfig

CONFIG = RossConfig(
    vision=VisionConfig("siglip", 28, 14, 16, 24, 2, 2, "gelu_tanh", 1e-6),
    projector=ProjectorConfig("mlp", 16, 24),
    language=LanguageConfig(50, 24, 32, 2, 4, 2, 6, 1e4, 1e-6, qkv_bias=True),
)
COUNT = CONFIG.vision.num_tokens
compiled = jax.jit(generate, static_argnums=(0, 3, 4))
DECODING = Decoding(CONFIG)


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


def prompt(rng: np.random.Generator, text: int, padding: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, length and image start of a row of two ids, an image, `text` more ids and `padding` pads."""
    length = 2 + COUNT + text
    tokens = np.zeros((1, length + padding), np.int32)
    tokens[0, :2] = rng.integers(1, 50, 2)
    tokens[0, 2 + COUNT : length] = rng.integers(1, 50, text)
    return tokens, np.array([length], np.int32), np.array([[2]], np.int32)


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
    tokens, length, start = prompt(rng, 3)
    image = rng.normal(size=(1, 1, 28, 28, 3)).astype(np.float32)
    result = compiled(DECODING, params, Prompts(tokens, length, image, start), 6, True)
    expected = greedy_by_full_forward(params, tokens, image, start, 6)
    assert result.tokens[0].tolist() == expected
    assert len(set(expected)) > 1  # constant answers would hide errors
    assert result.logits.argmax(-1)[0].tolist() == expected


def test_padding_changes_nothing(params):
    rng = np.random.default_rng(1)
    image = rng.normal(size=(2, 1, 28, 28, 3)).astype(np.float32)
    short, long = prompt(np.random.default_rng(2), 1, padding=4), prompt(np.random.default_rng(3), 5)
    tokens, lengths, starts = (np.concatenate(pair) for pair in zip(short, long, strict=True))
    together = compiled(DECODING, params, Prompts(tokens, lengths, image, starts), 5)
    for i, (tokens, lengths, starts) in enumerate([prompt(np.random.default_rng(2), 1), long]):
        alone = compiled(DECODING, params, Prompts(tokens, lengths, image[i : i + 1], starts), 5)
        assert together.tokens[i].tolist() == alone.tokens[0].tolist()


def test_stop_token_ends_a_row(params):
    rng = np.random.default_rng(0)
    tokens, length, start = prompt(rng, 3)
    prompts = Prompts(tokens, length, rng.normal(size=(1, 1, 28, 28, 3)).astype(np.float32), start)
    free = compiled(DECODING, params, prompts, 6).tokens[0].tolist()
    stop = free[2]
    first = free.index(stop)
    for stops in ((stop,), (49, stop)):
        result = compiled(Decoding(CONFIG, stops=stops), params, prompts, 6)
        assert result.tokens[0].tolist() == free[: first + 1] + [stop] * (5 - first)
        assert result.lengths.tolist() == [first + 1]


def test_text_without_images(params):
    tokens, lengths = np.array([[3, 4, 5]], np.int32), np.array([3], np.int32)
    none = Prompts(tokens, lengths, np.zeros((1, 0, 28, 28, 3), np.float32), np.zeros((1, 0), np.int32))
    unused = Prompts(tokens, lengths, np.ones((1, 1, 28, 28, 3), np.float32), np.array([[3]], np.int32))
    assert compiled(DECODING, params, none, 4).tokens.tolist() == compiled(DECODING, params, unused, 4).tokens.tolist()


def test_layers_apart_equal_stacked_layers(params):
    rng = np.random.default_rng(5)
    tokens, length, start = prompt(rng, 3)
    prompts = Prompts(tokens, length, rng.normal(size=(1, 1, 28, 28, 3)).astype(np.float32), start)
    stacked = compiled(DECODING, params, prompts, 6, True)
    apart = {**params, "language": unstack(params["language"])}
    result = compiled(Decoding(CONFIG, stacked=False), apart, prompts, 6, True)
    np.testing.assert_allclose(result.logits, stacked.logits, atol=1e-4)
    assert result.tokens.tolist() == stacked.tokens.tolist()
