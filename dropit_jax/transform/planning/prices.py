"""Prices, in bytes of memory, of storing a value and of recomputing an equation."""

import dataclasses
import math
from typing import Any

import numpy as np

from dropit_jax import compat
from dropit_jax.transform.forms.presets import Preset
from dropit_jax.transform.forms.storage import Bits, Exact, Form
from dropit_jax.transform.planning.classify import Classes, Kind, is_repeatable
from dropit_jax.transform.planning.places import RulePresets
from dropit_jax.transform.tracing import primitives, split
from dropit_jax.transform.tracing import program as programs
from dropit_jax.transform.tracing.program import Node, Program

# FLOPs of a product in the time in which a GPU moves a byte. (H100, bfloat16: 1e15
# FLOPs and 3.4e12 bytes a second.) This much time costs as much as storing one byte.
_FLOPS_A_BYTE = 300.0

# The price of an equation that must not be recomputed.
NEVER = math.inf

_EXACT = Exact()


@dataclasses.dataclass(frozen=True)
class Prices:
    """The prices of the values and equations of a program.

    Attributes:
      program: the forward pass.
      classes: the classes of its values.
      places: the presets of its values.
    """

    program: Program
    classes: Classes
    places: RulePresets

    def form(self, value: int) -> Form:
        """Returns the form in which a value would be stored."""
        kind, aval = self.classes.kinds[value], self.program.avals[value]
        return _form(self.places[value], kind, aval)

    def storing(self, value: int) -> float:
        """Returns the price of storing a value: the bytes of its form."""
        aval = self.program.avals[value]
        if not hasattr(aval, "shape"):
            return 0.0
        if not programs.nbytes(aval):
            return 8.0 * math.prod(map(compat.concrete, aval.shape))  # PRNG keys
        return float(self.form(value).nbytes(programs.sized(aval)))

    def rebuilding(self, node: Node) -> float:
        """Returns the price of recomputing an equation.

        `NEVER` if `is_repeatable` or a rule forbids it, and where a discrete result, or
        that of a discontinuous function, would be computed from lossy values: there a
        small error flips elements, such as those of a ReLU's mask.
        """
        if not is_repeatable(node, self.classes.parameters):
            return NEVER
        lossy = {value for value in node.operands if self._may_be_lossy(value)}
        if not self.places.may_rebuild(node, lossy):
            return NEVER
        if node.name in primitives.PRODUCTS:
            return self._product(node)
        is_discrete = node.name in primitives.DISCONTINUOUS or not all(
            split.is_floating(self.program.avals[v]) for v in node.outputs
        )
        if is_discrete and lossy:
            return NEVER
        return self._price(node) * self._moved(node)

    def _may_be_lossy(self, value: int) -> bool:
        """Returns whether a value may have an error when the backward pass reads it.

        The value is then stored in a lossy form, or recomputed from other values that
        are.
        """
        kind = self.classes.kinds[value]
        if kind is Kind.FREE or not split.is_floating(self.program.avals[value]):
            return False
        presets = self.places.default.all
        if kind is Kind.FLOWING:  # the values that it is computed from are flowing too
            return any(preset.flowing != _EXACT for preset in presets)
        return any({preset.kernel, preset.flowing} != {_EXACT} for preset in presets)

    def _price(self, node: Node) -> float:
        """Returns the price of moving one byte: `Preset.traffic`."""
        return self.places[node.outputs[0]].traffic if node.outputs else 0.0

    def _product(self, node: Node) -> float:
        """Returns the price of a product: that of its FLOPs and of its traffic."""
        (contracted, _), _ = node.params["dimension_numbers"]
        shape = self.program.avals[next(node.operands)].shape
        (output,) = node.outputs
        sizes = *self.program.avals[output].shape, *(shape[axis] for axis in contracted)
        flops = 2 * math.prod(map(compat.concrete, sizes))
        return flops / _FLOPS_A_BYTE + self._price(node) * self._moved(node)

    def _moved(self, node: Node) -> float:
        """Returns the bytes that an equation reads and writes."""
        values = (*set(node.operands), *node.outputs)
        return float(
            sum(programs.nbytes(self.program.avals[value]) for value in values)
        )


def _form(preset: Preset, kind: Kind, aval: Any) -> Form:
    """Returns the form in which a preset stores a value.

    A KERNEL or FLOWING value has the preset's form, a DISCRETE boolean value is packed
    as bits, all others are exact. A value is also exact if it is a scalar, if its last
    axis has a symbolic size, or if the form would take no fewer bytes.

    Args:
      preset: the preset.
      kind: the class of the value.
      aval: the type of the value.
    """
    if not getattr(aval, "shape", ()):
        return _EXACT
    chosen: Any = _EXACT
    if kind is Kind.DISCRETE and aval.dtype == np.bool_:
        chosen = Bits()
    elif kind is Kind.KERNEL:
        chosen = preset.kernel
    elif kind is Kind.FLOWING:
        chosen = preset.flowing
    if not isinstance(aval.shape[-1], int):
        return _EXACT  # a symbolic size: the last axis cannot be cut into groups
    is_less = chosen.nbytes(programs.sized(aval)) < programs.nbytes(aval)
    return chosen if is_less else _EXACT
