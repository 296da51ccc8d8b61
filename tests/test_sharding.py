"""Meshes over several slices, and which axes split which dimensions."""

from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ross_jax.config import ConfigError
from ross_jax.sharding import MeshConfig, gather, make_mesh, parameter_shardings, partition, use_mesh


def devices(slices: int, platform: str = "tpu", kind: str = "TPU v4") -> list[jax.Device]:
    """Slices of 2 x 2 chips with one host each, in JAX's order: by process."""
    return [
        mock.Mock(
            spec=jax.Device,
            id=4 * number + chip,
            slice_index=number,
            process_index=number,
            coords=(chip % 2, chip // 2, 0),
            core_on_chip=0,
            platform=platform,
            device_kind=kind,
        )
        for number in range(slices)
        for chip in range(4)
    ]


def mesh_slices(config: MeshConfig, found: list[jax.Device]) -> np.ndarray:
    """Slice index of each device of the mesh."""
    return np.vectorize(lambda device: device.slice_index)(make_mesh(config, found).devices)


@pytest.mark.parametrize("sizes", [(2, 4, 1), (2, 2, 2), (4, 2, 1), (8, 1, 1)])
def test_only_the_data_axis_crosses_tpu_slices(sizes):
    array = mesh_slices(MeshConfig(*sizes), devices(2))
    assert array.shape == sizes
    assert all(len(np.unique(row)) == 1 for row in array)
    assert (np.bincount(array.ravel()) == 4).all()


def test_tpu_slices_must_divide_the_data_axis():
    with pytest.raises(ConfigError, match=r"mesh data=1 fsdp=8 tensor=1: 2 TPU slices need .*--config.mesh.data=2"):
        make_mesh(MeshConfig(), devices(2))


@pytest.mark.parametrize(
    ("slices", "platform", "tensor", "expected"),
    [
        (1, "tpu", 1, (1, 4, 1)),
        (1, "tpu", 2, (1, 2, 2)),
        (2, "tpu", 1, (2, 4, 1)),
        (2, "gpu", 1, (1, 8, 1)),
        (16, "gpu", 1, (1, 64, 1)),
        (32, "gpu", 1, (2, 64, 1)),
        (32, "gpu", 4, (1, 32, 4)),
        (24, "gpu", 1, (2, 48, 1)),
        (17, "gpu", 1, (2, 34, 1)),
    ],
)
def test_left_to_the_mesh_parameters_are_split_over_64_devices_of_a_slice(slices, platform, tensor, expected):
    mesh = make_mesh(MeshConfig(-1, -1, tensor), devices(slices, platform))
    assert mesh.devices.shape == expected


def test_sizes_left_open_are_named():
    with pytest.raises(ConfigError, match=r"mesh data=-1 fsdp=-1 tensor=3: does not divide 4 devices"):
        make_mesh(MeshConfig(-1, -1, 3), devices(1))
    for sizes in [(-1, 1, -1), (1, -1, -1), (-1, -1, -1), (0, 1, 1)]:
        with pytest.raises(ValueError, match="must be positive; -1"):
            MeshConfig(*sizes)


def test_parameters_may_be_split_over_hosts_of_gpus():
    found = devices(2, "gpu", "NVIDIA H100 80GB HBM3")
    assert mesh_slices(MeshConfig(1, 8, 1), found).ravel().tolist() == [0] * 4 + [1] * 4
    array = mesh_slices(MeshConfig(2, 2, 2), found)
    assert (array[0] == 0).all() and (array[1] == 1).all()


@pytest.mark.parametrize(
    ("size", "axis", "expected"),
    [
        (16, "images", ("data", "fsdp", "tensor")),
        (12, "images", ("data", "fsdp")),
        (6, "images", "data"),
        (5, "images", None),
        (12, "batch", ("data", "fsdp")),
        (6, "heads", "tensor"),
        (5, "heads", None),
    ],
)
def test_a_dimension_is_split_over_the_first_axes_that_divide_it(size, axis, expected):
    assert partition((size, 3), (axis,), make_mesh(MeshConfig(2, 2, 2)))[0] == expected


def test_what_is_gathered_is_whole_and_its_gradient_split():
    mesh = make_mesh(MeshConfig(1, 4, 2))
    axes, seen = ("embed", "mlp"), []
    x = jax.device_put(np.arange(32.0).reshape(8, 4), NamedSharding(mesh, partition((8, 4), axes, mesh)))

    def loss(x):
        whole = gather(x, axes)
        jax.debug.inspect_array_sharding(whole, callback=seen.append)
        return (whole**3).sum()

    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(loss))(x)
    assert seen[0].is_equivalent_to(NamedSharding(mesh, PartitionSpec(None, "tensor")), 2)
    assert gradient.sharding.spec == PartitionSpec("fsdp", "tensor")
    np.testing.assert_allclose(gradient, 3 * np.asarray(x) ** 2)


def test_mesh_on_every_torus():
    """A mesh axis may span part of a torus axis, as 2 x 32 does on 8 x 8 chips."""
    chips = [
        mock.Mock(
            spec=jax.Device,
            id=8 * x + y,
            process_index=0,
            slice_index=0,
            coords=(x, y, 0),
            core_on_chip=0,
            platform="tpu",
            device_kind="TPU v6 lite",
        )
        for y in range(8)
        for x in range(8)
    ]
    assert make_mesh(MeshConfig(2, 32, 1), chips).devices.shape == (2, 32, 1)


LEAVES = {"language/layers/gate/kernel": jax.ShapeDtypeStruct((2, 16, 8), np.float32)}


def test_rules_override_how_arrays_are_split():
    """Rules apply to parameters, and to activations while the mesh is ambient; the usual rules return afterwards."""
    config = MeshConfig(2, 2, 2, (("embed", ("tensor",)), ("mlp", ())))
    mesh = make_mesh(config)
    spec = {path: at.spec for path, at in parameter_shardings(LEAVES, mesh, config).items()}
    assert spec == {"language/layers/gate/kernel": PartitionSpec(None, "tensor", None)}
    with use_mesh(mesh, config):
        assert partition((16, 8), ("embed", "mlp"), mesh) == PartitionSpec("tensor", None)
    assert partition((16, 8), ("embed", "mlp"), mesh) == PartitionSpec("fsdp", "tensor")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((("embd", ("fsdp",)),), r"rules: 'embd' is no logical axis to set \(did you mean 'embed'\?\)"),
        ((("batch", ("data",)),), "rules: 'batch' is no logical axis to set"),
        ((("mlp", ("tensr",)),), r"rules: 'mlp' -> \('tensr',\): expected some of the mesh axes"),
        ((("mlp", ("fsdp", "fsdp")),), "each once"),
    ],
)
def test_rules_that_name_nothing(rules, message):
    with pytest.raises(ValueError, match=message):
        MeshConfig(rules=rules)


def test_a_rule_that_splits_an_array_twice_names_axes_and_array():
    config = MeshConfig(1, 4, 2, (("mlp", ("fsdp",)),))
    message = r"language/layers/gate/kernel \[2, 16, 8\]: .*'embed' and 'mlp' .* split over mesh axis 'fsdp'"
    with pytest.raises(ConfigError, match=message):
        parameter_shardings(LEAVES, make_mesh(config), config)
