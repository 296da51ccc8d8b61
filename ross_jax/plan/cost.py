"""Cost of a program: floating-point operations, cycles and collectives of its optimised HLO.

The body of a loop counts as often as the loop runs, unlike in XLA's own `cost_analysis()`, which counts it once.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence

import numpy as np

from ross_jax.models.attention import BIDIRECTIONAL
from ross_jax.models.image_attention import LANES
from ross_jax.plan.hlo import Computation, Instruction, Module
from ross_jax.plan.loops import Scope, trip_count

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
PARTS: tuple[tuple[str, str], ...] = (
    ("autoencoder", r"Autoencoder\b|\btargets\b"),
    ("decode", r"\bdecode\b"),
    ("optimizer", r"\boptimizer\b"),
    ("text loss", r"\btext_loss\b"),
    ("reconstruction", r"\bDenoiser\b|\breconstruction\b"),
    ("encoder", r"/vision\b"),
    ("projector", r"/projector\b"),
    ("language model", r"/language\b|\bRoss\b|\bLanguageModel\b"),
)
"""Part of a step -> pattern of its operations' names. The first match counts."""
OTHER = "other"


def part_of(op_name: str) -> str:
    """The part of a step that an operation belongs to."""
    return next((part for part, pattern in PARTS if re.search(pattern, op_name)), OTHER)


# Floating-point operations.


def flops(module: Module, computation: Computation, instruction: Instruction) -> int:
    """FLOPs of one run of an instruction: 2 for each multiplication of its matrix products and convolutions.

    Multiplications with padding do not count.
    """
    if instruction.opcode in ("fusion", "call", "async-start"):
        return sum(_flops(inside, each) for inside, each in module.inside(instruction))
    return _flops(computation, instruction)


def _flops(computation: Computation, instruction: Instruction) -> int:
    if instruction.opcode == "dot":
        return _dot(computation, instruction, _indices(instruction.attribute("lhs_contracting_dims")))
    if instruction.opcode == "convolution" or re.search(r"__cudnn\$conv\w*Forward", instruction.attributes):
        return _convolution(computation, instruction)
    if instruction.opcode == "custom-call":
        if is_kernel(instruction):
            estimate = re.search(r'"flops":\s*"?(\d+)', instruction.attributes)
            return int(estimate[1]) if estimate else _attention(computation, instruction)
        gemm = re.search(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]', instruction.attributes)
        return _dot(computation, instruction, _indices(gemm[1])) if gemm else 0  # cuBLAS
    return 0


def is_kernel(instruction: Instruction) -> bool:
    """Whether the instruction is a kernel that XLA did not write: a Pallas kernel, or cuDNN's attention."""
    return instruction.opcode == "custom-call" and bool(
        re.search(r'"tpu_custom_call"|__cudnn\$fmha', instruction.attributes)
    )


ATTENTION = {"fwd": 2, "dkv": 4, "dq": 3, "bwd": 5, "Softmax": 2, "SoftmaxBackward": 5}
"""Part of an attention kernel's name -> how many products of the size queries x keys x head the kernel computes.

The first four are Pallas kernels (splash attention and `image_attention`), the others cuDNN's.
"""
_PALLAS_ATTENTION = r"(splash_m[hq]a|image_attention)_(fwd|dkv|dq|bwd)(?:_(\d+))?"
"""Groups: the kernel, the part of the name in `ATTENTION`, and the size of a head where shapes do not tell it."""


def _attention(computation: Computation, instruction: Instruction) -> int:
    """FLOPs of an attention kernel that does not state them. Causal kernels skip half of the scores."""
    arrays = _read(computation, instruction)
    if len(arrays) < 2:
        return 0
    query, key = arrays[:2]
    pallas = re.search(_PALLAS_ATTENTION, instruction.name + instruction.op_name)
    if pallas:
        square = math.prod(query[:-1]) * key[-2]
        causal = pallas[1] != "image_attention" and BIDIRECTIONAL not in instruction.op_name
        return ATTENTION[pallas[2]] * (1 if causal else 2) * square * query[-1]
    cudnn = re.search(r"__cudnn\$fmha(?:ScaleBias)?(SoftmaxBackward|Softmax)", instruction.attributes)
    scores = re.search(r'"intermediate_tensor_shape":.*?"dimensions":\s*\[([^\]]*)\]', instruction.attributes)
    if cudnn is None or scores is None:
        return 0
    causal = '"CAUSAL"' in instruction.attributes or '"PADDING_CAUSAL"' in instruction.attributes
    return ATTENTION[cudnn[1]] * (1 if causal else 2) * math.prod(_indices(scores[1])) * query[-1]


