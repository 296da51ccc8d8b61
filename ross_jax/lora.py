"""Low-rank updates of kernels (LoRA, arXiv 2106.09685).

    y = x @ kernel + scale * (x @ lora_a) @ lora_b

The factors are leaves beside the kernel that they update. `models.layers.Dense` adds their product where they are.

    kernel      [*layers, inputs, outputs]
    lora_a      [*layers, inputs, rank]
    lora_b      [*layers, rank, outputs]
    lora_scale  [*layers]                   alpha / rank, which never trains
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from ross_jax.config import ConfigError, Positive, Share, Whole, check_patterns, nearest

A, B, SCALE = "lora_a", "lora_b", "lora_scale"
"""Names of the leaves beside a kernel."""
COMPONENTS = ("projector", "language")
"""Components whose kernels can have factors."""
TRAINED = rf".*/({A}|{B})"
"""Pattern of the paths of factors that train."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank updates in place of full training.

    In a component with a target only factors train. `freeze` decides about the other components.

    Attributes:
      rank: rank of each update. 0: there are no updates.
      alpha: an update is scaled by alpha / rank. None: twice the rank.
      dropout: share of the inputs of the updates that are zeroed in training.
      targets: patterns of the paths of kernels that are updated.
    """

    rank: Whole = 0
    alpha: Positive | None = None
    dropout: Share = 0.0
    targets: tuple[str, ...] = (r"language/.*",)

    def __post_init__(self):
        check_patterns("targets", self.targets)
        if self.dropout >= 1:
            raise ValueError(f"dropout {self.dropout} must be in [0, 1)")

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return 2.0 if self.alpha is None else self.alpha / self.rank

    def kernels(self, paths: Iterable[str]) -> list[str]:
        """Paths of the kernels that have a low-rank update.

        Raises:
          ConfigError: a pattern matches no kernel that can be updated.
        """
        if not self.rank:
            return []
        possible = [path for path in paths if re.fullmatch(rf"({'|'.join(COMPONENTS)})/.*/kernel", path)]
        for pattern in self.targets:
            if not any(re.fullmatch(pattern, path) for path in possible):
                raise ConfigError(
                    f"config.lora.targets: {pattern!r} matches no kernel{nearest(pattern, possible)}; there are "
                    f"{', '.join(possible)}"
                )
        if not self.targets:
            raise ConfigError(f"config.lora.targets: is empty, but config.lora.rank is {self.rank}; set it to 0")
        return [path for path in possible if any(re.fullmatch(pattern, path) for pattern in self.targets)]


class Factors(NamedTuple):
    """Paths of a kernel's factors."""

    a: str
    b: str
    scale: str


def factors_of(kernel: str) -> Factors:
    """Paths of the factors beside the kernel at a path."""
    layer = kernel.removesuffix("kernel")
    return Factors(layer + A, layer + B, layer + SCALE)


def is_factor(path: str) -> bool:
    """Whether a path is that of a factor, or of its scale."""
    return path.rpartition("/")[2] in (A, B, SCALE)


def updated_kernels(paths: Iterable[str]) -> list[str]:
    """Paths of the kernels that have factors."""
    return [path.removesuffix(A) + "kernel" for path in paths if path.endswith(f"/{A}")]


def add_factors(shapes: Mapping[str, Any], lora: LoraConfig) -> dict[str, Any]:
    """Shapes by path, with those of the factors beside each kernel that `lora` updates."""
    found = dict(shapes)
    for kernel in lora.kernels(shapes):
        *layers, inputs, outputs = shapes[kernel].shape
        made = ((*layers, inputs, lora.rank), (*layers, lora.rank, outputs), tuple(layers))
        found |= {
            path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in zip(factors_of(kernel), made, strict=True)
        }
    return found


def init_factor(path: str, shape: tuple[int, ...], lora: LoraConfig, key: Array) -> Array:
    """The first values of a factor, as in peft: A uniform in +-1 / sqrt(inputs), B zero. float32."""
    name = path.rpartition("/")[2]
    if name == A:
        bound = shape[-2] ** -0.5
        return jax.random.uniform(key, shape, minval=-bound, maxval=bound)
    return jnp.full(shape, 0.0 if name == B else lora.scale)


# Merging.


def hide_factors(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Shapes of a model whose updates are merged into its kernels, which are then float32 as all that was trained."""
    merged = {path: jax.ShapeDtypeStruct(leaves[path].shape, jnp.float32) for path in updated_kernels(leaves)}
    return {path: merged.get(path, leaf) for path, leaf in leaves.items() if not is_factor(path)}


def restore_merged(
    leaves: Mapping[str, Any], stored: Mapping[str, Any], restore: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """Values of the leaves, with stored updates merged into each kernel whose factors are not among the leaves.

    Args:
      leaves: path -> `jax.ShapeDtypeStruct`, as `checkpoints.restore` takes it.
      stored: path -> shape and dtype of everything that is stored.
      restore: reads leaves.
    """
    merging = [path for path in updated_kernels(stored) if path in leaves and factors_of(path).a not in leaves]
    asked = dict(leaves)
    for kernel in merging:
        leaf = leaves[kernel]
        sharding = leaf.sharding
        if isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, PartitionSpec())
        for path in factors_of(kernel):
            asked[path] = jax.ShapeDtypeStruct(stored[path].shape, jnp.float32, sharding=sharding)
        dtype = jnp.promote_types(leaf.dtype, stored[kernel].dtype)
        asked[kernel] = jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
    found = restore(asked)
    for kernel in merging:
        factors = [found.pop(path) for path in factors_of(kernel)]
        found[kernel] = merge_update(found[kernel], *factors, leaves[kernel])
    return found


def merge_update(kernel: Any, a: Any, b: Any, scale: Any, leaf: jax.ShapeDtypeStruct) -> Any:
    """`kernel + scale * a @ b`, computed in float32 one layer after another.

    Args:
      leaf: dtype and sharding of the result. Without a sharding, NumPy computes.
    """
    if leaf.sharding is not None:
        return jax.jit(_merge_stack, static_argnums=4, out_shardings=leaf.sharding)(kernel, a, b, scale, leaf.dtype)
    merged = kernel if kernel.dtype == leaf.dtype else np.empty(leaf.shape, leaf.dtype)
    for layer in np.ndindex(leaf.shape[:-2]):
        merged[layer] = kernel[layer].astype(np.float32) + scale[layer] * (a[layer] @ b[layer])
    return merged


def _merge_stack(kernel: Array, a: Array, b: Array, scale: Array, dtype: Any) -> Array:
    def merge(kernel: Array, a: Array, b: Array, scale: Array) -> Array:
        product = jnp.matmul(a, b, precision="highest")
        return (kernel.astype(jnp.float32) + scale * product).astype(dtype)

    if kernel.ndim == 2:
        return merge(kernel, a, b, scale)
    return jax.lax.map(lambda layer: merge(*layer), (kernel, a, b, scale))
