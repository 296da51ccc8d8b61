"""LLaVA's projector: sizes and keys."""

import re
from collections.abc import Mapping

from ross_jax.config import ConfigError
from ross_jax.convert.mapping import LINEAR, Row, Table
from ross_jax.models.projector import ProjectorConfig


def projector_config(kind: str, in_size: int, out_size: int, where: str) -> ProjectorConfig:
    """From LLaVA's `mm_projector_type`: `linear`, `mlpNx_gelu` or `identity`.

    Raises:
      ConfigError: another type.
    """
    depth = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if kind not in ("linear", "identity") and not depth:
        raise ConfigError(f"{where}: mm_projector_type {kind!r} is not supported; linear, mlpNx_gelu and identity are")
    try:
        if kind == "identity":
            return ProjectorConfig("identity", in_size, out_size)
        return ProjectorConfig("mlp", in_size, out_size, int(depth[1]) if depth else 1)
    except ValueError as error:
        raise ConfigError(f"{where}: mm_projector_type {kind!r}: {error}") from error


def read_projector_config(shapes: Mapping[str, tuple[int, ...]]) -> ProjectorConfig:
    """Reads the sizes off the tensors (key below `mm_projector.` -> shape)."""
    weights = [shape for key, shape in sorted(shapes.items()) if key.endswith("weight") and len(shape) == 2]
    if not weights:
        raise ConfigError("mm_projector: no weight matrix among its tensors")
    return ProjectorConfig("mlp", weights[0][1], weights[-1][0], len(weights))


def table(config: ProjectorConfig) -> Table:
    """Keys below `mm_projector.`."""
    if config.kind == "identity":
        return Table(())
    if config.depth == 1:
        return Table(
            (Row("weight", "linear_0/kernel", LINEAR, "0.weight"), Row("bias", "linear_0/bias", alias="0.bias"))
        )
    rows = []
    for i in range(config.depth):
        rows.append(Row(f"{2 * i}.weight", f"linear_{i}/kernel", LINEAR))
        rows.append(Row(f"{2 * i}.bias", f"linear_{i}/bias"))
    return Table(tuple(rows))
