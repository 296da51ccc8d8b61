"""The programs that are planned: a recipe's train step, or its generation, compiled for devices that are not here."""

import contextlib
import dataclasses
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ross_jax.config import UserError
from ross_jax.inference.generate import Decoding, Prompts, generate
from ross_jax.inference.model import TEXT_COMPONENTS
from ross_jax.models.ross import abstract_params, normalise
from ross_jax.plan.targets import GIB, Target
from ross_jax.plan.workload import Options, Workload, abstract_batch, assume_batch, assume_prompts
from ross_jax.process import peak_memory
from ross_jax.sharding import MeshConfig, batch_sharding, make_mesh, parameter_shardings, use_mesh
from ross_jax.training.build import build_step
from ross_jax.training.recipe import RunConfig
from ross_jax.tree import flatten, unflatten

UNKNOWN_STEPS = 5000
"""Steps of a run whose data set's size is unknown. They only shape the learning rate's schedule."""
GPU_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
"""XLA cannot time kernels without a GPU. Matrix products go to cuBLAS, as most do after tuning."""


class DoesNotFit(Exception):
    """The compiler found no way to fit the program into a device's memory.

    Attributes:
      needed: bytes that the program needs; None if the compiler does not say.
    """

    def __init__(self, needed: float | None, message: str):
        super().__init__(message)
        self.needed = needed


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function and the shapes of its inputs.

    Attributes:
      arguments: name in reports, as `parameters/language/head` -> shape with sharding.
      inputs: the function's arguments as shapes with shardings.
      rules: config of the mesh whose rules count.
    """

    function: Any
    inputs: tuple[Any, ...]
    arguments: dict[str, jax.ShapeDtypeStruct]
    mesh: Mesh
    rules: MeshConfig

    def lower(self) -> jax.stages.Lowered:
        """The program as StableHLO, ready to be compiled for the mesh's devices."""
        with use_mesh(self.mesh, self.rules), answering_for(self.mesh.devices.flat[0]):
            return self.function.lower(*self.inputs)


