"""Where arrays live: one mesh, one table of parameters' logical axes, one table from logical axes to mesh axes.

To change how one array is split, add a row with its path to `PARAMETER_AXES`, above the row that matches it: the first
match counts. To change what a logical axis is split over, in all arrays, set `config.mesh.rules`.

mesh axis   what is split over it
data        replicas of the model; the batch. The axis that crosses slices.
fsdp        parameters, gathered as they are needed; the batch
tensor      heads, hidden units of MLPs, vocabulary
"""

import contextlib
import contextvars
import dataclasses
import functools
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from ross_jax import lora
from ross_jax.config import ConfigError, Range, nearest

logger = logging.getLogger(__name__)

AXES = ("data", "fsdp", "tensor")
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "images": ("data", "fsdp", "tensor"),
    "replicas": ("data",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}
"""Logical axis -> mesh axes. A logical axis that is not in the table is never split. `config.mesh.rules` overrides
rows of the table, except those of `ROW_AXES`."""
ROW_AXES = ("batch", "replicas")
"""Logical axes of a batch's rows. The data pipeline divides rows among processes by them."""

PARAMETER_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"language/embedding", ("vocab", "embed")),
    (r"language/head", ("embed", "vocab")),
    (r"(.*/)?layers/(attention/)?(query|key|value)/kernel", (None, "embed", "heads")),
    (r"(.*/)?layers/(attention/)?(query|key|value)/bias", (None, "heads")),
    (r"(.*/)?layers/(attention/)?out/kernel", (None, "heads", "embed")),
    (r"(.*/)?layers/(mlp/)?(gate|up)/kernel", (None, "embed", "mlp")),
    (r"(.*/)?layers/(mlp/)?(gate|up)/bias", (None, "mlp")),
    (r"(.*/)?layers/mlp/gate_up/kernel", (None, "embed", None, "mlp")),
    (r"(.*/)?layers/mlp/gate_up/bias", (None, None, "mlp")),
    (r"(.*/)?layers/(mlp/)?down/kernel", (None, "mlp", "embed")),
    # Columns and rows take turns: split by columns alone, XLA computes wrong gradients on a 2x2x2 mesh.
    (r"(projector|regressor)/linear_\d*[02468]/kernel", ("embed", "mlp")),
    (r"(projector|regressor)/linear_\d*[13579]/kernel", ("mlp", "embed")),
    (r"(vision|teacher)/position_embedding", (None, "embed")),
    (r"(vision|teacher)/patch_embedding/kernel", (None, None, None, "embed")),
    # Every matrix of the denoiser runs on all tokens of an image: only rows are split, and gathered before use.
    (r"denoiser/blocks/.*/kernel", (None, "embed", None)),
    (r"denoiser/(\w+)/kernel", ("embed", None)),
    # Norm scales, remaining biases and the frozen autoencoder are small: replicated on every device.
    (r".*", ()),
)
"""Path pattern -> logical axis of each dimension; the first match counts. The only declaration of a parameter's axes:
`models.layers.Dense` looks its kernel up here too. Low-rank factors have the axes of their kernel."""
LARGE = 2**22
"""Elements from which a replicated array is worth a line in the log."""
FSDP_AT_MOST = 64
"""Devices that share one copy of the parameters if the recipe leaves the mesh open. Parameters then take little of a
device's memory, and a wider axis would only make each gather slower."""

