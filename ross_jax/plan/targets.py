"""Topologies that programs can be compiled for on any host: TPU slices by libtpu, GPUs by the CUDA plugin."""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from ross_jax.config import ConfigError, UserError, nearest
from ross_jax.plan.cost import Timing
from ross_jax.training.metrics import PEAK_FLOPS

LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
"""Environment variables that libtpu reads when it is loaded. Without them libtpu would ask a TPU host."""
GIB = 2**30
KERNEL_UTILISATION = 0.5
"""Share of the peak that a hand-written kernel is assumed to reach."""
GPU_UTILISATION = 0.5
"""Share of the peak that a GPU's matrix products are assumed to reach; its compiler estimates no cycles."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device, as its compiler and its vendor describe it. A chip of v7x has two cores; each is a device.

    Attributes:
      kind: JAX's name of the device, as in `PEAK_FLOPS`.
      memory: bytes that a program can use. TPU: what the compiler says is available. GPU: `GPU_SHARE` of what the
        driver reports.
      installed: bytes that the device has.
      link: bytes per second. TPU: along an axis of the torus, both directions together. GPU: to GPUs of the same host,
        one way.
      network: bytes per second per device to other slices (TPU) or other hosts (GPU), one way.
      clock: Hz of the cycles that the compiler estimates; None if the compiler estimates none.
      validated: whether the estimates were reported to agree with published runs on this chip.
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


# Usable memory: the limit that libtpu names when a program does not fit.
# Clocks: v5e, v5p and v6e: the clock at which libtpu's cycles agree with published runs. v4: the published clock. v7x:
# the clock that follows from its peak and 4 matrix units of 256 x 256.
# Networks: v5e and v6e: a chip's share of the rate published for a pod. v4 and v5p: a quarter of a host's 200 Gbit/s.
# v7x: half of a chip's 100 Gbit/s.
TPUS = {
    "v4": Chip("TPU v4", int(30.75 * GIB), 32 * GIB, 90e9, 6.25e9, 1.05e9),
    "v5e": Chip("TPU v5 lite", int(15.75 * GIB), 16 * GIB, 90e9, 3.125e9, 1.503e9, validated=True),
    "v5p": Chip("TPU v5", int(95.73 * GIB), 96 * GIB, 180e9, 6.25e9, 1.751e9, validated=True),
    "v6e": Chip("TPU v6 lite", int(31.24 * GIB), 32 * GIB, 180e9, 12.5e9, 1.751e9, validated=True),
    "v7x": Chip("TPU7x", int(94.74 * GIB), 96 * GIB, 180e9, 6.25e9, 2.2e9),
}
GPU_SHARE = 0.9
"""Share of a GPU's memory that JAX takes, with XLA_PYTHON_CLIENT_MEM_FRACTION set to it. JAX's default is 0.75."""


@dataclasses.dataclass(frozen=True)
class Gpu(Chip):
    """A GPU, with the figures that XLA needs to compile for it. They come from the data sheet and the driver.

    Attributes:
      capability: CUDA compute capability.
      cores: number of streaming multiprocessors.
      units: floating-point units per multiprocessor.
      bandwidth: bytes per second to and from the GPU's memory.
      cache: bytes of L2 cache.
      ghz: clock.
      shared: bytes of shared memory per multiprocessor.
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
    "rtx4090": _gpu(
        "NVIDIA GeForce RTX 4090",
        25757220864,
        25e9,
        capability=(8, 9),
        cores=128,
        bandwidth=1.008e12,
        cache=75497472,
        ghz=2.52,
        shared=102400,
        network=12.5e9,
    ),
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
      name: the topology's name on the command line, as `v5e:8x8`.
      chip: the device.
      devices: all devices of the topology.
      sizes: TPU: chips along each axis of a slice's torus. GPU: (slices, hosts, GPUs of a host).
      wrap: which axes of the torus are closed to rings.
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
        """How long compute, kernels and collectives take on a mesh of this topology."""
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
    """Least bytes that each device sends in a collective into which each of `devices` puts `size` bytes."""
    share = (devices - 1) / devices
    factors = {"all-gather": devices * share, "all-reduce": 2 * share, "reduce-scatter": share, "all-to-all": share}
    return size * factors.get(kind, 1.0) if devices > 1 else 0.0


def torus_seconds(kind: str, size: int, places: Sequence[Sequence[int]], target: Target) -> float:
    """Seconds of a collective on a torus, as its links limit it. Latency does not count.

    Rings run in both directions along every axis that the group spreads over. An axis that is not closed, or that the
    group does not fill, has half the rate.

    Args:
      size: bytes that each device puts in.
      places: coordinates of the group's devices.
    """
    devices = len(places)
    if devices < 2 or size == 0:
        return 0.0
    spread = [sorted({place[axis] for place in places}) for axis in range(len(target.sizes))]
    if all(len(values) == 1 for values in spread):
        return 0.0  # cores of one chip
    if kind in ("collective-permute", "collective-broadcast"):
        return size / target.chip.link  # windowed products send in pairs, one each way
    rates = []
    for axis, values in enumerate(spread):
        if len(values) > 1:
            closed = target.wrap[axis] and len(values) == target.sizes[axis]
            rates.append(target.chip.link if closed else target.chip.link / 2)
    if kind in ("all-to-all", "ragged-all-to-all"):
        # Half of all bytes cross the middle of the longest axis, over all rings that are parallel to it.
        axis = max((i for i, values in enumerate(spread) if len(values) > 1), key=lambda i: len(spread[i]))
        closed = target.wrap[axis] and len(spread[axis]) == target.sizes[axis]
        rings = devices / len(spread[axis])
        return size * devices / 4 / (rings * target.chip.link * (1 if closed else 0.5))
    return sent_bytes(kind, size, devices) / sum(rates)


def wraps(chip: str, sizes: Sequence[int]) -> tuple[bool, ...]:
    """Which axes of a slice are closed. v5e, v6e: axes of 16 chips. Others: all axes, if each is a multiple of 4."""
    if chip in ("v5e", "v6e"):
        return tuple(size == 16 for size in sizes)
    return (all(size % 4 == 0 for size in sizes),) * len(sizes)


def open_target(text: str) -> Target:
    """The topology `CHIP:SIZES`: `v5e:8x8`, `v5p:4x4x4`, `2xv5e:8x8` for two slices, `h100:SLICESxHOSTSxGPUS`.

    Raises:
      ConfigError: an unknown chip or size.
      UserError: the chip's compiler is not installed.
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
    for variable, value in LIBTPU.items():
        os.environ.setdefault(variable, value)
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
