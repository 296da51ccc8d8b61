"""Eight virtual CPU devices, and run-time checks of every annotated shape."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is what the tests spend their time on, so LLVM is told to hurry.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}"

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("ross_jax", "beartype.beartype")
