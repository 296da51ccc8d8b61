"""What a run carries from step to step, and how the parameter tree is split into what trains and what does not."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from ross_jax.config import ConfigError
from ross_jax.models.ross import RossConfig, abstract_params, components
from ross_jax.sharding import parameter_shardings
from ross_jax.tree import flatten, unflatten

Tree = dict[str, Any]


class TrainState(NamedTuple):
    """A run's state.

    Attributes:
      step: optimizer steps done.
      params: what trains; float32 masters.
      opt_state: of the optimizer, over `params`.
      frozen: the rest of the tree, in its compute dtype: no gradient, no optimizer state.
    """

    step: Int[Array, ""]
    params: Tree
    opt_state: Any
    frozen: Tree


@dataclasses.dataclass(frozen=True)
class FreezeConfig:
    """Which parameters train. Autoencoder and teacher, of which targets are made, never do.

    Attributes:
      trainable: patterns of paths that train.
      fixed: patterns of paths that never do, even so; the denoiser's position table is one.
      dtype: of frozen parameters.
      autoencoder_dtype: of the autoencoder, and what it computes in.
    """

    trainable: tuple[str, ...]
    fixed: tuple[str, ...] = (r"denoiser/position_embedding",)
    dtype: str = "bfloat16"
    autoencoder_dtype: str = "bfloat16"

    def trains(self, path: str) -> bool:
        """Whether the parameter at `path` trains."""
        if path.startswith(("autoencoder/", "teacher/")):
            return False
        wanted = any(re.fullmatch(pattern, path) for pattern in self.trainable)
        return wanted and not any(re.fullmatch(pattern, path) for pattern in self.fixed)

    def storage_dtype(self, path: str) -> jnp.dtype:
        """float32 for what trains and for what reads the visual outputs, else the frozen dtype."""
        if self.trains(path) or path.startswith(("denoiser/", "regressor/")):
            return jnp.dtype(jnp.float32)
        return jnp.dtype(self.autoencoder_dtype if path.startswith("autoencoder/") else self.dtype)


def split(tree: Mapping[str, Any], freeze: FreezeConfig) -> tuple[Tree, Tree]:
    """The part that trains and the rest.

    Raises:
      ConfigError: nothing trains.
    """
    flat = flatten(tree)
    params = {path: leaf for path, leaf in flat.items() if freeze.trains(path)}
    if not params:
        raise ConfigError(f"trainable {list(freeze.trainable)}: no parameter's path matches any of these")
    return unflatten(params), unflatten({path: leaf for path, leaf in flat.items() if path not in params})


def abstract_tree(config: RossConfig, freeze: FreezeConfig, mesh: Mesh) -> Tree:
    """The whole tree as shapes with the dtype and sharding that training keeps it in."""
    flat = flatten(abstract_params(config))
    shardings = parameter_shardings(flat, mesh)
    return unflatten(
        {
            path: jax.ShapeDtypeStruct(leaf.shape, freeze.storage_dtype(path), sharding=shardings[path])
            for path, leaf in flat.items()
        }
    )


def init_components(config: RossConfig, tree: Tree, names: Iterable[str], key: Array) -> Tree:
    """Random parameters of the named components, made where they are to live.

    Args:
      tree: of `abstract_tree`.
      key: of the run; each component's is folded in by name, so that one's values do not depend on the others.
    """
    modules = components(config)
    made = {}
    for name in names:
        if not tree.get(name):
            continue
        wanted = tree[name]

        def init(key: Array, module=modules[name], wanted=wanted) -> Tree:
            inputs = [jnp.zeros(spec.shape, spec.dtype) for spec in module.input_spec()]
            params = module.init(key, *inputs)["params"]
            return jax.tree.map(lambda leaf, spec: leaf.astype(spec.dtype), params, wanted)

        shardings = jax.tree.map(lambda spec: spec.sharding, wanted)
        number = sum(ord(letter) * 257**i for i, letter in enumerate(name)) % 2**31
        made[name] = jax.jit(init, out_shardings=shardings)(jax.random.fold_in(key, number))
    return made


def state_shardings(state: TrainState, params: Tree, mesh: Mesh) -> TrainState:
    """Shardings of a whole state from those of its parameters.

    Moments of the optimizer are placed as the parameter whose path ends theirs; counters are on every device.

    Args:
      state: shapes, of `jax.eval_shape`.
      params: shapes with shardings, trainable and frozen together.
    """
    by_path = {path: leaf.sharding for path, leaf in flatten(params).items()}
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
        # An optimizer's own dictionaries may stand before the parameter's path.
        for start in range(len(names)):
            found = by_path.get("/".join(names[start:]))
            if found is not None and leaf.ndim:
                return found
        return everywhere

    return jax.tree_util.tree_map_with_path(place, state)
