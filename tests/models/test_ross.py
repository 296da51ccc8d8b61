"""The composed model: images enter and leave rows without leaks between conversations and without collectives."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ross_jax.models.image_tokens import gather_images, scatter_images
from ross_jax.models.language import FINAL, LanguageConfig
from ross_jax.models.projector import ProjectorConfig
from ross_jax.models.ross import Ross, RossConfig, abstract_params
from ross_jax.models.vision import VisionConfig
from ross_jax.sharding import MeshConfig, make_mesh

TOKENS, SIZE, WIDTH, VOCAB = 4, 30, 24, 50
CONFIG = RossConfig(
    vision=VisionConfig("siglip", SIZE, 14, 16, 20, 2, 2, "gelu_tanh", 1e-6),
    projector=ProjectorConfig("mlp", 16, WIDTH, 2),
    language=LanguageConfig(VOCAB, WIDTH, 32, 2, 4, 2, 6, 1e4, 1e-6, qkv_bias=True),
)
# Row 0: two images, the later one first. Row 1: text. Row 2: an image at the end, in the second slot.
# Row 3: an image at position 0.
STARTS = np.array([[9, 1, 14], [14, 14, 14], [14, 10, 14], [0, 14, 14]], np.int32)
LENGTH = 14


@functools.cache
def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, jnp.float32), abstract_params(CONFIG)
    )


@functools.partial(jax.jit, static_argnames="internals")
def run(params, tokens, positions, segments, images, starts, internals=False):
    return Ross(CONFIG).apply({"params": params}, tokens, positions, segments, images, starts, internals)


def batch(starts: np.ndarray = STARTS, length: int = LENGTH, seed: int = 1) -> list[np.ndarray]:
    """Tokens, positions, segments, images and starts: one conversation per row."""
    rng = np.random.default_rng(seed)
    rows, slots = starts.shape
    tokens = rng.integers(0, VOCAB, (rows, length)).astype(np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    images = rng.normal(size=(rows, slots, SIZE, SIZE, 3)).astype(np.float32)
    return [tokens, positions, np.ones_like(tokens), images, starts]


def scatter_by_hand(embeddings, projected, starts):
    """Scatters projected images into embeddings in plain loops."""
    result = np.array(embeddings)
    for row, slot in np.argwhere(starts < embeddings.shape[1]):
        first = starts[row, slot]
        result[row, first : first + TOKENS] = projected[row, slot]
    return result


@pytest.mark.parametrize("starts", [STARTS, STARTS[:, :1], STARTS[:, :0], np.full_like(STARTS, LENGTH)])
def test_scatter_and_gather(starts):
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(4, LENGTH, 5)).astype(np.float32)
    projected = rng.normal(size=(*starts.shape, TOKENS, 5)).astype(np.float32)
    found = scatter_images(jnp.asarray(embeddings), jnp.asarray(projected), jnp.asarray(starts))
    np.testing.assert_array_equal(found, scatter_by_hand(embeddings, projected, starts))
    gathered = gather_images(found, jnp.asarray(starts), TOKENS)
    real = (starts < LENGTH)[..., None, None]
    np.testing.assert_array_equal(gathered, np.where(real, projected, 0.0))


@pytest.mark.parametrize("length", [TOKENS - 1, TOKENS, LENGTH])
def test_an_image_that_does_not_fit(length):
    """An image that does not fit is not written, is read as zeros, and gets no gradient, in short rows too."""
    rng = np.random.default_rng(0)
    starts = jnp.asarray([[length - TOKENS + 1], [length - 1], [length], [length + 5]], jnp.int32)
    embeddings = jnp.asarray(rng.normal(size=(4, length, 5)), jnp.float32)
    projected = jnp.asarray(rng.normal(size=(4, 1, TOKENS, 5)), jnp.float32)
    np.testing.assert_array_equal(scatter_images(embeddings, projected, starts), embeddings)
    assert not np.any(gather_images(embeddings, starts, TOKENS))
    to_text, to_images = jax.grad(
        lambda text, images: (scatter_images(text, images, starts) * embeddings).sum(), argnums=(0, 1)
    )(embeddings, projected)
    np.testing.assert_array_equal(to_text, embeddings)
    assert not np.any(to_images)
    assert not np.any(jax.grad(lambda hidden: (gather_images(hidden, starts, TOKENS) * projected).sum())(embeddings))


def test_gradients_of_scatter_and_gather():
    """Covered text and empty slots get no gradient; an image gets that of the positions it covers."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(4, LENGTH, 5)).astype(np.float32)
    zeros = jnp.zeros((4, LENGTH, 5)), jnp.zeros((*STARTS.shape, TOKENS, 5))
    starts = jnp.asarray(STARTS)
    to_text, to_images = jax.grad(
        lambda text, images: (scatter_images(text, images, starts) * weights).sum(), argnums=(0, 1)
    )(*zeros)
    np.testing.assert_array_equal(to_images, gather_images(jnp.asarray(weights), starts, TOKENS))
    np.testing.assert_array_equal(to_text, scatter_by_hand(weights, np.zeros_like(to_images), STARTS))
    image_weights = rng.normal(size=to_images.shape).astype(np.float32)
    back = jax.grad(lambda hidden: (gather_images(hidden, starts, TOKENS) * image_weights).sum())(zeros[0])
    np.testing.assert_array_equal(back, scatter_by_hand(zeros[0], image_weights, STARTS))


