"""The conversion engine, and the tables of all components against the models' parameter trees."""

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ross_jax.config import UserError
from ross_jax.convert.importing import TABLES
from ross_jax.convert.mapping import (
    BATCHED,
    CONV,
    COPY,
    LINEAR,
    POINTWISE,
    ConversionError,
    Row,
    Table,
    collecting,
    expand,
    match,
    raise_all,
)
from ross_jax.models.autoencoder import AutoencoderConfig
from ross_jax.models.denoiser import DenoiserConfig
from ross_jax.models.language import LanguageConfig
from ross_jax.models.projector import ProjectorConfig
from ross_jax.models.ross import RossConfig, abstract_params
from ross_jax.models.tiny_autoencoder import TinyAutoencoderConfig
from ross_jax.models.vision import VisionConfig
from ross_jax.tree import flatten, unflatten

# Transforms.


@pytest.mark.parametrize(
    "transform, hf_shape, shape",
    [
        (COPY, (2, 3), (2, 3)),
        (LINEAR, (2, 3), (3, 2)),
        (CONV, (2, 3, 4, 5), (4, 5, 3, 2)),
        (POINTWISE, (2, 3, 1, 1), (3, 2)),
        (BATCHED, (1, 2, 3), (2, 3)),
    ],
)
def test_transforms(transform, hf_shape, shape):
    x = np.arange(math.prod(hf_shape)).reshape(hf_shape)
    assert transform.from_hf(x).shape == shape
    np.testing.assert_array_equal(transform.to_hf(transform.from_hf(x)), x)
    assert np.shares_memory(transform.from_hf(x), x) and np.shares_memory(transform.to_hf(x.reshape(shape)), x)


def test_layouts_of_torch():
    """Transforms match torch: linear layers compute weight @ x, and filters are [out, in, row, column]."""
    weight, x = np.arange(6.0).reshape(2, 3), np.arange(3.0)
    np.testing.assert_array_equal(x @ LINEAR.from_hf(weight), weight @ x)
    np.testing.assert_array_equal(x @ POINTWISE.from_hf(weight[:, :, None, None]), weight @ x)
    filters = np.random.default_rng(0).normal(size=(2, 3, 4, 5))
    assert CONV.from_hf(filters)[3, 4, 2, 1] == filters[1, 2, 3, 4]


# Tables. Each table covers the parameters of its component exactly.

SIZES = st.integers(1, 5)


@st.composite
def visions(draw) -> VisionConfig:
    layers, heads, patch = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    select = draw(st.integers(-layers - 1, layers))
    sizes = (patch * draw(st.integers(1, 3)) + draw(st.integers(0, patch - 1)), patch, heads * draw(SIZES))
    kind, activation = draw(st.sampled_from([("siglip", "gelu_tanh"), ("clip", "quick_gelu"), ("clip", "gelu")]))
    return VisionConfig(kind, *sizes, draw(SIZES), layers, heads, activation, 1e-5, select)


@st.composite
def languages(draw) -> LanguageConfig:
    kv_heads = draw(st.integers(1, 2))
    flags = {name: draw(st.booleans()) for name in ("qkv_bias", "out_bias", "mlp_bias", "qk_norm", "tied_head")}
    heads, head_dim = kv_heads * draw(st.integers(1, 3)), 2 * draw(st.integers(1, 3))
    sizes = [draw(SIZES) for _ in range(3)]
    return LanguageConfig(*sizes, draw(st.integers(1, 3)), heads, kv_heads, head_dim, 1e4, 1e-6, **flags)


PROJECTORS = st.one_of(
    st.builds(ProjectorConfig, st.just("mlp"), SIZES, SIZES, st.integers(1, 4)),
    st.integers(1, 4).map(lambda size: ProjectorConfig("identity", size, size)),
)
DENOISERS = st.builds(
    lambda condition, latent, grid, unit, depth, heads, ratio: DenoiserConfig(
        condition, latent, grid, 4 * unit * heads, depth, heads, ratio
    ),
    *(SIZES, SIZES, st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(1, 4)),
    st.sampled_from([1.0, 2.5, 4.0]),
)


