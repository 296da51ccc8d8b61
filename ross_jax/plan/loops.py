"""How often the loops of a program run, as far as its text tells.

XLA for TPU does not print trip counts. They follow from a loop's condition, the counter's start and its step, which are
integers that the text states.
"""

import dataclasses
import math
import re
from collections.abc import Callable

from ross_jax.plan.hlo import Computation, Instruction, Module

Value = int | None
"""An integer, or None where the text does not tell it."""
Bindings = Callable[[int, int | None], Value]
"""(parameter number, element of the parameter if it is a tuple) -> value."""
_INTEGER = re.compile(r"-?\d+")
_MOVES = ("copy", "bitcast", "convert", "copy-start", "copy-done", "reshape", "opt-barrier", "broadcast")
"""Instructions that pass their operand on."""


def unknown(parameter: int, element: int | None) -> Value:
    """Bindings of a computation whose arguments are not known."""
    del parameter, element


@dataclasses.dataclass(frozen=True)
class Scope:
    """A computation, and the values of its parameters as far as they are known."""

    module: Module
    computation: Computation
    bindings: Bindings = unknown

    def enter(self, computation: Computation, caller: Instruction) -> "Scope":
        """The scope of a computation that `caller` runs, its parameters bound to the caller's operands."""
        return Scope(self.module, computation, lambda i, element: self.value(caller.operands[i], element))

    def value(self, name: str, element: int | None = None) -> Value:
        """The integer that an instruction yields.

        Args:
          element: element of the instruction's result, if that is a tuple.
        """
        instruction = self.computation.instructions[name]
        operands = instruction.operands
        match instruction.opcode:
            case "constant":
                return int(instruction.arguments) if _INTEGER.fullmatch(instruction.arguments.strip()) else None
            case "parameter":
                return self.bindings(int(instruction.arguments), element)
            case "get-tuple-element":
                return self.value(operands[0], int(instruction.attribute("index")))
            case "tuple":
                return self.value(operands[element]) if element is not None else None
            case "add" | "subtract" | "multiply":
                left, right = self.value(operands[0]), self.value(operands[1])
                if left is None or right is None:
                    return None
                return {"add": left + right, "subtract": left - right, "multiply": left * right}[instruction.opcode]
            case "fusion" | "call":
                called = self.module.called(instruction)[0]
                return self.enter(called, instruction).value(called.root.name, element)
            case opcode if opcode in _MOVES and operands:
                return self.value(operands[0], element if opcode == "opt-barrier" else None)
        return None


def trip_count(scope: Scope, loop: Instruction) -> int | None:
    """How often the body of a `while` runs; None if the text does not tell.

    If the loop has several conditions, the first that ends it counts.

    Args:
      scope: scope of the computation that the loop is in.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if known:
        return int(known[1])
    condition, body = (scope.module.computations[loop.attribute(key).lstrip("%")] for key in ("condition", "body"))
    before = scope.enter(condition, loop)
    turned = scope.enter(body, loop)
    after = Scope(scope.module, condition, lambda _, element: turned.value(body.root.name, element))
    return min(_counts(before, after, condition.root), default=None)


def _counts(before: Scope, after: Scope, instruction: Instruction) -> list[int]:
    """For each comparison that a condition is made of, the turns after which it ends the loop.

    Args:
      before, after: scope of the instruction before the loop, and after one turn.
    """
    operands = instruction.operands
    match instruction.opcode:
        case "and" | "copy" | "bitcast":
            inner = [before.computation.instructions[name] for name in operands]
            return [count for each in inner for count in _counts(before, after, each)]
        case "fusion":
            called = before.module.called(instruction)[0]
            return _counts(before.enter(called, instruction), after.enter(called, instruction), called.root)
        case "compare":
            first, second = _margin(before, operands), _margin(after, operands)
            if first is not None and second is not None and first != second:
                return [_turns(first, second, instruction.attribute("direction"))]
    return []


def _margin(scope: Scope, operands: tuple[str, ...]) -> Value:
    """Right side of a comparison minus its left side."""
    left, right = (scope.value(name) for name in operands)
    return None if left is None or right is None else right - left


def _turns(first: int, second: int, direction: str) -> int:
    """Turns until `0 direction margin` fails.

    Args:
      first, second: the margin before the loop and after one turn; each turn changes it by as much.
    """
    if direction in ("GT", "GE"):
        first, second, direction = -first, -second, {"GT": "LT", "GE": "LE"}[direction]
    step = first - second
    if direction == "LE":
        first += 1
    return max(0, math.ceil(first / step)) if step > 0 or direction == "NE" else 0