def test_forward_is_its_parts():
    arguments = batch()
    found = run(params(), *arguments, internals=True)
    plain = run(params(), *arguments)
    np.testing.assert_allclose(found.hidden, plain.hidden, rtol=1e-5, atol=1e-5)
    assert plain.internals is None
    parts = found.internals
    assert set(parts) == {"vision_hidden_states", "features", "projected", "embeddings", "hidden_states"}
    assert parts["features"].shape == (12, TOKENS, 16)
    text = np.asarray(params()["language"]["embedding"])[arguments[0]]
    expected = scatter_by_hand(text, np.asarray(parts["projected"]), STARTS)
    np.testing.assert_array_equal(parts["embeddings"], expected)
    np.testing.assert_array_equal(parts["hidden_states"][0], expected)
    np.testing.assert_array_equal(parts["hidden_states"][-1], found.hidden)
    for (row, slot), start in np.ndenumerate(STARTS):
        there = found.hidden[row, start : start + TOKENS] if start < LENGTH else np.zeros((TOKENS, WIDTH))
        np.testing.assert_array_equal(found.visual_outputs[row, slot], there)


def test_batch_without_images():
    """Images `[B, 0, H, W, 3]` give the outputs of a batch whose slots are all empty."""
    tokens, positions, segments, images, _ = batch()
    found = run(params(), tokens, positions, segments, images[:, :0], STARTS[:, :0], internals=True)
    assert found.visual_outputs.shape == (4, 0, TOKENS, WIDTH)
    assert found.internals["projected"].shape == (4, 0, TOKENS, WIDTH)
    empty = run(params(), tokens, positions, segments, images, np.full_like(STARTS, LENGTH))
    np.testing.assert_allclose(found.hidden, empty.hidden, rtol=1e-5, atol=1e-5)
    assert not np.asarray(empty.visual_outputs).any()
    bare = run(params(), tokens, positions, segments, images[:, :0], STARTS[:, :0])
    np.testing.assert_allclose(bare.hidden, empty.hidden, rtol=1e-5, atol=1e-5)


def test_what_is_ignored():
    """Tokens under an image and images of empty slots do not change the outputs."""
    tokens, positions, segments, images, starts = batch()
    other_tokens, other_images = tokens.copy(), images.copy()
    for row, slot in np.ndindex(*starts.shape):
        if starts[row, slot] < LENGTH:
            other_tokens[row, starts[row, slot] :][:TOKENS] = 7
        else:
            other_images[row, slot] = 99.0
    assert (other_tokens != tokens).any()
    found, other = (
        run(params(), *x, starts)
        for x in ((tokens, positions, segments, images), (other_tokens, positions, segments, other_images))
    )
    np.testing.assert_array_equal(found.hidden, other.hidden)
    np.testing.assert_array_equal(found.visual_outputs, other.visual_outputs)