@st.composite
def autoencoders(draw) -> tuple:
    """Draws arguments of AutoencoderConfig, not the config itself: beartype would use `random` on its tuples."""
    groups, levels = draw(st.integers(1, 2)), draw(st.integers(1, 5))
    channels = draw(st.lists(st.integers(1, 2).map(lambda n: groups * n), min_size=levels, max_size=levels))
    attention = [draw(st.lists(st.booleans(), min_size=levels, max_size=levels)) for _ in range(2)]
    flags = [draw(st.booleans()) for _ in range(3)]
    layers, latent = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    return tuple(channels), layers, latent, groups, 1.0, 0.0, *map(tuple, attention), *flags


@st.composite
def tiny_autoencoders(draw) -> tuple:
    levels = draw(st.integers(1, 5))
    blocks = [draw(st.lists(st.integers(0, 3), min_size=levels, max_size=levels)) for _ in range(2)]
    return draw(SIZES), draw(SIZES), *map(tuple, blocks), draw(SIZES)


def check_cover(component: str, config) -> None:
    """Checks that the table fills every parameter exactly once, with tensors of distinct names."""
    leaves = flatten(abstract_params(RossConfig(**{component: config})).get(component, {}))
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    table = TABLES[component](config)
    pieces = expand(table, shapes)
    names = [name for piece in pieces for name in (piece.hf_key, piece.alias) if name]
    assert len(set(names)) == len(names)
    assert sum(math.prod(piece.shape) for piece in pieces) == sum(map(math.prod, shapes.values()))
    assert {(piece.path, piece.layer) for piece in pieces} == {
        (row.path, layer)
        for row in table.rows
        for layer in (range(shapes[row.path][0]) if "{}" in row.hf_key else [None])
    }
    for piece in pieces:
        inner = shapes[piece.path] if piece.layer is None else shapes[piece.path][1:]
        values = piece.transform.from_hf(np.broadcast_to(np.int8(0), piece.shape))
        assert values.shape == inner and piece.transform.to_hf(values).shape == piece.shape
    found = match(table, shapes, {piece.hf_key: piece.shape for piece in pieces})
    assert (found.problems, found.unused, found.copies) == ([], [], [])
    assert found.pieces == [(piece, piece.hf_key) for piece in pieces]
    # No pattern of unused tensors matches a used one.
    assert not [p.hf_key for p in pieces if any(re.fullmatch(pattern, p.hf_key) for pattern in table.unused)]


@settings(max_examples=12, deadline=None)
@given(visions())
def test_vision_table(config):
    check_cover("vision", config)
    unused = TABLES["vision"](config).unused
    for layer in range(config.num_layers):
        kept = any(re.fullmatch(pattern, f"encoder.layers.{layer}.mlp.fc1.bias") for pattern in unused)
        assert kept == (layer >= config.layers_used)


@settings(max_examples=12, deadline=None)
@given(languages())
def test_language_table(config):
    check_cover("language", config)
    table = TABLES["language"](config)
    assert ("lm_head.weight" in table.copies) == config.tied_head
    assert ("lm_head.weight" in [row.hf_key for row in table.rows]) != config.tied_head


@settings(max_examples=8, deadline=None)
@given(PROJECTORS)
def test_projector_table(config):
    check_cover("projector", config)


@settings(max_examples=8, deadline=None)
@given(DENOISERS)
def test_denoiser_table(config):
    check_cover("denoiser", config)


@settings(max_examples=6, deadline=None)
@given(autoencoders())
def test_autoencoder_table(arguments):
    check_cover("autoencoder", AutoencoderConfig(*arguments))


@settings(max_examples=6, deadline=None)
@given(tiny_autoencoders())
def test_tiny_autoencoder_table(arguments):
    check_cover("autoencoder", TinyAutoencoderConfig(*arguments))


def test_tables_that_do_not_cover_are_a_mistake():
    row = Row("w", "a/kernel")
    for rows, shapes in [((row,), {}), ((row, row), {"a/kernel": (1,)}), ((), {"a/kernel": (1,)})]:
        with pytest.raises(ValueError, match="table and parameters differ"):
            expand(Table(rows), shapes)


# The engine.