def idle(computation: Computation, instruction: Instruction) -> float:
    """Factor by which an attention kernel on TPU is slower than its FLOPs suggest.

    The factor is 2 for heads of 64 values, because matrix units are 128 wide.
    """
    pallas = re.search(_PALLAS_ATTENTION, instruction.name + instruction.op_name)
    arrays = _read(computation, instruction)
    if pallas is None or not arrays:
        return 1.0
    head = int(pallas[3] or arrays[0][-1])
    return math.ceil(head / LANES) * LANES / head


def _read(computation: Computation, instruction: Instruction) -> list[tuple[int, ...]]:
    """Shapes of the floating-point arrays that a kernel reads. Attention kernels read queries first, then keys."""
    shapes = [each.shape for each in computation.operands(instruction)]
    return [shape.sizes for shape in shapes if len(shape.sizes) > 2 and shape.dtype in ("bf16", "f16", "f32")]


def _indices(text: str | None) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text or "")]


def _dot(computation: Computation, instruction: Instruction, contracted: Sequence[int]) -> int:
    left = computation.instructions[instruction.operands[0]].shape
    return 2 * instruction.shape.elements * math.prod(left.sizes[i] for i in contracted)


def _convolution(computation: Computation, instruction: Instruction) -> int:
    left, right = (computation.instructions[name].shape.sizes for name in instruction.operands[:2])
    labels = re.match(r"(\w+)_(\w+)->(\w+)", instruction.attribute("dim_labels"))
    inputs, kernel, outputs = labels[1], labels[2], labels[3]
    result = instruction.shape.sizes
    window = dict(
        field.split("=") for field in (instruction.attribute("window") or "{}").strip("{}").split() if "=" in field
    )
    products = result[outputs.index("b")] * result[outputs.index("f")] * right[kernel.index("i")]
    for dimension in sorted(set(inputs) - {"b", "f"}):
        number = int(dimension)
        settings = {name: value.split("x")[number] for name, value in window.items()}
        products *= _meetings(
            left[inputs.index(dimension)],
            right[kernel.index(dimension)],
            result[outputs.index(dimension)],
            int(settings.get("stride", 1)),
            int(settings.get("pad", "0_0").split("_")[0]),
            int(settings.get("lhs_dilate", 1)),
            int(settings.get("rhs_dilate", 1)),
        )
    return 2 * products


def _meetings(size: int, kernel: int, outputs: int, stride: int, pad: int, dilate: int, kernel_dilate: int) -> int:
    """How many pairs of output and kernel positions along a dimension meet an element of the input.

    The other pairs meet padding, or gaps in a dilated input. XLA for TPU writes batched products as convolutions whose
    padding or dilation hides all but the diagonal.
    """
    position = np.arange(outputs)[:, None] * stride + np.arange(kernel) * kernel_dilate - pad
    inside = (position >= 0) & (position <= (size - 1) * dilate) & (position % dilate == 0)
    return int(inside.sum())


# Collectives.


def collective_kind(instruction: Instruction) -> str | None:
    """`all-gather` for `all-gather` and `all-gather-start`; None if the instruction is no collective."""
    kind = instruction.opcode.removesuffix("-start")
    if kind == "send":  # to the host, which talks to the hosts of other slices
        across = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
        kind = across[1].lower().replace("_", "-") if across else ""
        kind = "collective-permute" if kind == "one-to-one" else kind
    return kind if kind in COLLECTIVES else None


def rendezvous(instruction: Instruction) -> str | None:
    """The name that a send to other TPU slices shares with the matching receive."""
    found = re.search(r'_xla_host_transfer_rendezvous="([^"]+)"', instruction.attributes)
    return found[1] if found else None


def replica_group(instruction: Instruction, devices: int) -> list[int]:
    """The first group of devices that exchange data in a collective, by place in the mesh.

    The group of a permutation is a sender and its receiver.
    """
    text = instruction.attributes
    slices = re.search(r'_xla_megascale_target="\{([\d,:]+)\}x', text)
    if slices:  # one device of each slice; the devices of a slice are neighbours in the mesh
        ends = [_indices(part) for part in slices[1].split(",")]
        count = sum(end[-1] - end[0] + 1 for end in ends)
        return [i * (devices // count) for i in range(count)]
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text)
    if pairs:
        return [int(pairs[1]), int(pairs[2])]
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
    if listed:
        return _indices(listed[1])
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=" + _IOTA, text)
    if iota:
        return _iota(iota[2], iota[3]).reshape(_indices(iota[1]))[0].tolist()
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? ?\{([^}]*)\}", text)
    if mesh is None:
        return list(range(devices))
    places = _mesh_group(mesh[1], mesh[3])
    order = re.fullmatch(_IOTA, mesh[2] or "")
    if order:
        return sorted(_iota(order[1], order[2])[places].tolist())
    return sorted(_indices(mesh[2])[place] for place in places) if mesh[2] else places


_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
"""`[2,4]T(1,0)`: the numbers 0 to 7 as an array of shape 2 x 4, transposed with the axis order (1, 0)."""


