"""Imports torch modules through the conversion tables, and defines tolerances for "equal"."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ross_jax.convert import importing

torch = pytest.importorskip("torch")

FLOAT32 = 1e-5
"""Tolerance, relative to the largest value, of two float32 computations that sum in different orders: some hundred
roundings of 6e-8, amplified by a few layers."""
BFLOAT16 = 0.03
"""Tolerance of a bfloat16 computation: root mean square of its difference from the float32 one, relative to that of the
float32 one. Each operation rounds to 8 bits (4e-3), and some ten layers add that up. Used with `BFLOAT16_RATIO`."""
BFLOAT16_RATIO = 1.5
"""Largest ratio of our bfloat16 error to torch's, both measured against float32. Neither is a reference, because both
round at slightly different places: torch adds a bias before rounding, we after."""


_TOKENS = ("cls_token", "register_tokens", "position_embeddings")


def randomise(module: "torch.nn.Module", seed: int = 0) -> "torch.nn.Module":
    """Draws all parameters at random, also those that start as ones or zeros. Outputs keep a size of about 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            table = name.endswith(("position_embedding.weight", "embed_tokens.weight", "pos_embed", *_TOKENS))
            if parameter.ndim >= 2 and not table:
                draw = draw * (parameter[0].numel() ** -0.5)
            elif parameter.ndim == 1 and name.endswith("weight"):  # scale of a norm
                draw = 1.0 + 0.3 * draw
            else:
                draw = 0.5 * draw
            parameter.copy_(draw.to(parameter.dtype))
    return module.eval()


def imported(folder: Path, num_heads: int = 16, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """Config and parameters of the one component in `folder`. `changes` replace fields of the config."""
    plan = importing.plan_import([str(folder)], num_heads=num_heads)
    (component,) = plan.parts
    if changes:
        config = dataclasses.replace(getattr(plan.config, component), **changes)
        plan = importing.match_parts(dataclasses.replace(plan.config, **{component: config}), plan.sources, plan.parts)
    tree = importing.load(plan)
    plan.close()
    return getattr(plan.config, component), jax.tree.map(jnp.asarray, tree[component])


def numpy(tensor: "torch.Tensor") -> np.ndarray:
    """Converts to float32 NumPy."""
    return tensor.detach().float().numpy()


def channels_last(tensor: "torch.Tensor") -> np.ndarray:
    """Converts NCHW to NHWC float32 NumPy."""
    return numpy(tensor.movedim(1, -1))


def difference(ours: Any, theirs: Any) -> float:
    """Largest absolute difference relative to the largest value. Infinite if shapes differ or `ours` is not finite."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape or not np.isfinite(ours).all():
        return float("inf")
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30))


def assert_close(ours: Any, theirs: Any, tolerance: float = FLOAT32) -> None:
    """Fails if `ours` differs from `theirs` by more than the tolerance, relative to the largest value."""
    found = difference(ours, theirs)
    assert found <= tolerance, f"difference {found:.2e} exceeds {tolerance:.0e}; shapes {ours.shape} {theirs.shape}"


def assert_bfloat16(ours: Any, theirs: Any, exact: Any) -> None:
    """Fails if our bfloat16 result is too far from torch's float32 `exact`, absolutely or relative to torch's own."""
    ours, theirs, exact = (np.asarray(x, np.float32) for x in (ours, theirs, exact))
    scale = np.sqrt(np.mean(exact**2))
    mine, others = (np.sqrt(np.mean((x - exact) ** 2)) / scale for x in (ours, theirs))
    assert mine <= BFLOAT16, f"{mine:.2e} from float32"
    assert mine <= BFLOAT16_RATIO * others, f"{mine:.2e} from float32, torch's bfloat16 only {others:.2e}"
