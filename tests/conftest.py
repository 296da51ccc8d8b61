"""Eight virtual CPU devices, and run-time checks of all annotated shapes."""

import gc
import importlib.metadata
import logging
import os
import signal
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several processes may compile for TPU
# Compilation takes most of the tests' time, so LLVM optimises little, and compiled programs are cached.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib") < "0.11":  # later versions refuse a flag that they do not know
    _FLAGS += " --xla_cpu_use_fusion_emitters=false"
_COMPILED = tempfile.TemporaryDirectory(prefix="ross_jax_compiled_")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# A collective needs a thread for each of the 8 devices. Spare threads avoid a deadlock if one is busy.
os.environ.setdefault("PJRT_NPROC", "16")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}"

# A script's background processes ignore SIGINT, those of nohup SIGHUP, and so would the processes that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# With few cores, overlapping steps on several devices may deadlock over threads.
jax.config.update("jax_cpu_enable_async_dispatch", False)
install_import_hook("ross_jax", "beartype.beartype")


@pytest.fixture(scope="module", autouse=True)
def no_programs_of_other_files():
    """Drops compiled programs after each module, because modules share few and all would take much memory."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True)
def silent_loggers():
    """Undoes what a launcher that a test has called as a function did to the loggers."""
    ours, root = logging.getLogger("ross_jax"), logging.getLogger()
    before = ours.level, root.level
    yield
    ours.propagate, ours.handlers[:] = True, []
    ours.setLevel(before[0])
    root.setLevel(before[1])


@pytest.fixture(scope="session")
def gpu() -> jax.Device:
    """The first GPU. Skips the test if there is none."""
    try:
        return jax.devices("gpu")[0]
    except RuntimeError:
        pytest.skip("needs a CUDA device, and JAX_PLATFORMS=cuda,cpu")
