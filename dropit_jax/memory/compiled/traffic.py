"""Counts the bytes that the GPU kernels of a compiled program read and write."""

import math

import numpy as np

from dropit_jax.memory.compiled.hlo import ArrayType, Computation, Instruction, Program

# Opcodes that only name existing arrays, or parts of them: no GPU kernel runs.
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
# Opcodes that only run other computations.
_CALLS = frozenset({"call", "conditional", "while"})
# Opcodes that read only the part of their first operand that they return.
_SLICES = frozenset({"dynamic-slice", "gather", "slice"})


def count_bytes(program: Program) -> int:
    """Returns the bytes read and written by kernels: `CompileReport.traffic_bytes`."""

    def of_computation(name: str) -> int:
        computation = program.computations.get(name, {})
        return sum(of_instruction(each, computation) for each in computation.values())

    def of_instruction(instruction: Instruction, computation: Computation) -> int:
        if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
            return 0
        if instruction.opcode not in _CALLS:
            return _kernel_bytes(program, instruction, computation)
        called = sum(map(of_computation, instruction.called))
        return instruction.repeats * called + max(
            map(of_computation, instruction.branches), default=0
        )

    return of_computation(program.entry)


def _kernel_bytes(
    program: Program, instruction: Instruction, computation: Computation
) -> int:
    """Returns the bytes that one kernel reads and writes."""
    operands = [
        sum(map(_nbytes, computation[name].results)) for name in instruction.operands
    ]
    fused = program.computations.get(instruction.body, {})
    # NVIDIA's libraries return (result, workspace).
    is_library = any(map(_is_library, (instruction, *fused.values())))
    returned = instruction.results[:1] if is_library else instruction.results
    results = sum(map(_nbytes, returned))
    if instruction.opcode in _SLICES:
        return 2 * results
    if instruction.opcode == "dynamic-update-slice":
        return 2 * operands[1]
    for place, nbytes in _sliced_operands(fused).items():
        operands[place] = min(operands[place], nbytes)
    return sum(operands) + min(results, _written_bytes(fused, results))


def _is_library(instruction: Instruction) -> bool:
    """Returns whether an instruction calls cuBLAS, cuDNN or the like."""
    is_call = instruction.opcode == "custom-call"
    return is_call and 'custom_call_target="__cu' in instruction.attributes


def _sliced_operands(fused: Computation) -> dict[int, int]:
    """Returns the bytes that a fusion reads of each operand that it only slices.

    The keys are the positions of the operands.
    """
    found: dict[int, int] = {}
    for name, parameter in fused.items():
        if parameter.opcode != "parameter":
            continue
        readers = [each for each in fused.values() if name in each.operands]
        parts = [_slice_bytes(name, reader) for reader in readers]
        if readers and all(part is not None for part in parts):
            found[parameter.number] = sum(part for part in parts if part is not None)
    return found


def _slice_bytes(name: str, reader: Instruction) -> int | None:
    """Returns the bytes of an operand that an instruction reads; `None`: all."""
    if reader.operands[0] == name and reader.opcode in _SLICES:
        return sum(map(_nbytes, reader.results))
    if reader.operands[0] == name and reader.opcode == "dynamic-update-slice":
        return 0  # the update is in place
    return None


def _written_bytes(fused: Computation, otherwise: int) -> int:
    """Returns the bytes that a fusion writes if it only updates a slice in place."""
    root = next((each for each in fused.values() if each.is_root), None)
    while root is not None and root.opcode == "bitcast":
        root = fused[root.operands[0]]
    if root is None or root.opcode != "dynamic-update-slice":
        return otherwise
    return sum(map(_nbytes, fused[root.operands[1]].results))


def _nbytes(array: ArrayType) -> int:
    try:
        itemsize = np.dtype(array.dtype).itemsize
    except TypeError:
        itemsize = 2 if array.dtype == "bfloat16" else 1
    return math.prod(array.shape) * itemsize
