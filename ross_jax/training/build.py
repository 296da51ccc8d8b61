"""A run's step and state as shapes and functions: nothing is allocated, no data is opened."""

from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from ross_jax.objectives.loss import make_loss
from ross_jax.sharding import batch_sharding
from ross_jax.training.optimizer import learning_rates, make_optimizer
from ross_jax.training.recipe import RunConfig
from ross_jax.training.state import TrainState, Tree, split, state_shardings
from ross_jax.training.step import compile_step, make_state, make_train_step


class StepProgram(NamedTuple):
    """A run's step and the shapes of its state.

    Attributes:
      tree: shapes, dtypes and shardings of all parameters.
      state: shapes, dtypes and shardings of the whole state.
      optimizer: makes the state's moments.
      train_step: the jitted (state, batch) -> (state, metrics).
    """

    tree: Tree
    state: TrainState
    optimizer: optax.GradientTransformation
    train_step: Any


def build_step(config: RunConfig, mesh: Mesh, steps: int) -> StepProgram:
    """The step of a run of `steps` steps on `mesh`, whose devices need not exist."""
    tree = config.abstract_tree(mesh)
    optimizer = make_optimizer(config.optimizer, steps)
    params, frozen = split(tree, config.freezing)
    shapes = jax.eval_shape(lambda p, f: make_state(p, f, optimizer), params, frozen)
    shardings = state_shardings(shapes, tree, mesh)
    state = jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, shardings)
    loss = make_loss(
        config.model,
        config.reconstruction,
        config.step.dtype,
        config.step.remat,
        config.lora.dropout if config.lora.rank else 0.0,
        text_weight=config.text.weight,
        chunk=config.step.text_chunk,
        supervised=config.data.packing.supervised,
        sources=len(config.data.sources) if len(config.data.sources) > 1 else 0,
    )
    step = make_train_step(
        loss,
        optimizer,
        jax.random.fold_in(jax.random.key(config.seed), 1),
        config.step.accumulate,
        learning_rates(config.optimizer, steps),
    )
    return StepProgram(tree, state, optimizer, compile_step(step, shardings, batch_sharding(mesh)))
