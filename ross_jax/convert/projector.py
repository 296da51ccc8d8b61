"""Projector of LLaVA (`mm_projector`): sizes and keys."""

import re
from collections.abc import Mapping

from ross_jax.config import ConfigError, from_dict
from ross_jax.convert.mapping import LINEAR, Row, Table
from ross_jax.models.projector import ProjectorConfig


def projector_config(kind: str, in_size: int, out_size: int, where: str) -> ProjectorConfig:
    """Config of a projector that a config.json describes.

    Args:
      kind: `mm_projector_type`: `linear`, `mlpNx_gelu` or `identity`.
      in_size: width of the image features.
      out_size: width of the language model.
      where: name of the file, for messages.

    Raises:
      ConfigError: another type, or sizes that do not fit it.
    """
    depth = re.fullmatch(r"mlp([0-9]{1,2})x_gelu", kind)
    if kind not in ("linear", "identity") and not depth:
        raise ConfigError(
            f"{where}: mm_projector_type {kind!r} is not supported; expected linear, mlpNx_gelu or identity"
        )
    fields = {"kind": "identity" if kind == "identity" else "mlp", "in_size": in_size, "out_size": out_size}
    if kind != "identity":
        fields["depth"] = int(depth[1]) if depth else 1
    return from_dict(ProjectorConfig, fields, f"{where}: mm_projector_type {kind!r}")


def read_projector_config(shapes: Mapping[str, tuple[int, ...]]) -> ProjectorConfig:
    """Reads the sizes from the tensors.

    Args:
      shapes: key below `mm_projector.` -> shape.

    Raises:
      ConfigError: there is no weight matrix.
    """
    matrices = [(key, shape) for key, shape in sorted(shapes.items()) if len(shape) == 2 and 0 not in shape]
    weights = [shape for key, shape in matrices if key.endswith("weight")]
    if not weights:
        raise ConfigError("mm_projector: no weight matrix among its tensors")
    return ProjectorConfig("mlp", weights[0][1], weights[-1][0], len(weights))


def table(config: ProjectorConfig) -> Table:
    """Table of the keys below `mm_projector.`."""
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
