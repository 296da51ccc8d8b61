"""The decoder on a mesh: parameters and their gradients move between devices, not a batch of activations."""

import re

import jax
import jax.numpy as jnp
import pytest

from ross_jax.models.language import LanguageModel
from ross_jax.models.ross import RossConfig, abstract_params
from ross_jax.sharding import MeshConfig, batch_sharding, make_mesh, parameter_shardings
from ross_jax.tree import flatten, unflatten
from tiny import CONFIG

LENGTH = 24


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 4, 1), (1, 4, 2), (2, 2, 2)])
def test_no_device_holds_the_hidden_states_of_all_rows(sizes):
    """Without columns for a step between, XLA made them whole where the data axis has several devices."""
    mesh, config = make_mesh(MeshConfig(*sizes)), CONFIG.language
    model = LanguageModel(config, jnp.float32, "full")
    flat = flatten(abstract_params(RossConfig(language=config)))
    split = parameter_shardings(flat, mesh)
    flat = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=split[path]) for path, leaf in flat.items()}
    rows = sizes[0] * sizes[1]
    tokens = jax.ShapeDtypeStruct((rows, LENGTH), jnp.int32, sharding=batch_sharding(mesh))

    def loss(params, tokens):
        embeddings = model.apply({"params": params}, tokens, method="embed")
        return jnp.square(model.apply({"params": params}, embeddings, tokens, tokens).hidden).sum()

    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(loss), out_shardings=unflatten(split)["language"])
        text = program.lower(unflatten(flat)["language"], tokens).compile().as_text()
    shapes = {tuple(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", text)}
    assert (1, LENGTH, config.hidden_size) in shapes and (rows, LENGTH, config.hidden_size) not in shapes