_rules: contextvars.ContextVar[Mapping[str, tuple[str, ...]]] = contextvars.ContextVar("rules", default=RULES)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1: all that are left.

    With both `data` and `fsdp` -1, fsdp takes what is left, at most 64 devices and a TPU slice, and data the rest.

    Attributes:
      rules: (logical axis, mesh axes) pairs that override rows of `RULES`: `(("vocab", ()), ("mlp", ("tensor",)))`.
    """

    data: Annotated[int, Range(-1, 2**20)] = 1
    fsdp: Annotated[int, Range(-1, 2**20)] = -1
    tensor: Annotated[int, Range(-1, 2**20)] = 1
    rules: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def __post_init__(self):
        for axis, names in self.rules:
            free = [name for name in RULES if name not in ROW_AXES]
            if axis not in free:
                raise ValueError(f"rules: {axis!r} is no logical axis to set{nearest(axis, free)}; there are {free}")
            for name in names:
                if name not in AXES or names.count(name) > 1:
                    raise ValueError(f"rules: {axis!r} -> {names}: expected some of the mesh axes {AXES}, each once")
        sizes = (self.data, self.fsdp, self.tensor)
        both = self.data == self.fsdp == -1 != self.tensor
        if any(size < 1 and size != -1 for size in sizes) or (sizes.count(-1) > 1 and not both):
            named = f"data={self.data} fsdp={self.fsdp} tensor={self.tensor}"
            raise ValueError(f"mesh sizes {named} must be positive; -1 (what is left): one, or data and fsdp")


def parse_mesh(text: str) -> MeshConfig:
    """The config that `--mesh` of a launcher names, such as `data=2,tensor=4`.

    Raises:
      ConfigError: other words.
    """
    try:
        sizes = dict(part.split("=") for part in text.split(","))
        if unknown := set(sizes) - {"data", "fsdp", "tensor"}:
            raise ValueError(f"no axis {min(unknown)!r}; there are data, fsdp and tensor")
        axes: dict[str, Any] = {name: int(size) for name, size in sizes.items()}
        return MeshConfig(**axes)
    except ValueError as error:
        raise ConfigError(f"--mesh {text}: expected AXIS=SIZE,... such as data=2,tensor=4 ({error})") from error


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices; of several slices the data axis crosses them.

    Raises:
      ConfigError: sizes that do not multiply to the number of devices, says which would; TPU slices that do not divide
        the data axis.
    """
    devices = list(jax.devices() if devices is None else devices)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    sizes = {axis: getattr(config, axis) for axis in AXES}
    if config.data == config.fsdp == -1:
        left = len(devices) // config.tensor // (slices if devices[0].platform == "tpu" else 1)
        sizes["fsdp"] = max((n for n in range(1, min(left, FSDP_AT_MOST) + 1) if left % n == 0), default=1)
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % known or (-1 not in sizes.values() and known != len(devices)):
        divisors = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
        raise ConfigError(
            f"mesh data={config.data} fsdp={config.fsdp} tensor={config.tensor}: does not divide {len(devices)} "
            f"devices; sizes among {divisors} whose product is {len(devices)} do, or -1 for what is left"
        )
    shape = tuple(len(devices) // known if size == -1 else size for size in sizes.values())
    types = (AxisType.Auto,) * len(AXES)
    if slices == 1:
        array = create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(array, AXES, axis_types=types)
    if devices[0].platform != "tpu":  # hosts of GPUs, which JAX calls slices too; in the order of their processes
        return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=types)
    if shape[0] % slices:
        raise ConfigError(
            f"mesh data={shape[0]} fsdp={shape[1]} tensor={shape[2]}: {slices} TPU slices need a data axis that is a "
            f"multiple of {slices}, as only that axis crosses slices; --config.mesh.data={slices} is the least"
        )
    within = (shape[0] // slices, *shape[1:])
    array = create_hybrid_device_mesh(within, (slices, 1, 1), devices, allow_split_physical_axes=True)
    return Mesh(array, AXES, axis_types=types)


@contextlib.contextmanager
def use_mesh(mesh: Mesh, config: MeshConfig | None = None) -> Iterator[None]:
    """Makes `mesh` ambient, with the rules of `config`, for everything that is traced inside."""
    with jax.set_mesh(mesh):
        token = _rules.set(_rules.get() if config is None else RULES | dict(config.rules))
        try:
            yield
        finally:
            _rules.reset(token)


def compiler_options(device: jax.Device) -> dict[str, int | float] | None:
    """XLA's options for the training step on devices of this kind; None for XLA's defaults.

    `spmd_threshold_for_windowed_einsum` keeps XLA from gathering weights in pieces beside the product that reads them.
    Where `tensor` splits what `fsdp` leaves of the weights, the pieces are so small that the step takes twice as long.

    `convolution_performance_target` lets XLA take a smaller kernel if it is nearly as fast as the fastest one by XLA's
    estimate. On v5e, v5p and v6e the step is as fast, and compiles in half of the time. v4 and v7x keep XLA's default.
    """
    if device.platform != "tpu":
        return None
    options: dict[str, int | float] = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 2**20}
    if device.device_kind not in ("TPU v4", "TPU7x"):
        options["xla_jf_convolution_performance_target"] = 0.985
    return options