def _iota(shape: str, order: str | None) -> np.ndarray:
    ids = np.arange(math.prod(_indices(shape))).reshape(_indices(shape))
    return (ids.transpose(_indices(order)) if order else ids).reshape(-1)


def _mesh_group(axes: str, chosen: str) -> list[int]:
    """The group of device 0 in XLA's notation of a mesh.

    Args:
      axes: names and sizes, as `'a'=4,'b'=2`.
      chosen: axes along which devices exchange data, as `'b'`. `'a':(2)2` is a part of axis a: it is split into
        2 x 2, and the group runs along the second factor.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    strides = dict(zip(sizes, np.cumprod([1, *reversed(sizes.values())])[:-1][::-1], strict=True))
    ids = np.zeros(1, int)
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen):
        size = int(part) if part else sizes[name]
        stride = strides[name] * (sizes[name] // (int(before) * size) if part else 1)
        ids = (ids[:, None] + np.arange(size) * stride).reshape(-1)
    return sorted(ids.tolist())


def operand_bytes(computation: Computation, instruction: Instruction) -> int:
    """Bytes that each device puts into a collective."""
    return sum(shape.bytes for each in computation.operands(instruction) for shape in each.shapes)


# The walk.


@dataclasses.dataclass(frozen=True)
class Event:
    """An instruction and its cost.

    Attributes:
      part: part of the step that the instruction belongs to.
      count: runs in one step.
      seconds: seconds of one run.
      kind: `compute`, `kernel`, or one of `COLLECTIVES`.
      flops: FLOPs of one run.
      cycles: the compiler's estimate for one run; None if it states none.
      group: devices that exchange data in a collective, by place in the mesh.
      bytes: bytes that each device puts into a collective.
    """

    instruction: Instruction
    part: str
    count: int
    seconds: float
    kind: str = "compute"
    flops: int = 0
    cycles: int | None = None
    group: tuple[int, ...] = ()
    bytes: int = 0

    @property
    def total(self) -> float:
        """Seconds in one step."""
        return self.count * self.seconds


@dataclasses.dataclass(frozen=True)
class Timing:
    """The speed of a topology.

    Attributes:
      compute: (cycles or None, FLOPs) -> seconds.
      kernel: FLOPs of a hand-written kernel -> seconds.
      collective: (kind, bytes that each device puts in, group) -> seconds.
      devices: number of devices of the mesh.
    """

    compute: Callable[[int | None, int], float]
    kernel: Callable[[int], float]
    collective: Callable[[str, int, Sequence[int]], float]
    devices: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """A program's cost.

    Attributes:
      events: all instructions that cost anything.
      scheduled: seconds if collectives overlap with the instructions that XLA scheduled between their start and end.
      notes: what could not be read from the text.
    """

    events: list[Event]
    scheduled: float
    notes: list[str]

    def seconds(self, *kinds: str) -> float:
        """Seconds of all events of these kinds."""
        return sum((event.total for event in self.events if event.kind in kinds), 0.0)


def estimate(module: Module, timing: Timing) -> Cost:
    """Adds up the cost of a program, instruction by instruction as it runs."""
    walk = _Walk(module, timing)
    scheduled, events = walk.run(Scope(module, module.entry), 1, OTHER)
    return Cost(events, scheduled, sorted(walk.notes))


class _Walk:
    """Follows a program as it runs.

    Args to the methods:
      scope: the computation that an instruction is in.
      count: how often this computation runs in one step.
      part: the part that an instruction belongs to if its name does not tell.
    """

    def __init__(self, module: Module, timing: Timing):
        self.module, self.timing = module, timing
        self.notes: set[str] = set()

    def run(self, scope: Scope, count: int, part: str) -> tuple[float, list[Event]]:
        """Seconds of one run of a computation, and its events.

        Links between chips and the network between slices work beside the compute units, one transfer after another.
        """
        now, busy = 0.0, {"links": 0.0, "network": 0.0}
        events: list[Event] = []
        ends: dict[str, float] = {}  # channel or name of a transfer under way -> when it ends
        for instruction in scope.computation:
            if instruction.opcode in ("while", "call", "conditional"):
                run = self._loop if instruction.opcode == "while" else self._branches
                elapsed, more = run(scope, instruction, count, part)
                now, events = now + elapsed, events + more
                continue
            transfer = self._transfer(scope.computation, instruction)
            event = self._event(scope.computation, instruction, count, part)
            if event is not None:
                events.append(event)
                now += event.seconds
            if transfer.collective is not None:
                key = _channel(transfer.collective)
                if key not in ends:
                    sent = self._collective(transfer, instruction, count, part)
                    events.append(sent)
                    way = "network" if transfer.collective.opcode == "send" else "links"
                    busy[way] = ends[key] = max(busy[way], now) + sent.seconds
                if transfer.ends or not transfer.starts:
                    now = max(now, ends[key])
                if transfer.starts:
                    ends[instruction.name] = ends[key]
            elif transfer.ends:
                awaited = scope.computation.operands(instruction)
                now = max([now, *(ends.get(rendezvous(each) or each.name, 0.0) for each in awaited)])
        return max(now, *busy.values()), events

    def _loop(self, scope: Scope, loop: Instruction, count: int, part: str) -> tuple[float, list[Event]]:
        turns = trip_count(scope, loop)
        if turns is None:
            self.notes.add(f"loop {loop.op_name or loop.name}: its number of turns is not in the text; counted once")
            turns = 1
        body = self.module.computations[loop.attribute("body").lstrip("%")]
        elapsed, events = self.run(scope.enter(body, loop), count * turns, self._part(loop, part))
        return elapsed * turns, events

    def _branches(self, scope: Scope, caller: Instruction, count: int, part: str) -> tuple[float, list[Event]]:
        """The called computation, or the slowest branch of a conditional."""
        called = self.module.called(caller)
        scopes = [scope.enter(each, caller) if caller.opcode == "call" else Scope(self.module, each) for each in called]
        branches = [self.run(each, count, part) for each in scopes]
        return max(branches, key=lambda branch: branch[0], default=(0.0, []))

    def _transfer(self, computation: Computation, instruction: Instruction) -> "_Transfer":
        if collective_kind(instruction):
            starts = instruction.opcode.endswith("-start") or instruction.opcode == "send"
            return _Transfer(computation, instruction, starts=starts)
        if instruction.opcode.endswith("-done"):
            return _Transfer(computation, ends=instruction.opcode != "send-done")
        if instruction.opcode not in ("fusion", "async-start"):
            return _Transfer(computation)
        found, targets = None, ""
        for inside, each in self.module.inside(instruction):
            found = (inside, each) if collective_kind(each) else found
            targets += each.attributes if each.opcode == "custom-call" else ""
        if found is None:
            return _Transfer(computation)
        # On TPU the start, the work between, and the end are fusions that all hold the collective.
        ends = "AsyncCollectiveDone" in targets
        asynchronous = instruction.opcode == "async-start" or "async_collective" in instruction.attributes + targets
        starts = "AsyncCollectiveStart" in targets or (asynchronous and not ends)
        return _Transfer(*found, starts, ends)

    def _part(self, instruction: Instruction, default: str) -> str:
        names = [instruction.op_name]
        if instruction.opcode == "fusion":
            inner = sorted(
                (each for _, each in self.module.inside(instruction)),
                key=lambda each: (each.opcode not in ("convolution", "dot"), not each.root),
            )
            names += [each.op_name for each in inner]
        return next((part for part in map(part_of, names) if part != OTHER), default)

    def _event(self, computation: Computation, instruction: Instruction, count: int, part: str) -> Event | None:
        found = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
        cycles = int(found[1]) if found else None
        work = flops(self.module, computation, instruction)
        part = self._part(instruction, part)
        if is_kernel(instruction):
            if not work:
                self.notes.add(
                    f"kernel {instruction.op_name or instruction.name}: states no FLOPs; it counts as nothing"
                )
            seconds = self.timing.kernel(work) * idle(computation, instruction)
            return Event(instruction, part, count, seconds, "kernel", work)
        if cycles is None and not work:
            return None
        return Event(instruction, part, count, self.timing.compute(cycles, work), "compute", work, cycles)

    def _collective(self, transfer: "_Transfer", outer: Instruction, count: int, part: str) -> Event:
        """The event of a transfer that `outer` starts."""
        collective = transfer.collective
        kind, size = collective_kind(collective), operand_bytes(transfer.computation, collective)
        if kind == "all-reduce" and outer.opcode == "fusion" and "all-reduce-scatter" in outer.attributes + outer.name:
            kind = "reduce-scatter"  # XLA for TPU writes one as an all-reduce whose result is sliced
        group = tuple(replica_group(collective, self.timing.devices))
        seconds = self.timing.collective(kind, size, group)
        part = self._part(collective, self._part(outer, part))
        return Event(collective, part, count, seconds, kind, group=group, bytes=size)


@dataclasses.dataclass(frozen=True)
class _Transfer:
    """Role of an instruction in a transfer.

    Attributes:
      computation: the computation that the collective is in.
      collective: None if the instruction holds no collective.
      starts: whether the collective only starts there, to go on beside other instructions.
      ends: whether the instruction waits for the collective, or for the transfers of its operands, to end.
    """

    computation: Computation
    collective: Instruction | None = None
    starts: bool = False
    ends: bool = False


def _channel(collective: Instruction) -> str:
    return rendezvous(collective) or collective.attribute("channel_id") or collective.name
