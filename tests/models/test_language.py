"""The decoder on a mesh: parameters and their gradients move between devices, activations of the batch do not."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec

from ross_jax.models.language import LanguageModel
from ross_jax.models.ross import RossConfig, abstract_params
from ross_jax.sharding import MeshConfig, batch_sharding, make_mesh, parameter_shardings
from ross_jax.tree import flatten, unflatten
from tiny import CONFIG

LENGTH = 24


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 4, 1), (1, 4, 2), (2, 2, 2)])
def test_no_device_holds_the_hidden_states_of_all_rows(sizes):
    """Each device holds the hidden states of its own rows only, whichever mesh axes split the rows."""
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


def test_every_kernel_is_gathered_forward_and_back_and_its_gradient_split():
    """Each kernel is gathered in both passes, because kept copies would fill the memory, and its gradient is split."""
    mesh, config = make_mesh(MeshConfig(1, 4, 2)), CONFIG.language
    model = LanguageModel(config)
    inputs = model.input_spec(4, LENGTH)
    params = jax.eval_shape(model.init, jax.random.key(0), *model.input_spec())["params"]
    with jax.set_mesh(mesh):
        gradient = jax.grad(lambda params, *inputs: model.apply({"params": params}, *inputs).hidden.sum())
        found = Counter(constraints(jax.make_jaxpr(gradient)(params, *inputs).jaxpr))
    expected = Counter()
    for path, sharding in parameter_shardings(flatten({"language": {"layers": params["layers"]}}), mesh).items():
        if path.endswith("kernel"):
            _, *split = sharding.spec
            expected[PartitionSpec(*split)] += 1
            expected[PartitionSpec(*(None if axis == "fsdp" else axis for axis in split))] += 2
    assert sum(expected.values()) == 3 * 7 and found == expected


def constraints(jaxpr):
    """Yields the sharding constraints of matrices, at any depth. Activations have more axes and are left out."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "sharding_constraint" and equation.outvars[0].aval.ndim == 2:
            yield equation.params["sharding"].spec
        for inner in jaxprs_in_params(equation.params):
            yield from constraints(inner)