@pytest.mark.parametrize("what", ["tokens", "images"])
def test_rows_do_not_see_each_other(what):
    arguments, changed = batch(), batch()  # two copies: a running step still reads its arrays
    if what == "tokens":
        changed[0][0] = (changed[0][0] + 1) % VOCAB
    else:
        changed[3][0] = -changed[3][0]
    found, other = (run(params(), *x).hidden for x in (arguments, changed))
    np.testing.assert_array_equal(found[1:], other[1:])
    assert (np.abs(found[0] - other[0]).max(-1)[1:] > 1e-4).all()


def packed():
    """Two conversations with an image each, in rows of their own; both in one row with padding; their places there."""
    lengths, starts = (8, 11), (2, 5)
    rng = np.random.default_rng(3)
    apart = batch(np.array([[starts[0]], [starts[1]]], np.int32), max(lengths), seed=4)
    for row, length in enumerate(lengths):
        apart[2][row, length:], apart[1][row, length:] = 0, 0
    together = [np.zeros((1, 21), np.int32) for _ in range(3)]
    together[0][:] = rng.integers(0, VOCAB, (1, 21))
    places = (slice(0, 8), slice(8, 19))
    for number, (place, length) in enumerate(zip(places, lengths, strict=True)):
        together[0][0, place] = apart[0][number, :length]
        together[1][0, place] = np.arange(length)
        together[2][0, place] = number + 1
    together += [apart[3].reshape(1, 2, SIZE, SIZE, 3), np.array([[2, 8 + 5]], np.int32)]
    return apart, together, places


def test_packing_changes_nothing():
    apart, together, places = packed()
    alone, found = run(params(), *apart), run(params(), *together)
    for row, place in enumerate(places):
        length = place.stop - place.start
        np.testing.assert_allclose(found.hidden[0, place], alone.hidden[row, :length], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.visual_outputs[0, row], alone.visual_outputs[row, 0], rtol=1e-5, atol=1e-5)


def test_conversations_of_a_row_do_not_see_each_other():
    """A conversation's outputs and gradients depend on nothing outside it: no text, image or padding."""
    _, together, places = packed()
    found = run(params(), *together).hidden
    changed = [x.copy() for x in together]
    changed[0][0, places[0]] = 3
    changed[0][0, places[1].stop :] = 3
    changed[3][0, 0] = 1.0
    other = run(params(), *changed).hidden
    np.testing.assert_array_equal(found[0, places[1]], other[0, places[1]])
    assert (np.abs(found[0, places[0]] - other[0, places[0]]).max(-1) > 1e-4).all()

    def second(images):
        return jnp.square(run(params(), *together[:3], images, together[4]).hidden[0, places[1]]).sum()

    gradient = np.asarray(jax.jit(jax.grad(second))(jnp.asarray(together[3])))
    assert not gradient[0, 0].any()
    assert gradient[0, 1].any()