def partition(shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How an array with these logical axes is split, by the ambient rules.

    A dimension that its mesh axes do not divide is split over the first of them that do, or stays whole.

    Raises:
      ConfigError: two dimensions claim the same mesh axis.
    """
    rules, spec, claimed = _rules.get(), [], {}
    for size, axis in zip(shape, axes + (None,) * (len(shape) - len(axes)), strict=True):
        names = tuple(name for name in rules.get(axis, ()) if mesh.shape[name] > 1) if axis else ()
        for name in names:
            if name in claimed:
                raise ConfigError(
                    f"mesh.rules: logical axes {claimed[name]!r} and {axis!r} of one array are both split over mesh "
                    f"axis {name!r}"
                )
        while size % math.prod(mesh.shape[name] for name in names):
            names = names[:-1]
        claimed |= dict.fromkeys(names, axis)
        spec.append(names[0] if len(names) == 1 else names or None)
    return PartitionSpec(*spec)


def logical_axes(path: str, ndim: int | None = None) -> tuple[str | None, ...]:
    """The logical axis of each dimension of the parameter at `path`.

    Args:
      ndim: dimensions of the array at hand, if it is one layer of a stacked parameter. None: of the whole parameter.
    """
    layer, _, name = path.rpartition("/")
    if name in (lora.A, lora.B):  # the kernel's rows or columns, and the rank
        axes = logical_axes(f"{layer}/kernel")
        axes = (*axes[:-1], None) if name == lora.A else (*axes[:-2], None, *axes[-1:])
    else:
        axes = next(axes for pattern, axes in PARAMETER_AXES if re.fullmatch(pattern, path))
    return axes if ndim is None else axes[max(0, len(axes) - ndim) :]


def why_replicated(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> str | None:
    """Why a parameter is replicated on every device; None if it is split."""
    axes = logical_axes(path)
    if any(partition(shape, axes, mesh)):
        return None
    named = [axis for axis in axes if axis]
    return f"no dimension of {named} divides its mesh axes" if named else "the table replicates it"


def parameter_shardings(
    shapes: Mapping[str, Any], mesh: Mesh | AbstractMesh, config: MeshConfig | None = None
) -> dict[str, NamedSharding]:
    """A sharding for each leaf (path -> anything with a shape). Logs large leaves that are replicated, and why.

    Args:
      config: its rules count. None: the ambient rules.

    Raises:
      ConfigError: a rule that cannot split an array; names the axes and the array.
    """
    shardings = {}
    token = _rules.set(_rules.get() if config is None else RULES | dict(config.rules))
    try:
        for path, leaf in shapes.items():
            try:
                shardings[path] = NamedSharding(mesh, partition(leaf.shape, logical_axes(path), mesh))
            except ConfigError as error:
                raise ConfigError(f"{path} {list(leaf.shape)}: {error}") from error
            why = why_replicated(path, leaf.shape, mesh)
            if why and mesh.size > 1 and math.prod(leaf.shape) >= LARGE:
                logger.info("%s %s is replicated on every device: %s", path, leaf.shape, why)
    finally:
        _rules.reset(token)
    return shardings


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch, split over all replicas."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def process_share(mesh: Mesh) -> tuple[int, int]:
    """Which of how many equal shares of a batch's rows this process holds.

    Processes whose devices hold the same rows, as where a replica's tensor axis spans them, have the same share.

    Raises:
      ConfigError: processes that hold some of the same rows, but not all.
    """
    replicas = mesh.shape["data"] * mesh.shape["fsdp"]
    rows: dict[int, set[int]] = {}
    for device, (index, *_) in batch_sharding(mesh).devices_indices_map((replicas,)).items():
        rows.setdefault(device.process_index, set()).update(range(*index.indices(replicas)))
    shares = sorted({tuple(sorted(held)) for held in rows.values()})
    if sum(map(len, shares)) != replicas:
        raise ConfigError(
            f"mesh data={mesh.shape['data']} fsdp={mesh.shape['fsdp']} tensor={mesh.shape['tensor']}: the rows of a "
            f"batch do not divide among {len(rows)} processes; let tensor divide the devices of a process, or they it"
        )
    return shares.index(tuple(sorted(rows[jax.process_index()]))), len(shares)


def axis_size(logical: str) -> int:
    """Shares that a logical axis is split into on the ambient mesh; 1 outside one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in _rules.get()[logical])


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Asks the compiler to split an activation along logical axes; does nothing outside a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(x.shape, axes, mesh))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Asks the compiler to gather a parameter along `embed`, and to split its gradient again.

    `embed` is the axis that `fsdp` splits by default. Without axes XLA decides, and may move activations instead of
    parameters. The gradient of `constrain` would be
    gathered on every device before it is split.
    """
    return constrain(x, *(None if axis == "embed" else axis for axis in axes)) if axes else x


def scatter(gradient: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Asks the compiler to split the gradient of a gathered parameter as the parameter is split."""
    return constrain(gradient, *axes) if axes else gradient


gather.defvjp(lambda x, axes: (gather(x, axes), None), lambda axes, _, gradient: (scatter(gradient, axes),))
