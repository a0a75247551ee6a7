"""Counts the bytes that the kernels of a compiled program read and write."""

import math

import numpy as np

from dropit_jax.memory.compiled.hlo import Array, Computation, Instruction, Program

# Names for arrays, or parts of arrays, that are there.
_FREE = frozenset(
    {
        "after-all",
        "bitcast",
        "constant",
        "get-tuple-element",
        "opt-barrier",
        "parameter",
        "partition-id",
        "replica-id",
        "tuple",
    }
)
# Those that only run others.
_CALLS = frozenset({"call", "conditional", "while"})
# Those that read no more of their first operand than they return.
_SLICES = frozenset({"dynamic-slice", "gather", "slice"})


def count(program: Program) -> int:
    """The bytes of operands and results of all kernels, as `CompileReport`."""

    def of_computation(name: str) -> int:
        computation = program.computations.get(name, {})
        return sum(of_instruction(each, computation) for each in computation.values())

    def of_instruction(instruction: Instruction, computation: Computation) -> int:
        if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
            return 0
        if instruction.opcode not in _CALLS:
            return _own(program, instruction, computation)
        called = sum(map(of_computation, instruction.called))
        return instruction.repeats * called + max(
            map(of_computation, instruction.branches), default=0
        )

    return of_computation(program.entry)


def _own(program: Program, instruction: Instruction, computation: Computation) -> int:
    """The bytes of one kernel."""
    operands = [
        sum(map(_nbytes, computation[name].results)) for name in instruction.operands
    ]
    fused = program.computations.get(instruction.body, {})
    # A product in NVIDIA's libraries has its workspace beside the result.
    is_library = any(map(_is_library, (instruction, *fused.values())))
    made = instruction.results[:1] if is_library else instruction.results
    results = sum(map(_nbytes, made))
    if instruction.opcode in _SLICES:
        return 2 * results
    if instruction.opcode == "dynamic-update-slice":
        return 2 * operands[1]
    for place, nbytes in _read_in_part(fused).items():
        operands[place] = min(operands[place], nbytes)
    return sum(operands) + min(results, _written(fused, results))


def _is_library(instruction: Instruction) -> bool:
    is_call = instruction.opcode == "custom-call"
    return is_call and 'custom_call_target="__cu' in instruction.attributes


def _read_in_part(fused: Computation) -> dict[int, int]:
    """The bytes that a fusion reads of each operand of which it reads slices alone."""
    found: dict[int, int] = {}
    for name, parameter in fused.items():
        if parameter.opcode != "parameter":
            continue
        readers = [each for each in fused.values() if name in each.operands]
        parts = [_part_read(name, reader) for reader in readers]
        if readers and all(part is not None for part in parts):
            found[parameter.number] = sum(part for part in parts if part is not None)
    return found


def _part_read(name: str, reader: Instruction) -> int | None:
    """The bytes of an operand that an instruction reads; `None`: all."""
    if reader.operands[0] == name and reader.opcode in _SLICES:
        return sum(map(_nbytes, reader.results))
    if reader.operands[0] == name and reader.opcode == "dynamic-update-slice":
        return 0  # it writes into it, in its place
    return None


def _written(fused: Computation, otherwise: int) -> int:
    """The bytes that a fusion writes whose result is one array updated in part."""
    root = next((each for each in fused.values() if each.is_root), None)
    while root is not None and root.opcode == "bitcast":
        root = fused[root.operands[0]]
    if root is None or root.opcode != "dynamic-update-slice":
        return otherwise
    return sum(map(_nbytes, fused[root.operands[1]].results))


def _nbytes(array: Array) -> int:
    try:
        itemsize = np.dtype(array.dtype).itemsize
    except TypeError:
        itemsize = 2 if array.dtype == "bfloat16" else 1
    return math.prod(array.shape) * itemsize
