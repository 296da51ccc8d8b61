"""Eight virtual CPU devices, and run-time checks of every annotated shape."""

import gc
import importlib.metadata
import os
import signal
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # both workers, and what they start, may compile for TPU
# Compiling is what the tests spend their time on, so LLVM is told to hurry, and no program is compiled twice.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib") < "0.11":  # later versions end at flags that they do not know
    _FLAGS += " --xla_cpu_use_fusion_emitters=false"
_COMPILED = tempfile.TemporaryDirectory(prefix="ross_jax_compiled_")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# XLA makes as many threads as devices, and a collective needs one for each: some to spare, should anything hold one.
os.environ.setdefault("PJRT_NPROC", "16")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}"

# In the background of a script a process is started deaf to interrupts, and so would be those that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# On few cores, steps of several devices that overlap may wait for one another's threads for ever.
jax.config.update("jax_cpu_enable_async_dispatch", False)
install_import_hook("ross_jax", "beartype.beartype")


@pytest.fixture(scope="module", autouse=True)
def no_programs_of_other_files():
    """Files share hardly any; those of all would take 8 GB of memory."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def gpu() -> jax.Device:
    """The first GPU; without one the test is skipped."""
    try:
        return jax.devices("gpu")[0]
    except RuntimeError:
        pytest.skip("needs a CUDA device, and JAX_PLATFORMS=cuda,cpu")
