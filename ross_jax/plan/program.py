"""The real programs, compiled ahead of time: a recipe's train step, or prefill and decoding, on devices not at hand."""

import contextlib
import dataclasses
import re
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ross_jax.config import UserError
from ross_jax.inference.generate import generate
from ross_jax.inference.model import TEXT_COMPONENTS
from ross_jax.models.ross import abstract_params, normalise
from ross_jax.plan.targets import GIB, Target
from ross_jax.plan.workload import abstract_batch
from ross_jax.process import peak_memory
from ross_jax.sharding import batch_sharding, parameter_shardings
from ross_jax.training.build import build_step
from ross_jax.training.recipe import RunConfig
from ross_jax.tree import flatten, unflatten

GPU_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
"""Without a device nothing can be timed: matrix products go to cuBLAS, as most do after tuning."""


class DoesNotFit(Exception):
    """The compiler found no way to fit the program into a device's memory.

    Attributes:
      needed: bytes, as far as the compiler says; None if it does not.
    """

    def __init__(self, needed: float | None, message: str):
        super().__init__(message)
        self.needed = needed


@dataclasses.dataclass(frozen=True)
class Program:
    """A function and the shapes of what it takes.

    Attributes:
      arguments: by the name that they go by in reports: path -> shape with sharding.
      step, inputs: the jitted function and what it is called with.
      lowered: ready to be compiled.
    """

    arguments: dict[str, jax.ShapeDtypeStruct]
    step: Any
    inputs: tuple[Any, ...]
    lowered: Any


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made.

    Attributes:
      text: optimised HLO, with the compiler's estimates.
      memory: bytes per device: `arguments`, `outputs`, `aliased` (outputs that take an argument's place),
        `temporaries`, `code`.
      seconds: that compiling took.
      host_memory: most bytes that this process has held.
    """

    text: str
    memory: dict[str, int]
    seconds: float
    host_memory: int

    @property
    def needed(self) -> int:
        """Bytes that a device needs at once."""
        sizes = self.memory
        return sizes["arguments"] + sizes["outputs"] - sizes["aliased"] + sizes["temporaries"] + sizes["code"]


def train_program(config: RunConfig, mesh: Mesh, rows: int, steps: int, cached: tuple[str, ...] = ()) -> Program:
    """A run's train step, lowered as the run lowers it.

    Args:
      cached: as in `abstract_batch`.
    """
    built = build_step(config, mesh, steps)
    batch = abstract_batch(config, mesh, rows, cached)
    with jax.set_mesh(mesh), answering_for(mesh.devices.flat[0]):
        lowered = built.train_step.lower(built.state, batch)
    moments = jax.tree_util.tree_flatten_with_path(built.state.opt_state)[0]
    arguments = {
        **{f"parameters/{path}": leaf for path, leaf in flatten(built.state.params).items()},
        **{f"frozen/{path}": leaf for path, leaf in flatten(built.state.frozen).items()},
        **{f"optimizer{_moment(path)}": leaf for path, leaf in moments},
        **{f"batch/{name}": leaf for name, leaf in batch.items()},
    }
    return Program(arguments, built.train_step, (built.state, batch), lowered)


@contextlib.contextmanager
def answering_for(device: Any) -> Iterator[None]:
    """While JAX lowers cuDNN's attention it asks this machine's GPU for its compute capability: `device` answers."""
    if device.platform != "gpu":
        yield
        return
    own = tuple(int(number) for number in device.compute_capability.split("."))

    def asked(capability: str) -> tuple[int, ...]:
        return tuple(int(number) for number in capability.split("."))

    answers = {
        "check_compute_capability": lambda capability: own >= asked(capability),
        "is_cuda_compute_capability_equal": lambda capability: own == asked(capability),
    }
    before = {name: getattr(fused_attention_stablehlo, name) for name in answers}
    try:
        for name, answer in answers.items():
            setattr(fused_attention_stablehlo, name, answer)
        yield
    finally:
        for name, function in before.items():
            setattr(fused_attention_stablehlo, name, function)


def _moment(path: tuple[Any, ...]) -> str:
    names = [getattr(key, "name", getattr(key, "key", None)) for key in path]
    return "/" + "/".join(str(name) for name in names if name not in (None, "inner_states", "inner_state", "rest"))


def generate_program(config: RunConfig, mesh: Mesh, rows: int, prompt: int, new_tokens: int) -> Program:
    """Greedy generation: `rows` prompts of `prompt` tokens with one picture each, and `new_tokens` more."""
    model, dtype = config.model, jnp.dtype(config.step.dtype)
    flat = {
        path: leaf
        for path, leaf in flatten(abstract_params(model, dtype)).items()
        if path.partition("/")[0] in TEXT_COMPONENTS
    }
    shardings = parameter_shardings(flat, mesh)
    params = {path: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=shardings[path]) for path, leaf in flat.items()}
    split = batch_sharding(mesh)
    side = model.vision.image_size
    shapes = {
        "tokens": ((rows, prompt), jnp.int32),
        "segments": ((rows, prompt), jnp.int32),
        "images": ((rows, 1, side, side, 3), jnp.uint8),
        "image_start": ((rows, 1), jnp.int32),
    }
    batch = {name: jax.ShapeDtypeStruct(shape, kind, sharding=split) for name, (shape, kind) in shapes.items()}

    def run(params: Any, batch: dict[str, jax.Array]):
        extend = partial(generate, max_new_tokens=new_tokens, dtype=dtype)
        images = normalise(model, batch["images"])
        result = extend(model, params, batch["tokens"], batch["segments"], images, batch["image_start"])
        return result.tokens, result.lengths

    with jax.set_mesh(mesh), answering_for(mesh.devices.flat[0]):
        everywhere = NamedSharding(mesh, PartitionSpec())
        function, inputs = jax.jit(run, out_shardings=everywhere), (unflatten(params), batch)
        lowered = function.lower(*inputs)
    arguments = {f"parameters/{path}": leaf for path, leaf in params.items()}
    return Program(arguments | {f"batch/{name}": leaf for name, leaf in batch.items()}, function, inputs, lowered)


def compile_program(program: Program, target: Target) -> Compiled:
    """Compiles.

    Raises:
      DoesNotFit: it needs more memory than a device has.
      UserError: the compiler failed otherwise.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            compiled = program.lowered.compile(
                compiler_options={"xla_dump_to": folder} if target.is_tpu else GPU_OPTIONS
            )
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise DoesNotFit(needed_bytes(str(error)), str(error)) from error
            raise UserError(f"{target.name}: the compiler failed: {str(error)[:2000]}") from error
        seconds = time.perf_counter() - start
        # On v5p and v6e `as_text` fails for programs with asynchronous collectives; what is dumped is the same.
        dumped = sorted(Path(folder).glob("*.after_codegen.txt"), key=lambda path: path.stat().st_size)
        text = dumped[-1].read_text() if dumped else compiled.as_text()
    sizes = compiled.memory_analysis()
    memory = {
        "arguments": sizes.argument_size_in_bytes,
        "outputs": sizes.output_size_in_bytes,
        "aliased": sizes.alias_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
        "code": sizes.generated_code_size_in_bytes,
    }
    return Compiled(text, memory, seconds, peak_memory())


def needed_bytes(message: str) -> float | None:
    """The bytes that XLA's message of exhausted memory asks for."""
    found = re.search(r"(?:Used|required[^(]*\()\s*([\d.]+)([KMGT]?)", message)
    return float(found[1]) * GIB / {"": GIB, "K": 2**20, "M": 2**10, "G": 1, "T": 2**-10}[found[2]] if found else None