@dataclasses.dataclass(frozen=True)
class Job:
    """One plan to make: a recipe's program, its input and the devices that it is compiled for."""

    config: RunConfig
    options: Options
    target: Target
    mesh: Mesh
    workload: Workload
    program: Program

    @property
    def trains(self) -> bool:
        return self.options.objective == "train"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's result.

    Attributes:
      text: optimised HLO, with the compiler's estimates.
      memory: bytes per device: `arguments`, `outputs`, `aliased` (outputs that take an argument's place),
        `temporaries`, `code`.
      seconds: seconds that compiling took.
      host_memory: most bytes of host memory that this process has held.
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


def make_job(config: RunConfig, target: Target, options: Options) -> Job:
    """Lays out a recipe's program on a topology.

    Raises:
      ConfigError: a mesh, rows or a prompt that do not fit recipe or topology.
    """
    mesh = make_mesh(config.mesh, target.devices)
    replicas = mesh.shape["data"] * mesh.shape["fsdp"]
    if options.objective == "train":
        workload = assume_batch(config, options, replicas * config.step.accumulate)
        steps = UNKNOWN_STEPS
        if workload.epoch:
            steps = int(workload.epoch / workload.conversations * config.data.epochs)
        program = train_program(config, mesh, workload.rows, max(1, steps), options.cached)
    else:
        workload = assume_prompts(config, options, replicas)
        program = generate_program(config, mesh, workload.rows, options.prompt, options.new_tokens)
    return Job(config, options, target, mesh, workload, program)


def train_program(config: RunConfig, mesh: Mesh, rows: int, steps: int, cached: tuple[str, ...] = ()) -> Program:
    """The train step of a run of `steps` steps.

    Args:
      cached: as in `abstract_batch`.
    """
    built = build_step(config, mesh, steps)
    batch = abstract_batch(config, mesh, rows, cached)
    moments = jax.tree_util.tree_flatten_with_path(built.state.opt_state)[0]
    arguments = {
        **{f"parameters/{path}": leaf for path, leaf in flatten(built.state.params).items()},
        **{f"frozen/{path}": leaf for path, leaf in flatten(built.state.frozen).items()},
        **{f"optimizer{_moment(path)}": leaf for path, leaf in moments},
        **{f"batch/{name}": leaf for name, leaf in batch.items()},
    }
    return Program(built.train_step, (built.state, batch), arguments, mesh, config.mesh)


def _moment(path: tuple[Any, ...]) -> str:
    names = [getattr(key, "name", getattr(key, "key", None)) for key in path]
    return "/" + "/".join(str(name) for name in names if name not in (None, "inner_states", "inner_state", "rest"))


def generate_program(config: RunConfig, mesh: Mesh, rows: int, prompt: int, new_tokens: int) -> Program:
    """Greedy generation: `rows` prompts of `prompt` tokens, each with one image, get `new_tokens` tokens each."""
    model, dtype = config.model, jnp.dtype(config.step.dtype)
    flat = {
        path: leaf
        for path, leaf in flatten(abstract_params(model, dtype)).items()
        if path.partition("/")[0] in TEXT_COMPONENTS
    }
    shardings = parameter_shardings(flat, mesh, config.mesh)
    params = {path: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=shardings[path]) for path, leaf in flat.items()}
    split = batch_sharding(mesh)
    side = model.vision.image_size
    shapes = {
        "tokens": ((rows, prompt), jnp.int32),
        "lengths": ((rows,), jnp.int32),
        "images": ((rows, 1, side, side, 3), jnp.uint8),
        "image_start": ((rows, 1), jnp.int32),
    }
    batch = {name: jax.ShapeDtypeStruct(shape, kind, sharding=split) for name, (shape, kind) in shapes.items()}

    def run(params: Any, batch: dict[str, jax.Array]):
        prompts = Prompts(batch["tokens"], batch["lengths"], normalise(model, batch["images"]), batch["image_start"])
        result = generate(Decoding(model, dtype), params, prompts, new_tokens)
        return result.tokens, result.lengths

    function = jax.jit(run, out_shardings=NamedSharding(mesh, PartitionSpec()))
    arguments = {f"parameters/{path}": leaf for path, leaf in params.items()}
    arguments |= {f"batch/{name}": leaf for name, leaf in batch.items()}
    return Program(function, (unflatten(params), batch), arguments, mesh, config.mesh)


@contextlib.contextmanager
def answering_for(device: Any) -> Iterator[None]:
    """Lowers for the compute capability of `device`: for cuDNN attention JAX would ask this machine's GPU for it."""
    if device.platform != "gpu":
        yield
        return

    def numbers(capability: str) -> tuple[int, ...]:
        return tuple(int(number) for number in capability.split("."))

    own = numbers(device.compute_capability)
    answers = {
        "check_compute_capability": lambda capability: own >= numbers(capability),
        "is_cuda_compute_capability_equal": lambda capability: own == numbers(capability),
    }
    before = {name: getattr(fused_attention_stablehlo, name) for name in answers}
    try:
        for name, answer in answers.items():
            setattr(fused_attention_stablehlo, name, answer)
        yield
    finally:
        for name, function in before.items():
            setattr(fused_attention_stablehlo, name, function)


def compile_program(program: Program, target: Target) -> Compiled:
    """Compiles a program.

    Raises:
      DoesNotFit: the program needs more memory than a device has.
      UserError: the compiler failed for another reason.
    """
    lowered = program.lower()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder} if target.is_tpu else GPU_OPTIONS
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise DoesNotFit(needed_bytes(str(error)), str(error)) from error
            raise UserError(f"{target.name}: the compiler failed: {str(error)[:2000]}") from error
        seconds = time.perf_counter() - start
        # On v5p and v6e `as_text` fails for programs with asynchronous collectives. The dumped text is the same.
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
    """The bytes that XLA's message of exhausted memory asks for; None if it names none."""
    found = re.search(r"(?:Used|required[^(]*\()\s*([\d.]+)([KMGT]?)", message)
    return float(found[1]) * GIB / {"": GIB, "K": 2**20, "M": 2**10, "G": 1, "T": 2**-10}[found[2]] if found else None
