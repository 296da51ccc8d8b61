"""Optimised HLO as data: parses the text that XLA prints."""

import dataclasses
import math
import re
from collections.abc import Iterator
from functools import cached_property

BYTES = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16, "token": 0, "opaque": 0}
"""Type -> bytes of an element, for types where the number in the name does not tell."""

_COMPUTATION = re.compile(r"(ENTRY )?%?([^\s(]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?(\S+) = ")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\]")
_NUMBER = re.compile(r"-?\d+")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array's element type and sizes."""

    dtype: str
    sizes: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.sizes)

    @property
    def bytes(self) -> int:
        """Bytes without the layout's padding."""
        if self.dtype in BYTES:
            return self.elements * BYTES[self.dtype]
        bits = _NUMBER.search(self.dtype)
        return math.ceil(self.elements * int(bits[0]) / 8) if bits else self.elements

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.sizes))}]"


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """A line of HLO.

    Attributes:
      shapes: shape of the result; for a tuple, shapes of all arrays in it.
      arguments: the text between the parentheses that follow the opcode.
      attributes: the text after the closing parenthesis.
      root: whether the instruction's result is the result of its computation.
      in_vmem: whether the result lives in a chip's fast memory.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    arguments: str
    attributes: str
    root: bool
    in_vmem: bool

    @cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the operands."""
        return tuple(re.findall(r"%([^\s,()]+)", self.arguments))

    @property
    def shape(self) -> Shape:
        """Shape of the result, or of the first array of a tuple."""
        return self.shapes[0]

    def attribute(self, name: str) -> str | None:
        """The value of `name=`, up to the next comma outside parentheses; None if there is none."""
        found = re.search(rf"(?<![\w-]){name}=", self.attributes)
        if found is None:
            return None
        return self.attributes[found.end() : _value_end(self.attributes, found.end())]

    @cached_property
    def op_name(self) -> str:
        """The JAX operation that the instruction comes from, with its name scopes; empty if unknown."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that the instruction runs."""
        names = [self.attribute(key) for key in ("calls", "to_apply", "condition", "body", "true_computation")]
        names.append(self.attribute("false_computation"))
        branches = self.attribute("branch_computations") or self.attribute("called_computations") or ""
        return tuple(re.findall(r"%([^\s,()}]+)", " ".join([*filter(None, names), branches])))


@dataclasses.dataclass(frozen=True, eq=False)
class Computation:
    """Instructions by name, in order of execution."""

    name: str
    instructions: dict[str, Instruction]

    @cached_property
    def root(self) -> Instruction:
        return next(each for each in self.instructions.values() if each.root)

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """The instructions whose results `instruction` takes."""
        return [self.instructions[name] for name in instruction.operands if name in self.instructions]


@dataclasses.dataclass(frozen=True, eq=False)
class Module:
    """A program: its computations by name, and the computation that runs first."""

    computations: dict[str, Computation]
    entry: Computation

    def called(self, instruction: Instruction) -> list[Computation]:
        """The computations that an instruction runs."""
        return [self.computations[name] for name in instruction.called if name in self.computations]

    def inside(self, instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
        """Every instruction in the computations that an instruction runs, with its computation; recursive."""
        for computation in self.called(instruction):
            for inner in computation:
                yield computation, inner
                if inner.opcode in ("fusion", "call", "async-start"):
                    yield from self.inside(inner)


def parse(text: str) -> Module:
    """Parses HLO text.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations, current, entry = {}, None, None
    for line in _joined_lines(text):
        found = _COMPUTATION.match(line)
        if found:
            current = computations[found[2]] = Computation(found[2], {})
            entry = current if found[1] else entry
            continue
        found = _INSTRUCTION.match(line)
        if found and current is not None:
            instruction = _parse_instruction(line, found)
            current.instructions[instruction.name] = instruction
    if entry is None:
        raise ValueError("no ENTRY computation: not HLO text")
    return Module(computations, entry)


def _joined_lines(text: str) -> Iterator[str]:
    """Lines of the text. Attributes of kernels may contain line breaks: such lines are joined."""
    joined = ""
    for line in text.splitlines():
        if joined.startswith(" ") and line not in ("", "}") and not _INSTRUCTION.match(line):
            joined += " " + line.strip()
            continue
        yield joined
        joined = line
    yield joined


def _parse_instruction(line: str, found: re.Match) -> Instruction:
    start = found.end()
    # The type of a tuple has spaces inside its parentheses. The type of an array has no spaces.
    end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    opening = line.index("(", end)
    closing = _closing(line, opening)
    result = line[start:end]
    shapes = tuple(
        Shape(dtype, tuple(int(size.strip("<=")) for size in sizes.split(",") if size))
        for dtype, sizes in _ARRAY.findall(result)
    )
    opcode = line[end:opening].strip()
    in_vmem = "S(1)" in result
    return Instruction(
        found[2], opcode, shapes, line[opening + 1 : closing], line[closing + 1 :], bool(found[1]), in_vmem
    )


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.compile(r'[()]|"(?:[^"\\]|\\.)*"').finditer(text, start):
        depth += {"(": 1, ")": -1}.get(found[0], 0)
        if depth == 0:
            return found.start()
    raise ValueError(f"unbalanced parentheses: {text[:200]}")


def _value_end(text: str, start: int) -> int:
    depth = 0
    for index in range(start, len(text)):
        letter = text[index]
        if letter in "{[(":
            depth += 1
        elif letter in "}])":
            depth -= 1
        elif letter == "," and depth == 0:
            return index
    return len(text)
