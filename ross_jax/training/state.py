"""The state of a run, and the split of its parameters into a trained and a frozen tree."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from ross_jax import lora
from ross_jax.config import ConfigError, Dtype, check_patterns
from ross_jax.lora import LoraConfig
from ross_jax.models.ross import HEADS, TARGET_ENCODERS, RossConfig, abstract_params, components
from ross_jax.sharding import MeshConfig, parameter_shardings
from ross_jax.tree import flatten, unflatten

Tree = dict[str, Any]


class TrainState(NamedTuple):
    """A run's state.

    Attributes:
      step: optimizer steps done.
      params: trained parameters, float32.
      opt_state: the optimizer's state, over `params`.
      frozen: the other parameters, in their compute dtype: no gradient, no optimizer state.
    """

    step: Int[Array, ""]
    params: Tree
    opt_state: Any
    frozen: Tree


@dataclasses.dataclass(frozen=True)
class FreezeConfig:
    """Which parameters train. Target encoders (autoencoder, teacher) never do.

    Attributes:
      trainable: patterns of paths that train.
      fixed: patterns of paths that do not train although `trainable` matches, such as the denoiser's position table.
      dtype: of frozen parameters.
      autoencoder_dtype: of the autoencoder's parameters and activations.
    """

    trainable: tuple[str, ...]
    fixed: tuple[str, ...] = (r"denoiser/position_embedding",)
    dtype: Dtype = "bfloat16"
    autoencoder_dtype: Dtype = "bfloat16"

    def __post_init__(self):
        check_patterns("trainable", self.trainable)
        check_patterns("fixed", self.fixed)

    def trains(self, path: str) -> bool:
        """Whether the parameter at `path` trains."""
        if path.partition("/")[0] in TARGET_ENCODERS:
            return False
        trainable = any(re.fullmatch(pattern, path) for pattern in self.trainable)
        return trainable and not any(re.fullmatch(pattern, path) for pattern in self.fixed)

    def storage_dtype(self, path: str) -> jnp.dtype:
        """float32 for trained parameters, heads and factors, else the frozen dtype."""
        if self.trains(path) or path.partition("/")[0] in HEADS or lora.is_factor(path):
            return jnp.dtype(jnp.float32)
        return jnp.dtype(self.autoencoder_dtype if path.startswith("autoencoder/") else self.dtype)

    def with_updates(self, config: RossConfig, lora_config: LoraConfig) -> "FreezeConfig":
        """This config where kernels have low-rank updates: in their components, factors train and nothing else.

        Raises:
          ConfigError: a target matches no kernel.
        """
        kernels = lora_config.kernels(flatten(abstract_params(config))) if lora_config.rank else []
        if not kernels:
            return self
        components = "|".join(sorted({path.partition("/")[0] for path in kernels}))
        trainable, fixed = (*self.trainable, lora.TRAINED), (*self.fixed, rf"({components})/(?!{lora.TRAINED}$).*")
        return dataclasses.replace(self, trainable=trainable, fixed=fixed)


def split(tree: Mapping[str, Any], freeze: FreezeConfig) -> tuple[Tree, Tree]:
    """The trained and the frozen part of a tree.

    Raises:
      ConfigError: nothing trains.
    """
    flat = flatten(tree)
    params = {path: leaf for path, leaf in flat.items() if freeze.trains(path)}
    if not params:
        raise ConfigError(f"trainable {list(freeze.trainable)}: no parameter's path matches any of these")
    return unflatten(params), unflatten({path: leaf for path, leaf in flat.items() if path not in params})


def abstract_tree(
    config: RossConfig,
    freeze: FreezeConfig,
    mesh: Mesh,
    rules: MeshConfig | None = None,
    updates: LoraConfig | None = None,
) -> Tree:
    """Shapes of all parameters, with the dtype and sharding that training keeps them in.

    Args:
      rules: config of the mesh whose rules count. None: the ambient rules.
      updates: low-rank updates, whose factors are among the parameters.
    """
    flat = flatten(abstract_params(config))
    if updates is not None:
        flat = lora.add_factors(flat, updates)
    shardings = parameter_shardings(flat, mesh, rules)
    return unflatten(
        {
            path: jax.ShapeDtypeStruct(leaf.shape, freeze.storage_dtype(path), sharding=shardings[path])
            for path, leaf in flat.items()
        }
    )


def init_components(config: RossConfig, tree: Tree, names: Iterable[str], key: Array) -> Tree:
    """Random parameters of the named components, without factors, created with their final sharding.

    Args:
      tree: of `abstract_tree`.
      key: of the run; each component's name is folded in, so that its values do not depend on the others.
    """
    modules = components(config)
    made = {}
    for name in names:
        if not tree.get(name):
            continue
        specs = unflatten({path: spec for path, spec in flatten(tree[name]).items() if not lora.is_factor(path)})

        def init(key: Array, module=modules[name], specs=specs) -> Tree:
            inputs = [jnp.zeros(spec.shape, spec.dtype) for spec in module.input_spec()]
            params = module.init(key, *inputs)["params"]
            return jax.tree.map(lambda leaf, spec: leaf.astype(spec.dtype), params, specs)

        shardings = jax.tree.map(lambda spec: spec.sharding, specs)
        made[name] = jax.jit(init, out_shardings=shardings)(_fold(key, name))
    return made


def init_factors(tree: Tree, updates: LoraConfig, key: Array) -> Tree:
    """The first factors of low-rank updates, created with their final sharding.

    Args:
      tree: of `abstract_tree`.
      key: of the run; each path is folded in.
    """
    specs = {path: spec for path, spec in flatten(tree).items() if lora.is_factor(path)}

    def init(key: Array) -> dict[str, Array]:
        return {path: lora.init_factor(path, spec.shape, updates, _fold(key, path)) for path, spec in specs.items()}

    return unflatten(jax.jit(init, out_shardings={path: spec.sharding for path, spec in specs.items()})(key))


def _fold(key: Array, name: str) -> Array:
    return jax.random.fold_in(key, sum(ord(letter) * 257**i for i, letter in enumerate(name)) % 2**31)


def state_shardings(state: TrainState, params: Tree, mesh: Mesh) -> TrainState:
    """Shardings of a whole state from the shardings of its parameters.

    A moment of the optimizer is split as its parameter, whose path ends the moment's path; counters are replicated.

    Args:
      state: shapes, of `jax.eval_shape`.
      params: shapes with shardings, trainable and frozen together.
    """
    by_path = {path: leaf.sharding for path, leaf in flatten(params).items()}
    replicated = NamedSharding(mesh, PartitionSpec())

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
        # An optimizer's own dictionaries may stand before the parameter's path.
        for start in range(len(names)):
            found = by_path.get("/".join(names[start:]))
            if found is not None and leaf.ndim:
                return found
        return replicated

    return jax.tree_util.tree_map_with_path(place, state)
