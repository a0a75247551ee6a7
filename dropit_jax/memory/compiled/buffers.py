"""Finds the buffers that are alive at the peak of a program's temporary memory.

XLA's notes give the address and the live range of each value. XLA's own list of the
values at the peak omits the workspaces of GPU kernels, so this module finds the peak.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from dropit_jax.memory.compiled.hlo import ArrayType, Program, array_types
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
    """The memory of one value.

    Attributes:
      nbytes: the size, in bytes.
      dtype: the dtype of the array.
      shape: the shape of the array.
      layer: the path of the Flax module that computes the array; the model's name if
        no submodule does, "" if the array is computed outside the model.
      operation: JAX's name of the operation that computes the array, or of the last one
        if XLA fused several. A copy of an argument has the name of the argument.
      backward: whether the backward pass computes the array, recomputation included.
    """

    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    layer: str
    operation: str
    backward: bool


@dataclasses.dataclass(frozen=True)
class _Value:
    """A value in temporary memory.

    Attributes:
      name: the instruction that returns the value, with `index` in its tuple.
      place: the allocation, and the offset in it.
      first: the start of the live range, as the number of an instruction.
      last: the end of the live range, inclusive.
    """

    name: str
    index: tuple[int, ...]
    nbytes: int
    place: tuple[int, int]
    type: str
    first: int
    last: int


def buffers_at_peak(
    directory: Path, program: Program, argument_names: Sequence[str] = ()
) -> list[Buffer]:
    """Returns the temporary buffers alive at the peak, largest first.

    Args:
      directory: the directory of XLA's notes. Without notes, the list is empty.
      program: the compiled program.
      argument_names: names for the arguments that XLA calls args[0], args[1], ...
    """
    assignments = list(directory.glob("*after_optimizations-buffer-assignment.txt"))
    ranges = list(directory.glob("*after_optimizations-live-range.txt"))
    if not (assignments and ranges):
        return []
    values = _values(assignments[0].read_text(), _ranges(ranges[0].read_text()))
    buffers = [
        _buffer(value, program, argument_names) for value in _alive_at_peak(values)
    ]
    return sorted(buffers, key=lambda buffer: buffer.nbytes, reverse=True)


_Ranges = dict[tuple[str, tuple[int, ...]], tuple[int, int]]


def _ranges(text: str) -> _Ranges:
    """Parses live ranges: (name, index) -> (first, last)."""
    return {
        (name, _index(index)): (int(first), int(last))
        for name, index, first, last in _RANGE.findall(text)
    }


def _values(text: str, ranges: _Ranges) -> list[_Value]:
    """Parses a buffer assignment; returns the values in temporary memory."""
    values: list[_Value] = []
    allocation = None
    for line in text.splitlines():
        if heading := _ALLOCATION.match(line):
            is_temporary = "preallocated-temp" in heading[2]
            allocation = int(heading[1]) if is_temporary else None
        elif allocation is not None and (value := _VALUE.match(line)):
            place = (allocation, int(value["offset"]))
            key = (value["name"], _index(value["index"] or ""))
            is_table = value["type"].startswith("(")  # the pointers of a tuple
            if key in ranges and not is_table:
                size = int(value["size"])
                values.append(_Value(*key, size, place, value["type"], *ranges[key]))
    return values


def _alive_at_peak(values: Iterable[_Value]) -> list[_Value]:
    """Returns the values alive at the peak, only the largest of each place.

    An operation that works in place has its operand and its result at one place.
    """
    changes = collections.defaultdict(list)
    for value in values:
        changes[value.first].append((value, True))
        changes[value.last + 1].append((value, False))
    alive: dict[tuple[int, int], list[_Value]] = collections.defaultdict(list)
    nbytes, peak_bytes, peak = 0, 0, list[_Value]()
    for time in sorted(changes):
        for value, begins in changes[time]:
            here = alive[value.place]
            nbytes -= max((each.nbytes for each in here), default=0)
            here.append(value) if begins else here.remove(value)
            nbytes += max((each.nbytes for each in here), default=0)
        if nbytes > peak_bytes:
            peak_bytes = nbytes
            peak = [_largest(here) for here in alive.values() if here]
    return peak


def _largest(values: list[_Value]) -> _Value:
    return max(values, key=lambda value: (value.nbytes, value.first))


def _buffer(value: _Value, program: Program, argument_names: Sequence[str]) -> Buffer:
    array = array_types(value.type)[0]
    maker = program.origin(value.name, value.index)
    op_name = maker.op_name if maker else ""
    layer, operation = scopes.layer_and_operation(op_name)
    if argument := _ARGUMENT.fullmatch(op_name):
        operation = dict(enumerate(argument_names)).get(int(argument[1]), op_name)
    if operation in ("", "call_exported"):  # added by the compiler
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


def _is_bytes(array: ArrayType) -> bool:
    """Returns whether an array may be a workspace: one axis of bytes."""
    return len(array.shape) == 1 and array.dtype in ("int8", "uint8")


def _index(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))
