"""What a run reads from a cache of `launch/cache.py` instead of computing it, and whether the cache is of this run.

part       holds                                          computed by
targets    what the objective's `targets` returns         autoencoder or teacher
features   what the projector sees                        vision encoder, where it is frozen

A cache stands in for the components that made it: it is refused unless their configs and parameters, the list of
pictures, their size and how they were decoded are those of the run.
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
from ross_jax.models.vision import VisionEncoder
from ross_jax.objectives.objective import Objective
from ross_jax.objectives.reconstruction import make_objective
from ross_jax.training.recipe import RunConfig
from ross_jax.training.state import Tree
from ross_jax.tree import flatten

PartName = Literal["targets", "features"]


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a cache, as a run's config has it.

    Attributes:
      component: that computes it.
      settings: all that its values depend on, pictures and parameters apart.
    """

    component: str
    settings: Mapping[str, Any]


def objective_of(config: RunConfig) -> Objective | None:
    """The run's."""
    return make_objective(config.model, config.reconstruction, config.step.dtype)


def find_part(config: RunConfig, name: str) -> Part:
    """What the part would be made of.

    Raises:
      ConfigError: the run has no use for it.
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
            f"targets: those of config.reconstruction.kind {kind!r} are the pictures themselves, so nothing is computed"
        )
    return Part(objective.target_encoder, objective.target_settings())


def compute(
    config: RunConfig, parts: tuple[str, ...], params: Tree, images: Shaped[Array, "batch height width 3"]
) -> dict[str, dict[str, Array]]:
    """What is stored of uint8 pictures, by part and by the batch's field.

    Args:
      params: of the components that compute the parts.
    """
    made = {}
    if "targets" in parts:
        objective = objective_of(config)
        slots = jnp.zeros((len(images), 1), jnp.int32)
        batch = {"images": images[:, None], "image_start": slots, "tokens": slots}
        made["targets"] = objective.pack(objective.targets(params, batch))
    if "features" in parts:
        encoder = VisionEncoder(config.model.vision, jnp.dtype(config.step.dtype))
        made["features"] = {
            "image_features": encoder.apply({"params": params["vision"]}, normalise(config.model, images))
        }
    return made


def open_cached(config: RunConfig) -> Precomputed | None:
    """The parts of `config.data.precomputed` that the run can read.

    Raises:
      UserError: no usable cache there, or it has features of a vision encoder that now learns.
    """
    if config.data.precomputed is None:
        return None
    cache = Precomputed(config.data.precomputed)
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
    """Whether anything of a run that reads these parts still looks at the pictures themselves."""
    encodes = "features" not in cached
    return encodes or (config.reconstruction.kind != "none" and "targets" not in cached) or config.loop.images > 0


def spared_components(config: RunConfig, cached: Collection[str]) -> set[str]:
    """Components that do not run, since what they compute is read."""
    return {find_part(config, name).component for name in cached}


def describe(config: RunConfig, parts: tuple[str, ...], pipeline: Pipeline) -> dict[str, Any]:
    """What parts of a cache are made of, parameters apart."""
    return {"images": pipeline.described, **{name: dict(find_part(config, name).settings) for name in parts}}


def check_settings(config: RunConfig, cache: Precomputed, pipeline: Pipeline) -> None:
    """Raises UserError if the cache was made of something else; lists what."""
    ours = describe(config, cache.parts, pipeline)
    theirs = {name: dict(cache.made_of[name]) for name in ours}
    for name in cache.parts:
        theirs[name].pop("parameters_hash", None)
    refuse_differences(cache.folder, theirs, ours)


def check_parameters(config: RunConfig, cache: Precomputed | None, params: Tree) -> None:
    """Raises UserError if there is a cache and it was made by components with other parameters.

    Args:
      params: with those components.
    """
    if cache is None:
        return
    ours, theirs = {}, {}
    for name in cache.parts:
        component = find_part(config, name).component
        ours[name] = {f"{component}.parameters_hash": parameters_hash(params[component])}
        theirs[name] = {f"{component}.parameters_hash": cache.made_of[name]["parameters_hash"]}
    refuse_differences(cache.folder, theirs, ours)


def refuse_differences(folder: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raises UserError that lists what a cache and a run do not have in common."""
    found = differences(theirs, ours)
    if found:
        listed = "\n  ".join(found)
        raise UserError(
            f"{folder}: was computed of something else:\n  {listed}\n"
            "Make a cache for this config in another folder, with launch/cache.py"
        )


def parameters_hash(params: Tree) -> str:
    """Tells parameters apart: of every bit of every leaf, whatever devices they are on and however they are split."""
    flat = flatten(params)
    sums = np.asarray(jax.jit(lambda leaves: jnp.stack([_checksum(leaf) for leaf in leaves]))(list(flat.values())))
    described = [f"{path} {leaf.dtype} {leaf.shape} {sums[i].tolist()}" for i, (path, leaf) in enumerate(flat.items())]
    return hashlib.sha256("\n".join(sorted(described)).encode()).hexdigest()


def _checksum(leaf: Float[Array, "*shape"]) -> UInt32[Array, "2"]:
    """Two sums, modulo 2^32, over hashes of (place, bits): exact, so their order does not matter."""
    unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    place = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    return jnp.stack([jnp.sum(_mix(bits ^ _mix(place + np.uint32(salt)))) for salt in (1, 0x9E3779B9)])


def _mix(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """The finaliser of MurmurHash3 (Appleby): every bit of the input moves every bit of the output."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
