"""Counts the floating-point operations of a compiled program."""

import math
import re

from dropit_jax.memory.compiled.hlo import ArrayType, Computation, Instruction, Program

_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_CONTRACTING = re.compile(
    r'lhs_contracting_dims=\{([^}]*)\}|"lhs_contracting_dimensions":\[([^\]]*)\]'
)
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")

# NVIDIA's libraries that the GPU compiler calls. For a convolution, the roles of the
# first operand, the second operand and the result: x is the input of the layer, k the
# kernel, y the output.
_MATMULS = ("__cublas$gemm", "__cublas$lt$matmul")
_CONVOLUTIONS = {
    "__cudnn$convForward": "xky",
    "__cudnn$convBiasActivationForward": "xky",
    "__cudnn$convForwardGraph": "xky",
    "__cudnn$convBackwardInput": "ykx",
    "__cudnn$convBackwardFilter": "xyk",
}


def count_flops(program: Program) -> float:
    """Returns the FLOPs of matrix products and convolutions: `CompileReport.flops`."""
    counted: dict[str, float] = {}

    def of_computation(name: str) -> float:
        if name not in counted:
            computation = program.computations.get(name, {})
            counted[name] = sum(
                _own_flops(instruction, computation) + of_called(instruction)
                for instruction in computation.values()
            )
        return counted[name]

    def of_called(instruction: Instruction) -> float:
        if instruction.opcode.endswith(("-update", "-done")):
            return 0.0  # the "-start" counts the computation
        called = sum(map(of_computation, instruction.called))
        return instruction.repeats * called + max(
            map(of_computation, instruction.branches), default=0
        )

    return float(of_computation(program.entry))


def _own_flops(instruction: Instruction, computation: Computation) -> float:
    """Returns the FLOPs of a matrix product or convolution; 0 for other instructions.

    The instructions of a called computation are not counted.
    """
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
        return _dot_flops(instruction, first)
    arrays = (first, second, instruction.results[0])
    return _convolution_flops(instruction, dict(zip(roles, arrays, strict=True)))


def _dot_flops(instruction: Instruction, lhs: ArrayType) -> float:
    """Returns 2 x elements of the result x elements along the contracted axes."""
    found = _CONTRACTING.search(instruction.attributes)
    axes = re.findall(r"\d+", "".join(filter(None, found.groups()))) if found else []
    depth = math.prod(lhs.shape[int(axis)] for axis in axes)
    return 2.0 * math.prod(instruction.results[0].shape) * depth


def _convolution_flops(instruction: Instruction, arrays: dict[str, ArrayType]) -> float:
    """Returns 2 x elements of the kernel x batch x positions.

    Along each spatial axis the positions are those of the output, or of the input if it
    has fewer: the input gradient of a strided convolution is a convolution of an input
    with gaps, in which nothing is multiplied. So the output of a layer and both of its
    gradients count the same, however they are compiled.
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
