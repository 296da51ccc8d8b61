"""Caches of `launch/cache.py`: what a run reads instead of computing it, and whether a cache fits the run.

    part       holds                                         computed by
    targets    what the objective's `targets` returns        autoencoder or teacher
    features   what the projector reads                      vision encoder, if it is frozen

A cache stands in for the components that computed it. It is refused unless their configs and parameters, the list of
images, their size, and how they were decoded are those of the run.
"""

import dataclasses
import hashlib
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped, UInt32

from ross_jax.config import ConfigError, UserError, nearest, to_dict
from ross_jax.data.pipeline import Pipeline
from ross_jax.data.precomputed import Precomputed, differences
from ross_jax.models.ross import abstract_params, normalise
from ross_jax.objectives.objective import Objective
from ross_jax.objectives.reconstruction import make_objective
from ross_jax.training.recipe import RunConfig
from ross_jax.training.state import Tree
from ross_jax.tree import flatten

PartName = Literal["targets", "features"]


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a cache, as a run's config would have it.

    Attributes:
      component: name of the component that computes it.
      settings: what its values depend on besides images and parameters.
    """

    component: str
    settings: Mapping[str, Any]


def objective_of(config: RunConfig) -> Objective | None:
    """The run's objective; None without reconstruction."""
    return make_objective(config.model, config.reconstruction, config.step.dtype)


def find_part(config: RunConfig, name: str) -> Part:
    """The part of a cache that the run would read.

    Raises:
      ConfigError: there is no such part, or the run has no use for it.
    """
    model, names = config.model, typing.get_args(PartName)
    if name not in names:
        raise ConfigError(f"{name}: no such part of a cache{nearest(name, names)}; there are {', '.join(names)}")
    if name == "features":
        if any(config.freeze.trains(f"vision/{path}") for path in flatten(abstract_params(model)["vision"])):
            raise ConfigError(
                "features: config.freeze.trainable has the vision encoder learn, so its features change with every "
                "step; cache targets alone, or freeze it (vision=frozen)"
            )
        return Part("vision", {"vision": to_dict(model.vision), "activations": config.step.dtype})
    kind, objective = config.reconstruction.kind, objective_of(config)
    if objective is None:
        raise ConfigError(f"targets: config.reconstruction.kind is {kind!r}, which has none")
    if objective.target_encoder is None:
        raise ConfigError(
            f"targets: config.reconstruction.kind {kind!r} names no target encoder, so there is nothing to cache"
        )
    return Part(objective.target_encoder, objective.target_settings())


def compute(
    config: RunConfig, parts: tuple[str, ...], params: Tree, images: Shaped[Array, "batch height width 3"]
) -> dict[str, dict[str, Array]]:
    """Part -> field of the batch -> values for these images, as a cache stores them.

    Args:
      params: parameters of the components that compute the parts.
      images: uint8.
    """
    computed = {}
    if "targets" in parts:
        objective = objective_of(config)
        slots = jnp.zeros((len(images), 1), jnp.int32)
        batch = {"images": images[:, None], "image_start": slots, "tokens": slots}
        computed["targets"] = objective.pack(objective.targets(params, batch))
    if "features" in parts:
        encoder = config.model.vision.build(jnp.dtype(config.step.dtype))
        features = encoder.apply({"params": params["vision"]}, normalise(config.model, images))
        computed["features"] = {"image_features": features}
    return computed


def open_cached(config: RunConfig) -> Precomputed | None:
    """The cache at `config.data.precomputed`, with the parts that the run can read; None if the config names no cache.

    Raises:
      UserError: there is no usable cache, or it holds features of a vision encoder that trains now.
    """
    if config.data.precomputed is None:
        return None
    cache = Precomputed(config.data.precomputed, caches=config.data.caches)
    useful, useless = [], []
    for name in cache.parts:
        try:
            find_part(config, name)
            useful.append(name)
        except ConfigError as error:
            if name == "features":
                raise ConfigError(f"config.data.precomputed: {cache.folder}: {error}") from error
            useless.append(str(error))
    if not useful:
        raise ConfigError(f"config.data.precomputed: {cache.folder}: of no use: {'; '.join(useless)}")
    return cache.select(useful)


def needs_pixels(config: RunConfig, cached: Collection[str]) -> bool:
    """Whether a run that reads these parts of a cache needs pixels as well."""
    encodes = "features" not in cached
    return encodes or (objective_of(config) is not None and "targets" not in cached) or config.loop.images > 0


def spared_components(config: RunConfig, cached: Collection[str]) -> set[str]:
    """Components that need not run, because a run reads these parts of a cache."""
    return {find_part(config, name).component for name in cached}


def describe(config: RunConfig, parts: tuple[str, ...], pipeline: Pipeline) -> dict[str, Any]:
    """What the images and these parts of a cache depend on, without parameters: `made_of` of its manifest."""
    return {"images": pipeline.described, **{name: dict(find_part(config, name).settings) for name in parts}}


def check_settings(config: RunConfig, cache: Precomputed, pipeline: Pipeline) -> None:
    """Raises UserError, with what differs, if the cache was computed with other settings or from other images."""
    current = describe(config, cache.parts, pipeline)
    stored = {name: dict(cache.made_of[name]) for name in current}
    for name in cache.parts:
        stored[name].pop("parameters_hash", None)
    refuse_differences(cache.folder, stored, current)


def check_parameters(config: RunConfig, cache: Precomputed | None, params: Tree) -> None:
    """Raises UserError if components with other parameters computed the cache.

    Args:
      cache: None is accepted.
      params: parameters by component, at least of the components that compute the cache's parts.
    """
    if cache is None:
        return
    current, stored = {}, {}
    for name in cache.parts:
        component = find_part(config, name).component
        current[name] = {f"{component}.parameters_hash": parameters_hash(params[component])}
        stored[name] = {f"{component}.parameters_hash": cache.made_of[name]["parameters_hash"]}
    refuse_differences(cache.folder, stored, current)


def refuse_differences(folder: Path, stored: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raises UserError that lists where the description in a cache differs from the run's."""
    found = differences(stored, current)
    if found:
        listed = "\n  ".join(found)
        raise UserError(
            f"{folder}: was computed of something else:\n  {listed}\n"
            "Make a cache for this config in another folder, with launch/cache.py"
        )


def parameters_hash(params: Tree) -> str:
    """A hash of every bit of every parameter, the same however they are sharded."""
    flat = flatten(params)
    sums = np.asarray(jax.jit(lambda leaves: jnp.stack([_checksum(leaf) for leaf in leaves]))(list(flat.values())))
    described = [f"{path} {leaf.dtype} {leaf.shape} {sums[i].tolist()}" for i, (path, leaf) in enumerate(flat.items())]
    return hashlib.sha256("\n".join(sorted(described)).encode()).hexdigest()


def _checksum(leaf: Float[Array, "*shape"]) -> UInt32[Array, "2"]:
    """Two sums, modulo 2^32, over hashes of (position, bits): exact, so the order of adding does not matter."""
    unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    position = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        position = position * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    return jnp.stack([jnp.sum(_mix(bits ^ _mix(position + np.uint32(salt)))) for salt in (1, 0x9E3779B9)])


def _mix(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """The finaliser of MurmurHash3 (Appleby): every bit of the input moves every bit of the output."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
