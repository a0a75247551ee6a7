"""Finds the buffers that are alive when a program takes most memory.

XLA notes where in memory each value lies, and from which instruction to which it is
needed. Its own list of the values at the peak leaves out the workspaces of kernels, so
the peak is found here.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from dropit_jax.memory.compiled.hlo import Array, Program, array_types
from dropit_jax.memory.traced import scopes

_ALLOCATION = re.compile(r"allocation (\d+): size \d+, (.*)")
_VALUE = re.compile(
    r" value: <\d+ (?P<name>[^\s{]+)(?P<index>\{[\d,]*\})?( \(phi\))? @\d+> "
    r"\(size=(?P<size>\d+),offset=(?P<offset>\d+)\): (?P<type>.*)"
)
_ARGUMENT = re.compile(r"args\[(\d+)\]")
_RANGE = re.compile(r"^    ([^\s{]+)\{([\d,]*)\}:(\d+)-(\d+)$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Buffer:
    """Memory that one value takes.

    Attributes:
      nbytes: its size.
      dtype: of the array in it.
      shape: of the array in it.
      layer: the path of the Flax module that makes it; the model's name for what it
        makes itself, "" for what is made outside of it.
      operation: the operation that makes it, as JAX calls it: of several that are
        compiled into one, the last. A copy of an argument bears the argument's name.
      backward: whether it is made in the backward pass, recomputation included.
    """

    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    layer: str
    operation: str
    backward: bool


@dataclasses.dataclass(frozen=True)
class _Value:
    """A value, and the first and last instruction that needs its memory."""

    name: str
    index: tuple[int, ...]
    nbytes: int
    place: tuple[int, int]
    type: str
    first: int
    last: int


def at_peak(
    directory: Path, program: Program, argument_names: Sequence[str] = ()
) -> list[Buffer]:
    """The buffers alive at the peak, largest first; arguments and results are none.

    Args:
      directory: where XLA left its notes; without any, there are no buffers.
      program: the compiled program.
      argument_names: what to call the arguments that XLA calls args[0], args[1], ...
    """
    assignments = list(directory.glob("*after_optimizations-buffer-assignment.txt"))
    ranges = list(directory.glob("*after_optimizations-live-range.txt"))
    if not (assignments and ranges):
        return []
    values = _values(assignments[0].read_text(), _ranges(ranges[0].read_text()))
    buffers = [_buffer(value, program, argument_names) for value in _at_peak(values)]
    return sorted(buffers, key=lambda buffer: buffer.nbytes, reverse=True)


_Ranges = dict[tuple[str, tuple[int, ...]], tuple[int, int]]


def _ranges(text: str) -> _Ranges:
    return {
        (name, _index(index)): (int(first), int(last))
        for name, index, first, last in _RANGE.findall(text)
    }


def _values(text: str, ranges: _Ranges) -> list[_Value]:
    """The values in temporary memory."""
    values: list[_Value] = []
    allocation = None
    for line in text.splitlines():
        if heading := _ALLOCATION.match(line):
            is_temporary = "preallocated-temp" in heading[2]
            allocation = int(heading[1]) if is_temporary else None
        elif allocation is not None and (value := _VALUE.match(line)):
            place = (allocation, int(value["offset"]))
            key = (value["name"], _index(value["index"] or ""))
            is_table = value["type"].startswith("(")  # of a tuple's pointers
            if key in ranges and not is_table:
                size = int(value["size"])
                values.append(_Value(*key, size, place, value["type"], *ranges[key]))
    return values


def _at_peak(values: Iterable[_Value]) -> list[_Value]:
    """Of each place in memory, the largest value there at the peak.

    An operation that works in place has its operand and its result at one place.
    """
    changes = collections.defaultdict(list)
    for value in values:
        changes[value.first].append((value, True))
        changes[value.last + 1].append((value, False))
    alive: dict[tuple[int, int], list[_Value]] = collections.defaultdict(list)
    total, most, peak = 0, 0, list[_Value]()
    for time in sorted(changes):
        for value, begins in changes[time]:
            here = alive[value.place]
            total -= max((each.nbytes for each in here), default=0)
            here.append(value) if begins else here.remove(value)
            total += max((each.nbytes for each in here), default=0)
        if total > most:
            most = total
            peak = [_largest(here) for here in alive.values() if here]
    return peak


def _largest(values: list[_Value]) -> _Value:
    return max(values, key=lambda value: (value.nbytes, value.first))


def _buffer(value: _Value, program: Program, argument_names: Sequence[str]) -> Buffer:
    array = array_types(value.type)[0]
    maker = program.origin(value.name, value.index)
    op_name = maker.op_name if maker else ""
    layer, operation = scopes.split(op_name)
    if argument := _ARGUMENT.fullmatch(op_name):
        operation = dict(enumerate(argument_names)).get(int(argument[1]), op_name)
    if operation in ("", "call_exported"):  # the compiler made it
        operation = (maker.name if maker else value.name).partition(".")[0]
    if maker and maker.opcode == "custom-call" and _is_bytes(array):
        operation += " workspace"
    return Buffer(
        nbytes=value.nbytes,
        dtype=array.dtype,
        shape=array.shape,
        layer=layer,
        operation=operation,
        backward=scopes.is_backward(op_name),
    )


def _is_bytes(array: Array) -> bool:
    return len(array.shape) == 1 and array.dtype in ("int8", "uint8")


def _index(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))
