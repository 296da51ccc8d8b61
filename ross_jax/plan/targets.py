"""What a program can be compiled for without owning it: TPU slices through libtpu, GPUs through the CUDA plugin."""

import dataclasses
import importlib.util
import math
import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from ross_jax.config import ConfigError, UserError, nearest
from ross_jax.plan.cost import Timing
from ross_jax.training.metrics import PEAK_FLOPS

GIB = 2**30
KERNEL_UTILISATION = 0.5
"""Share of the peak that a hand-written kernel is assumed to reach."""
GPU_UTILISATION = 0.5
"""Share of the peak that a GPU's matrix products are assumed to reach; its compiler estimates no cycles."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device, as its compiler and its vendor describe it. A core of v7x, of which a chip has two, is a device.

    Attributes:
      kind: JAX's name of the device, by which `PEAK_FLOPS` knows it.
      memory: bytes that a program can use: of a TPU, what its compiler says is available; of a GPU, `GPU_SHARE` of
        what its driver reports.
      installed: bytes that it has.
      link: bytes per second along an axis of a TPU's torus, both directions together; between GPUs of a host, one way.
      network: bytes per second between slices or, of GPUs, hosts; per device, one way.
      clock: Hz of the cycles that the compiler estimates; None without such.
      validated: the method was reported with this clock.
    """

    kind: str
    memory: int
    installed: int
    link: float
    network: float
    clock: float | None = None
    validated: bool = False

    @property
    def peak(self) -> float:
        """Dense bfloat16 FLOP/s."""
        return PEAK_FLOPS[self.kind]


# Usable memory is what libtpu 0.0.52 names when a program does not fit. Clocks are those with which its cycles met
# published runs (v5e, v5p, v6e), the published one (v4), or follow from the peak at 4 matrix units of 256 x 256 (v7x).
# Networks: a chip's share of what is published for a pod (v5e, v6e) or of its host's cards (200 Gbit/s for 4 chips; of
# v7x 100 Gbit/s a chip).
TPUS = {
    "v4": Chip("TPU v4", int(30.75 * GIB), 32 * GIB, 90e9, 6.25e9, 1.05e9),
    "v5e": Chip("TPU v5 lite", int(15.75 * GIB), 16 * GIB, 90e9, 3.125e9, 1.503e9, validated=True),
    "v5p": Chip("TPU v5", int(95.73 * GIB), 96 * GIB, 180e9, 6.25e9, 1.751e9, validated=True),
    "v6e": Chip("TPU v6 lite", int(31.24 * GIB), 32 * GIB, 180e9, 12.5e9, 1.751e9, validated=True),
    "v7x": Chip("TPU7x", int(94.74 * GIB), 96 * GIB, 180e9, 6.25e9, 2.2e9),
}
GPU_SHARE = 0.9
"""Share of a GPU's memory that JAX is to take: XLA_PYTHON_CLIENT_MEM_FRACTION, without which it takes 0.75."""


@dataclasses.dataclass(frozen=True)
class Gpu(Chip):
    """What XLA must know of a GPU to compile for it: figures of its data sheet and of its driver.

    Attributes:
      capability: CUDA compute capability.
      cores: streaming multiprocessors.
      units: floating-point units of each.
      bandwidth: of its memory, bytes per second.
      cache: L2, bytes.
      ghz: clock.
      shared: bytes of shared memory of a core.
    """

    capability: tuple[int, int] = (0, 0)
    cores: int = 0
    units: int = 128
    bandwidth: float = 0.0
    cache: int = 0
    ghz: float = 0.0
    shared: int = 233472

    def target_config(self) -> str:
        """XLA's `GpuTargetConfigProto` as text."""
        major, minor = self.capability
        return f"""gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: {self.shared}
  shared_memory_per_block_optin: {self.shared - 1024}
  core_count: {self.cores}  fpus_per_core: {self.units}  clock_rate_ghz: {self.ghz}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {int(self.bandwidth)}  l2_cache_size: {self.cache}  device_memory_size: {self.installed}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{self.kind}"
"""


