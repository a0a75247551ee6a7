"""Counts the floating-point operations of a compiled program."""

import math
import re

from dropit_jax.memory.compiled.hlo import Array, Computation, Instruction, Program

_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_CONTRACTING = re.compile(
    r'lhs_contracting_dims=\{([^}]*)\}|"lhs_contracting_dimensions":\[([^\]]*)\]'
)
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")

# NVIDIA's kernels that the GPU compiler calls. Of a convolution, the roles of the first
# operand, the second, and the result: its input, its kernel, its output.
_MATMULS = ("__cublas$gemm", "__cublas$lt$matmul")
_CONVOLUTIONS = {
    "__cudnn$convForward": "xky",
    "__cudnn$convBiasActivationForward": "xky",
    "__cudnn$convForwardGraph": "xky",
    "__cudnn$convBackwardInput": "ykx",
    "__cudnn$convBackwardFilter": "xyk",
}


def count(program: Program) -> float:
    """The operations of matrix products and convolutions, as `CompileReport.flops`."""
    counted: dict[str, float] = {}

    def of_computation(name: str) -> float:
        if name not in counted:
            computation = program.computations.get(name, {})
            counted[name] = sum(
                _own(instruction, computation) + of_called(instruction)
                for instruction in computation.values()
            )
        return counted[name]

    def of_called(instruction: Instruction) -> float:
        if instruction.opcode.endswith(("-update", "-done")):
            return 0.0  # it waits for a start that called the same
        called = sum(map(of_computation, instruction.called))
        return instruction.repeats * called + max(
            map(of_computation, instruction.branches), default=0
        )

    return float(of_computation(program.entry))


def _own(instruction: Instruction, computation: Computation) -> float:
    """The operations of one instruction, without what it calls."""
    kind, roles = instruction.opcode, "xky"
    if kind == "custom-call":
        target = _TARGET.search(instruction.attributes)
        name = target[1] if target else ""
        if name.startswith(_MATMULS):
            kind = "dot"
        elif name in _CONVOLUTIONS:
            kind, roles = "convolution", _CONVOLUTIONS[name]
    if kind not in ("dot", "convolution"):
        return 0.0
    first, second = (computation[name].results[0] for name in instruction.operands[:2])
    if kind == "dot":
        return _product(instruction, first)
    arrays = (first, second, instruction.results[0])
    return _convolution(instruction, dict(zip(roles, arrays, strict=True)))


def _product(instruction: Instruction, lhs: Array) -> float:
    """Each element of the result is a sum over the contracted axes."""
    found = _CONTRACTING.search(instruction.attributes)
    axes = re.findall(r"\d+", "".join(filter(None, found.groups()))) if found else []
    depth = math.prod(lhs.shape[int(axis)] for axis in axes)
    return 2.0 * math.prod(instruction.results[0].shape) * depth


def _convolution(instruction: Instruction, arrays: dict[str, Array]) -> float:
    """Each weight meets each sample once a position.

    The positions are those of the output, or of the input where it has fewer: the
    gradient of a strided convolution is one of an input with gaps, in which nothing is
    multiplied. So the three products of a layer count the same, however compiled.
    """
    labels = _LABELS.search(instruction.attributes)
    if labels is None:
        raise ValueError(f"A convolution without dim_labels: {instruction.name}")
    sizes = {
        role: dict(zip(label, arrays[role].shape, strict=True))
        for role, label in zip("xky", labels.groups(), strict=True)
    }
    positions = math.prod(
        min(size, sizes["x"][axis])
        for axis, size in sizes["y"].items()
        if axis.isdigit()
    )
    return 2.0 * math.prod(arrays["k"].shape) * sizes["y"]["b"] * positions
