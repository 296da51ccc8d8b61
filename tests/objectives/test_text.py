"""The next-token loss by blocks of the vocabulary equals the direct one and never holds all logits."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ross_jax.objectives.text import IGNORE, gather_supervised, next_token_loss
from ross_jax.sharding import MeshConfig, make_mesh

WIDTH, VOCAB = 12, 37


def batch(rows: int, length: int, ignored: float = 0.3, seed: int = 0):
    """Hidden states, targets and head."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(rows, length, WIDTH)).astype(np.float32)
    targets = rng.integers(0, VOCAB, (rows, length)).astype(np.int32)
    targets[rng.random((rows, length)) < ignored] = IGNORE
    return jnp.asarray(hidden), jnp.asarray(targets), jnp.asarray(rng.normal(size=(WIDTH, VOCAB)).astype(np.float32))


def direct(hidden, targets, head):
    """Loss and gradients in float64 NumPy."""
    hidden, head, targets = np.float64(hidden), np.float64(head), np.asarray(targets)
    scores = hidden @ head
    scores -= scores.max(-1, keepdims=True)
    log_probability = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    valid = targets != IGNORE
    one_hot = np.eye(VOCAB)[np.where(valid, targets, 0)]
    loss = -(log_probability * one_hot)[valid].sum()
    error = (np.exp(log_probability) - one_hot) * valid[..., None]
    return loss, error @ head.T, np.einsum("bsd,bsv->dv", hidden, error)


def chunked(hidden, targets, head, chunk):
    return next_token_loss(hidden, targets, head, chunk=chunk)


@pytest.mark.parametrize("chunk", [1, 4, 7, 21, 22, 1024])
@pytest.mark.parametrize(("rows", "length"), [(3, 7), (1, 21), (2, 5)])
def test_loss_and_gradient(rows, length, chunk):
    hidden, targets, head = batch(rows, length)
    loss, to_hidden, to_head = direct(hidden, targets, head)
    run = jax.jit(jax.value_and_grad(functools.partial(chunked, chunk=chunk), argnums=(0, 2), has_aux=True))
    (found, count), gradients = run(hidden, targets, head)
    np.testing.assert_allclose(found, loss, rtol=1e-6)
    assert int(count) == int((np.asarray(targets) != IGNORE).sum())
    np.testing.assert_allclose(gradients[0], to_hidden, atol=1e-5)
    np.testing.assert_allclose(gradients[1], to_head, atol=2e-5)


@pytest.mark.parametrize(("chunk", "again"), [(21, False), (20, True)])
def test_logits_of_a_single_block_are_kept(chunk, again):
    """The backward pass recomputes logits unless a single block, of 21 positions here, holds them all."""
    hidden, targets, head = batch(3, 7)
    traced = jax.make_jaxpr(jax.grad(functools.partial(chunked, chunk=chunk), has_aux=True))(hidden, targets, head)
    assert ("remat" in str(traced)) == again


@pytest.mark.parametrize("capacity", [6, 9, 30])
def test_gathered_positions_have_the_same_loss(capacity):
    """Gathering supervised positions keeps loss and gradients, for rows with 0 to 6 targets and any capacity."""
    hidden, targets, head = batch(4, 21)
    keep = np.zeros((4, 21), bool)
    for row, count in enumerate((6, 0, 3, 1)):
        keep[row, np.random.default_rng(row).permutation(21)[:count]] = True
    targets = jnp.where(keep, jnp.maximum(targets, 0), IGNORE)

    def gathered(hidden, head):
        states, ids = gather_supervised(hidden, targets, capacity)
        assert states.shape == (4, min(capacity, 21), WIDTH)
        return chunked(states, ids, head, 8)

    loss, to_hidden, to_head = direct(hidden, targets, head)
    (found, count), gradients = jax.jit(jax.value_and_grad(gathered, argnums=(0, 1), has_aux=True))(hidden, head)
    np.testing.assert_allclose(found, loss, rtol=1e-6)
    assert int(count) == 10
    np.testing.assert_allclose(gradients[0], to_hidden, atol=1e-5)
    np.testing.assert_allclose(gradients[1], to_head, atol=2e-5)


def test_large_scores():
    """Scores of about a thousand neither overflow nor lose accuracy."""
    hidden, targets, head = batch(1, 9)
    loss, *_ = direct(300.0 * hidden, targets, head)
    found, _ = chunked(300.0 * hidden, targets, head, 4)
    assert loss > 1000
    np.testing.assert_allclose(found, loss, rtol=1e-6)


def test_all_ignored():
    hidden, targets, head = batch(2, 5, ignored=2.0)
    (loss, count), gradients = jax.value_and_grad(chunked, argnums=(0, 2), has_aux=True)(hidden, targets, head, 4)
    assert (float(loss), int(count)) == (0.0, 0)
    assert not any(np.asarray(gradient).any() for gradient in gradients)


def test_states_at_ignored_positions_do_not_matter():
    hidden, targets, head = batch(2, 9)
    other = jnp.where((targets == IGNORE)[..., None], 5.0, hidden)
    assert float(chunked(hidden, targets, head, 4)[0]) == float(chunked(other, targets, head, 4)[0])


def sizes(jaxpr):
    """Yields the number of elements of each value in a program, at any depth."""
    for equation in jaxpr.eqns:
        yield from (math.prod(var.aval.shape) for var in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, (list, tuple)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from sizes(inner)


@pytest.mark.parametrize("vocab", [32, 37])
@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_split_vocabulary(chunk, vocab):
    """On a mesh loss and gradients equal those of one device, whether or not the tensor axis divides the vocabulary."""
    rng = np.random.default_rng(1)
    hidden, targets, _ = batch(4, 8)
    head = jnp.asarray(rng.normal(size=(WIDTH, vocab)).astype(np.float32))
    targets = jnp.minimum(targets, vocab - 1)
    run = jax.value_and_grad(functools.partial(chunked, chunk=chunk), argnums=(0, 2), has_aux=True)
    with jax.default_matmul_precision("highest"):
        expected = run(hidden, targets, head)
        with jax.set_mesh(make_mesh(MeshConfig(1, 2, 4), jax.devices())):
            found = jax.jit(run)(hidden, targets, head)
    for mine, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5)


def test_all_logits_never_exist():
    """No value of forward and backward pass is as large as all logits, nor is the memory that the compiler plans."""
    rows, length, vocab, chunk = 4, 256, 4096, 64
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows, length, WIDTH), (WIDTH, vocab))]
    targets = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    everything = rows * length * vocab

    def gradient(chunk):
        def loss(hidden, head, targets):
            return next_token_loss(hidden, targets, head, chunk=chunk)[0]

        return jax.grad(loss, argnums=(0, 1))

    def largest(chunk):
        return max(sizes(jax.make_jaxpr(gradient(chunk))(*arguments, targets).jaxpr))

    assert largest(chunk) <= chunk * vocab
    assert largest(rows * length) >= everything  # `largest` does see logits where they exist
    compiled = jax.jit(gradient(chunk)).lower(*arguments, targets).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * everything / 2