COLLECTIVES = re.compile(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast")


def collectives(function, *arguments, replicated: int = 0) -> set[str]:
    """Kinds of collectives in the compiled program.

    The first `replicated` arguments are on every device; the others are split along the batch.
    """
    mesh = make_mesh(MeshConfig(8, 1, 1))
    by_row, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    shardings = tuple(whole if i < replicated else by_row for i in range(len(arguments)))
    with jax.set_mesh(mesh):
        program = jax.jit(function, in_shardings=shardings, out_shardings=by_row).lower(*arguments).compile().as_text()
    assert "num_partitions=8" in program
    return set(COLLECTIVES.findall(program))


def spec(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def test_no_collective_in_scatter_and_gather():
    rows, slots = 16, 3
    embeddings, projected = spec(rows, LENGTH, WIDTH), spec(rows, slots, TOKENS, WIDTH)
    starts = spec(rows, slots, dtype=jnp.int32)
    gather = functools.partial(gather_images, tokens=TOKENS)
    assert not collectives(scatter_images, embeddings, projected, starts)
    assert not collectives(gather, embeddings, starts)

    def square(function, *arguments):
        return jnp.square(function(*arguments)).sum()

    backward = jax.grad(functools.partial(square, scatter_images), argnums=(0, 1))
    assert not collectives(backward, embeddings, projected, starts)
    assert not collectives(jax.grad(functools.partial(square, gather)), embeddings, starts)

    def naive(embeddings, projected, starts):
        """Scatters with row indices, so that the partitioner cannot know that rows stay on their devices."""
        index = (starts[..., None] + jnp.arange(TOKENS)).reshape(rows, -1)
        row = jnp.arange(rows)[:, None]
        return embeddings.at[row, index].set(projected.reshape(rows, -1, WIDTH), mode="drop")

    assert collectives(naive, embeddings, projected, starts)


def test_no_collective_in_the_forward_pass():
    """The forward pass has no collective if parameters are replicated and the batch is split by rows."""
    arguments = [spec(8, *x.shape[1:], dtype=x.dtype) for x in batch()]
    assert not collectives(
        lambda *x: Ross(CONFIG).apply({"params": x[0]}, *x[1:])[:2], abstract_params(CONFIG), *arguments, replicated=1
    )


@pytest.mark.parametrize("shape", [(28, 28), (SIZE, 31), (44, 44)])
def test_wrong_image_size(shape):
    tokens, positions, segments, images, starts = batch()
    wrong = np.zeros((*images.shape[:2], *shape, 3), np.float32)
    with pytest.raises(
        ValueError, match=rf"expected images of {SIZE} pixels square, found \(12, {shape[0]}, {shape[1]}"
    ):
        run(params(), tokens, positions, segments, wrong, starts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projector": ProjectorConfig("mlp", 17, WIDTH)}, r"projector.in_size is 17 but vision.hidden_size is 16"),
        ({"projector": ProjectorConfig("mlp", 16, 25)}, r"projector.out_size is 25 but language.hidden_size is 24"),
    ],
)
def test_components_must_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        RossConfig(**{"vision": CONFIG.vision, "language": CONFIG.language, **changes})


TAPS = (0, 1, 2, 3, FINAL, -4)


@pytest.fixture(scope="module")
def deep():
    """A model of three layers, its parameters, and a batch."""
    config = dataclasses.replace(CONFIG, language=dataclasses.replace(CONFIG.language, num_layers=3))
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, jnp.float32)  # noqa: E731
    return config, jax.tree.map(draw, abstract_params(config)), [jnp.asarray(array) for array in batch()]


@pytest.mark.parametrize("remat", ["none", "full"])
def test_taps_are_hidden_states_at_the_images(deep, remat):
    """Each tap has the values and gradients of the hidden states at the images; negative taps count from the end."""
    config, weights, arrays = deep

    def total(params, read):
        states = read(Ross(config, remat=remat), params)
        return sum(jnp.sum(jnp.sin(states[tap] * (1 + number))) for number, tap in enumerate(TAPS)), states

    def tapped(model, params):
        return model.apply({"params": params}, *arrays, taps=TAPS).taps

    def collected(model, params):
        states = model.apply({"params": params}, *arrays, internals=True).internals["hidden_states"]
        return {tap: gather_images(states[tap], arrays[-1], config.vision.num_tokens) for tap in TAPS}

    (_, found), gradient = jax.jit(jax.value_and_grad(lambda p: total(p, tapped), has_aux=True))(weights)
    (_, states), expected = jax.jit(jax.value_and_grad(lambda p: total(p, collected), has_aux=True))(weights)
    for tap in TAPS:
        np.testing.assert_allclose(found[tap], states[tap], rtol=1e-5, atol=1e-6, err_msg=str(tap))
    for found, wanted in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=max(1e-5, 1e-6 * np.abs(wanted).max()))


def test_the_final_tap_costs_nothing(deep):
    """The final tap adds nothing to the hidden states that layers carry; a middle tap adds one array like them."""
    config, weights, arrays = deep

    def carried(*taps):
        jaxpr = jax.make_jaxpr(lambda p: Ross(config).apply({"params": p}, *arrays, taps=taps))(weights).jaxpr
        scans = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan" and eqn.params["length"] == 3]
        (scan,) = scans
        return [var.aval.shape for var in scan.outvars]

    assert carried(FINAL, 0) == carried()
    assert carried(1) == 2 * carried()