def _gpu(kind: str, installed: int, link: float, network: float = 50e9, **rest) -> Gpu:
    return Gpu(kind, int(GPU_SHARE * installed), installed, link, network, **rest)


GPUS = {
    "a100": _gpu(
        "NVIDIA A100-SXM4-80GB",
        85100068864,
        300e9,
        capability=(8, 0),
        cores=108,
        units=64,
        bandwidth=2.039e12,
        cache=41943040,
        ghz=1.41,
        shared=167936,
        network=25e9,
    ),
    "h100": _gpu(
        "NVIDIA H100 80GB HBM3",
        84942979072,
        450e9,
        capability=(9, 0),
        cores=132,
        bandwidth=3.352e12,
        cache=52428800,
        ghz=1.98,
    ),
    "h200": _gpu(
        "NVIDIA H200",
        151397597184,
        450e9,
        capability=(9, 0),
        cores=132,
        bandwidth=4.8e12,
        cache=52428800,
        ghz=1.98,
    ),
    "b200": _gpu(
        "NVIDIA B200",
        191514411008,
        900e9,
        capability=(10, 0),
        cores=148,
        bandwidth=7.672e12,
        cache=132644864,
        ghz=1.965,
    ),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A topology to compile for.

    Attributes:
      name: as it was asked for.
      sizes: of a slice's torus; of GPUs, (slices, hosts, GPUs of a host).
      wrap: which axes of the torus are closed.
    """

    name: str
    chip: Chip
    devices: list[jax.Device]
    sizes: tuple[int, ...]
    wrap: tuple[bool, ...] = ()

    @property
    def is_tpu(self) -> bool:
        return not isinstance(self.chip, Gpu)

    def timing(self, mesh: Mesh) -> Timing:
        """What turns the costs of a program on this mesh into seconds."""
        flat = list(mesh.devices.flat)

        def compute(cycles: int | None, flops: int) -> float:
            if self.is_tpu:
                return (cycles or 0) / self.chip.clock
            return flops / (self.chip.peak * GPU_UTILISATION)

        def collective(kind: str, size: int, group: Sequence[int]) -> float:
            members = [flat[i] for i in group]
            sent = sent_bytes(kind, size, len(members))
            if not self.is_tpu:
                hosts = {device.process_index for device in members}
                return sent / (self.chip.link if len(hosts) == 1 else self.chip.network)
            if len({getattr(device, "slice_index", 0) for device in members}) > 1:
                return sent / self.chip.network
            return torus_seconds(kind, size, [device.coords for device in members], self)

        return Timing(compute, lambda flops: flops / (self.chip.peak * KERNEL_UTILISATION), collective, mesh.size)


def sent_bytes(kind: str, size: int, devices: int) -> float:
    """Bytes that a device sends, at least, in a collective into which each of `devices` puts `size` bytes."""
    share = (devices - 1) / devices
    factors = {"all-gather": devices * share, "all-reduce": 2 * share, "reduce-scatter": share, "all-to-all": share}
    return size * factors.get(kind, 1.0) if devices > 1 else 0.0


def torus_seconds(kind: str, size: int, places: Sequence[Sequence[int]], target: Target) -> float:
    """Seconds of a collective on a torus, limited by its links; latency is not counted.

    Rings run along every axis that the group spreads over, in both directions, at half the rate where the axis is not
    closed or the group does not fill it.

    Args:
      size: bytes that a device puts in.
      places: coordinates of the group's devices.
    """
    devices = len(places)
    if devices < 2 or size == 0:
        return 0.0
    spread = [sorted({place[axis] for place in places}) for axis in range(len(target.sizes))]
    if all(len(values) == 1 for values in spread):
        return 0.0  # cores of one chip
    if kind in ("collective-permute", "collective-broadcast"):
        return size / target.chip.link  # in windowed products they come in pairs, one each way
    rates = []
    for axis, values in enumerate(spread):
        if len(values) > 1:
            closed = target.wrap[axis] and len(values) == target.sizes[axis]
            rates.append(target.chip.link if closed else target.chip.link / 2)
    if kind in ("all-to-all", "ragged-all-to-all"):
        # Half of everything crosses the middle of the longest axis, over as many rings as there are beside it.
        axis = max((i for i, values in enumerate(spread) if len(values) > 1), key=lambda i: len(spread[i]))
        closed = target.wrap[axis] and len(spread[axis]) == target.sizes[axis]
        rings = devices / len(spread[axis])
        return size * devices / 4 / (rings * target.chip.link * (1 if closed else 0.5))
    return sent_bytes(kind, size, devices) / sum(rates)


def wraps(chip: str, sizes: Sequence[int]) -> tuple[bool, ...]:
    """Which axes of a slice are closed: of v5e and v6e those of 16, of the others all if each is a multiple of 4."""
    if chip in ("v5e", "v6e"):
        return tuple(size == 16 for size in sizes)
    return (all(size % 4 == 0 for size in sizes),) * len(sizes)


def open_target(text: str) -> Target:
    """The topology `CHIP:SIZES`: `v5e:8x8`, `v5p:4x4x4`, `2xv5e:8x8` for two slices, `h100:SLICESxHOSTSxGPUS`.

    Raises:
      ConfigError: an unknown chip or size.
      UserError: its compiler is not installed.
    """
    known = {**TPUS, **GPUS}
    name, _, layout = text.lower().partition(":")
    several = re.fullmatch(r"([1-9]\d*)x(v\w+)", name)
    slices, name = (int(several[1]), several[2]) if several else (1, name)
    if name not in known:
        raise ConfigError(f"--topology={text}: no chip {name!r}{nearest(name, known)}; known are {', '.join(known)}")
    rank = 2 if name in ("v5e", "v6e") else 3
    example = {"v5e": "v5e:8x8", "v6e": "v6e:8x8"}.get(name, f"{name}:{'1x1x8' if name in GPUS else '4x4x4'}")
    if not re.fullmatch(r"[1-9]\d*" + r"x[1-9]\d*" * (rank - 1), layout):
        meaning = "slices x hosts x GPUs of a host" if name in GPUS else "chips along each axis"
        raise ConfigError(f"--topology={text}: {rank} sizes are needed ({meaning}), as in {example}")
    sizes = tuple(int(size) for size in layout.split("x"))
    return _open_gpus(text, name, sizes) if name in GPUS else _open_slices(text, name, sizes, slices)


def _open_slices(text: str, name: str, sizes: tuple[int, ...], slices: int) -> Target:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology={text}: libtpu, the TPU compiler, is not installed: bash launch/setup.sh tpu")
    wrap = wraps(name, sizes)
    settings = {"wrap": (*wrap, False)[:3]} if any(wrap) else {}
    if name == "v4":
        settings["chip_config_name"] = "megacore"  # its two cores work as one device
    if math.prod(sizes) == 1:
        settings["chips_per_host_bounds"] = (1, 1, 1)
    if slices > 1:
        settings["num_slices"] = slices
    layout = "x".join(map(str, sizes))
    try:
        described = topologies.get_topology_desc(f"{'tpu7x' if name == 'v7x' else name}:{layout}", "tpu", **settings)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise ConfigError(f"--topology={text}: libtpu knows no such slice: {error}") from error
    return Target(text, TPUS[name], list(described.devices), sizes, wrap)


def _open_gpus(text: str, name: str, sizes: tuple[int, ...]) -> Target:
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        raise UserError(f"--topology={text}: JAX's CUDA plugin is not installed: bash launch/setup.sh cuda")
    try:
        described = topologies.get_topology_desc(
            text, "cuda", target_config=GPUS[name].target_config(), topology="x".join(map(str, sizes))
        )
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise ConfigError(f"--topology={text}: the CUDA plugin cannot describe it: {error}") from error
    return Target(text, GPUS[name], list(described.devices), sizes)


def axes_of(group: Sequence[int], mesh: Mesh) -> str:
    """The mesh axes along which the devices of a group differ, as `fsdp` or `data x fsdp`."""
    places = np.array([np.unravel_index(i, mesh.devices.shape) for i in group])
    names = [name for i, name in enumerate(mesh.axis_names) if len(set(places[:, i])) > 1]
    return " x ".join(names) or "none"
