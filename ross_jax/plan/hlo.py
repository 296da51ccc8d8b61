"""Optimised HLO as data: the text that XLA prints, parsed, and how often each loop of it runs."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from functools import cached_property

BYTES = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16, "token": 0, "opaque": 0}
"""Bytes of an element, where the number in the type's name does not say."""

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
        """Without padding of the layout."""
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
      shapes: of the result; of a tuple, of every array in it.
      arguments: the text between the parentheses.
      attributes: the text behind them.
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
        """Of the (first) result."""
        return self.shapes[0]

    def attribute(self, name: str) -> str | None:
        """The value of `name=`, up to the next space or comma at its level."""
        found = re.search(rf"(?<![\w-]){name}=", self.attributes)
        if found is None:
            return None
        return self.attributes[found.end() : _value_end(self.attributes, found.end())]

    @cached_property
    def op_name(self) -> str:
        """Where in the program it comes from; empty if unknown."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it runs."""
        names = [self.attribute(key) for key in ("calls", "to_apply", "condition", "body", "true_computation")]
        names.append(self.attribute("false_computation"))
        branches = self.attribute("branch_computations") or self.attribute("called_computations") or ""
        return tuple(re.findall(r"%([^\s,()}]+)", " ".join([*filter(None, names), branches])))


@dataclasses.dataclass(frozen=True, eq=False)
class Computation:
    """Instructions by name, in the order in which they are printed, which is that of execution."""

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
    """A program."""

    computations: dict[str, Computation]
    entry: Computation

    def called(self, instruction: Instruction) -> list[Computation]:
        """The computations that it runs."""
        return [self.computations[name] for name in instruction.called if name in self.computations]

    def inside(self, instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
        """It, or, of a fusion, every instruction in it, with the computation that each is in."""
        for computation in self.called(instruction):
            for inner in computation:
                yield computation, inner
                if inner.opcode in ("fusion", "call", "async-start"):
                    yield from self.inside(inner)


def parse(text: str) -> Module:
    """Parses HLO text.

    Raises:
      ValueError: there is no entry computation in it.
    """
    computations, current, entry = {}, None, None
    for line in _whole_lines(text):
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
        raise ValueError("no ENTRY computation: this is no HLO text")
    return Module(computations, entry)


def _whole_lines(text: str) -> Iterator[str]:
    """Lines, those that attributes of a kernel break put together again."""
    whole = ""
    for line in text.splitlines():
        if whole.startswith(" ") and line not in ("", "}") and not _INSTRUCTION.match(line):
            whole += " " + line.strip()
            continue
        yield whole
        whole = line
    yield whole


def _parse_instruction(line: str, found: re.Match) -> Instruction:
    start = found.end()
    # A tuple's type has spaces inside its parentheses, an array's none.
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


# Scalars, as far as they can be known from the text.

Value = int | None
Bindings = Callable[[int, int | None], Value]
"""(parameter, element of it if it is a tuple) -> its value."""
_MOVES = ("copy", "bitcast", "convert", "copy-start", "copy-done", "reshape", "opt-barrier", "broadcast")


def unknown(parameter: int, element: int | None) -> Value:
    """The bindings of a computation of whose arguments nothing is known."""
    del parameter, element


def evaluate(
    module: Module, computation: Computation, name: str, bindings: Bindings, element: int | None = None
) -> Value:
    """The integer that an instruction yields, or None if the text does not tell.

    Args:
      bindings: of the computation's parameters.
      element: of the instruction's result, if that is a tuple.
    """
    instruction = computation.instructions[name]
    operands = instruction.operands

    def of(operand: str, inner: int | None = None) -> Value:
        return evaluate(module, computation, operand, bindings, inner)

    match instruction.opcode:
        case "constant":
            return int(instruction.arguments) if _NUMBER.fullmatch(instruction.arguments.strip()) else None
        case "parameter":
            return bindings(int(instruction.arguments), element)
        case "get-tuple-element":
            return of(operands[0], int(instruction.attribute("index")))
        case "tuple":
            return of(operands[element]) if element is not None else None
        case "add" | "subtract" | "multiply":
            left, right = of(operands[0]), of(operands[1])
            if left is None or right is None:
                return None
            return {"add": left + right, "subtract": left - right, "multiply": left * right}[instruction.opcode]
        case "fusion" | "call":
            called = module.called(instruction)[0]
            return evaluate(module, called, called.root.name, lambda i, e: of(operands[i], e), element)
        case opcode if opcode in _MOVES and operands:
            return of(operands[0], element if opcode == "opt-barrier" else None)
    return None


def trip_count(module: Module, computation: Computation, loop: Instruction, bindings: Bindings = unknown) -> int | None:
    """How often the body of a `while` runs; None if the text does not tell. Of several conditions, the first to end it.

    XLA's own count is taken where it is printed; else it follows from condition, start and step.

    Args:
      computation: that the loop is in.
      bindings: of that computation's parameters.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if known:
        return int(known[1])
    condition, body = (module.computations[loop.attribute(key).lstrip("%")] for key in ("condition", "body"))
    (start,) = loop.operands

    def before(parameter: int, element: int | None) -> Value:
        return evaluate(module, computation, start, bindings, element)

    def after(parameter: int, element: int | None) -> Value:
        return evaluate(module, body, body.root.name, before, element)

    def margins(compare: Instruction, inside: Computation, outer: Callable[[Bindings], Bindings]) -> list[Value]:
        """Right side minus left before the loop and after one turn."""
        found = []
        for state in (before, after):
            left, right = (evaluate(module, inside, name, outer(state)) for name in compare.operands)
            found.append(None if left is None or right is None else right - left)
        return found

    def counts(inside: Computation, name: str, outer: Callable[[Bindings], Bindings]) -> list[int]:
        instruction = inside.instructions[name]
        if instruction.opcode == "and":
            return [count for operand in instruction.operands for count in counts(inside, operand, outer)]
        if instruction.opcode in ("copy", "bitcast"):
            return counts(inside, instruction.operands[0], outer)
        if instruction.opcode == "fusion":
            called = module.called(instruction)[0]

            def bind(state: Bindings) -> Bindings:
                return lambda i, e: evaluate(module, inside, instruction.operands[i], outer(state), e)

            return counts(called, called.root.name, bind)
        if instruction.opcode == "compare":
            first, second = margins(instruction, inside, outer)
            if first is not None and second is not None and first != second:
                return [_turns(first, second, instruction.attribute("direction"))]
        return []

    return min(counts(condition, condition.root.name, lambda state: state), default=None)


def _turns(first: int, second: int, direction: str) -> int:
    """Turns until `0 direction margin` fails, the margin going from `first` by the same step each turn."""
    if direction in ("GT", "GE"):
        first, second, direction = -first, -second, {"GT": "LT", "GE": "LE"}[direction]
    step = first - second
    if direction == "LE":
        first += 1
    return max(0, math.ceil(first / step)) if step > 0 or direction == "NE" else 0