TABLE = Table(
    (
        Row("w", "w/kernel", LINEAR),
        Row("blocks.{}.w", "blocks/kernel", LINEAR, "old.{}.weight"),
        Row("blocks.{}.b", "blocks/bias"),
    ),
    unused=(r"extra\..*",),
    copies={"tied": "w"},
)
SHAPES = {"w/kernel": (3, 2), "blocks/kernel": (2, 5, 4), "blocks/bias": (2, 4)}
FOUND = {"w": (2, 3), **{f"blocks.{i}.w": (4, 5) for i in range(2)}, **{f"blocks.{i}.b": (4,) for i in range(2)}}


def test_expand():
    pieces = {piece.hf_key: piece for piece in expand(TABLE, SHAPES)}
    assert {key: piece.shape for key, piece in pieces.items()} == FOUND
    assert (pieces["w"].layer, pieces["blocks.1.w"].layer, pieces["blocks.1.w"].alias) == (None, 1, "old.1.weight")


def test_match_takes_aliases_copies_and_unused():
    found = {**FOUND, "old.1.weight": (4, 5), "tied": (2, 3), "extra.a": (9,)}
    del found["blocks.1.w"]
    result = match(TABLE, SHAPES, found)
    assert result.problems == [] and result.unused == ["extra.a"] and result.copies == [("tied", "w")]
    assert {piece.hf_key: key for piece, key in result.pieces} == {key: key for key in FOUND} | {
        "blocks.1.w": "old.1.weight"
    }


@pytest.mark.parametrize(
    "change, problems",
    [
        ({"w": None}, ["missing: w, expected shape [2, 3]"]),
        ({"w": (3, 2)}, ["wrong shape: w, expected [2, 3], found [3, 2]"]),
        ({"w": ()}, ["wrong shape: w, expected [2, 3], found []"]),
        ({"else": (7,)}, ["unmapped: else, shape [7]"]),
        ({"blocks.2.b": (4,)}, ["unmapped: blocks.2.b, shape [4]"]),
        ({"xextra.a": ()}, ["unmapped: xextra.a, shape []"]),
        ({"old.0.weight": (4, 5)}, ["unmapped: old.0.weight, shape [4, 5]"]),
        (
            {"blocks.0.b": None, "blocks.1.w": (5, 4), "z": (1,)},
            ["missing: blocks.0.b", "wrong shape: blocks.1.w", "unmapped: z"],
        ),
        (
            {key: None for key in FOUND} | {"z": (1,)},
            ["the config has 2 layers, more than there are tensors (1)"],
        ),
    ],
)
def test_match_lists_every_problem(change, problems):
    found = {key: shape for key, shape in {**FOUND, **change}.items() if shape is not None}
    result = match(TABLE, SHAPES, found)
    assert len(result.problems) == len(problems)
    for line, start in zip(sorted(result.problems), sorted(problems), strict=True):
        assert line.startswith(start)
    assert all(found[key] == piece.shape for piece, key in result.pieces)


NAMES = st.text("abc", min_size=1, max_size=2)
TREES = st.recursive(
    st.dictionaries(NAMES, st.integers(), min_size=1, max_size=3),
    lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=3),
)


@given(TREES)
def test_flatten_and_unflatten(tree):
    flat = flatten(tree)
    assert unflatten(flat) == tree
    assert all(isinstance(value, int) for value in flat.values())


def test_flatten_names_paths():
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a/b": 1, "a/c/d": 2, "e": 3}


# Collected errors.


def test_errors_are_collected_into_one():
    errors: list[UserError] = []
    for problems in (["a", "b"], ["c"]):
        with collecting(errors):
            raise ConversionError("x", problems) if len(problems) > 1 else UserError(*problems)
    with pytest.raises(ConversionError, match=r"here: 3 problem\(s\)\n  a\n  b\n  c$") as caught:
        raise_all("here", errors)
    assert caught.value.problems == ["a", "b", "c"]
    with pytest.raises(UserError, match=r"^c$"):
        raise_all("here", errors[1:])
    raise_all("here", [])


def test_other_errors_are_not_collected():
    errors: list[UserError] = []
    with pytest.raises(ZeroDivisionError), collecting(errors):
        raise ZeroDivisionError
    assert errors == []
