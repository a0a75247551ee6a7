"""A traced program as a flat list of equations, with calls of `jax.jit` inlined."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from dropit_jax import compat
from dropit_jax.compat import Jaxpr, JaxprEqn, Literal


@dataclasses.dataclass(frozen=True, eq=False)
class Scalar:
    """A literal scalar in a program."""

    val: Any


# An operand: the number of a value in its program, or a literal.
Atom = int | Scalar


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """An equation of a program.

    Attributes:
      equation: the primitive, its parameters, source and scope.
      inputs: the operands, values and scalars.
      outputs: the values that the equation makes.
    """

    equation: JaxprEqn
    inputs: tuple[Atom, ...]
    outputs: tuple[int, ...]

    @property
    def name(self) -> str:
        """The name of the primitive."""
        return self.equation.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        """The parameters of the primitive."""
        return self.equation.params

    @property
    def operands(self) -> Iterator[int]:
        """The numbers of the values among the inputs, without the literal scalars."""
        return values(self.inputs)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A flat program, whose values are numbered from 0.

    Attributes:
      avals: the type of each value, by its number.
      inputs: the values of the arguments.
      constants: the arrays of the values known when the program was traced.
      nodes: the equations, in order.
      outputs: the atoms that the program returns.
    """

    avals: list[Any]
    inputs: tuple[int, ...]
    constants: dict[int, Any]
    nodes: tuple[Node, ...]
    outputs: tuple[Atom, ...]

    def makers(self) -> dict[int, Node]:
        """Returns the equation that makes each value, inputs and constants excluded."""
        return {value: node for node in self.nodes for value in node.outputs}


@dataclasses.dataclass(frozen=True)
class Zeros:
    """A constant of zeros, allocated where it is read."""

    aval: Any


def values(atoms: Iterable[Atom]) -> Iterator[int]:
    """Returns the numbers of the values among atoms, without the literal scalars."""
    return (atom for atom in atoms if isinstance(atom, int))


def flatten(
    traced: Any, opaque: frozenset[str] = frozenset(), *, hoisted: bool = False
) -> Program:
    """Returns a jaxpr as a flat program, without calls and dead equations.

    Loops and other equations that do more with a jaxpr than call it stay equations.

    Args:
      traced: the closed jaxpr, as `jax.make_jaxpr` returns it.
      opaque: names of primitives whose calls stay equations, such as `custom_vjp_call`,
        whose derivative would be lost otherwise.
      hoisted: whether the constants of `traced` become the first inputs. The constants
        of jaxprs that it calls stay constants.
    """
    flat = _Flattener(opaque)
    jaxpr = compat.open_jaxpr(traced)
    inputs = tuple(flat.value(variable.aval) for variable in jaxpr.invars)
    closed_over = tuple(flat.value(variable.aval) for variable in jaxpr.constvars)
    variables = (*jaxpr.invars, *jaxpr.constvars)
    atoms: dict[Any, Atom]
    atoms = dict(zip(variables, (*inputs, *closed_over), strict=True))
    if not hoisted:
        pairs = zip(closed_over, compat.constants(traced), strict=True)
        flat.constants.update(pairs)
    outputs = flat.inline(jaxpr, atoms, None)
    program = Program(
        flat.avals,
        (*closed_over, *inputs) if hoisted else inputs,
        flat.constants,
        tuple(flat.nodes),
        outputs,
    )
    return without_dead(program)


def without_dead(program: Program, more: Iterable[int] = ()) -> Program:
    """Returns the program without equations whose results nobody reads.

    Equations with side effects stay.

    Args:
      program: the program.
      more: values to keep besides the outputs.
    """
    needed = {*values(program.outputs), *more}
    nodes = []
    for node in reversed(program.nodes):
        if node.equation.effects or not needed.isdisjoint(node.outputs):
            nodes.append(node)
            needed.update(node.operands)
    return dataclasses.replace(program, nodes=tuple(reversed(nodes)))


def run(
    program: Program,
    arguments: Sequence[Any],
    evaluate: Callable[..., Sequence[Any]] | None = None,
) -> list[Any]:
    """Runs the program equation by equation, and returns its outputs.

    Args:
      program: the program.
      arguments: one array for each input.
      evaluate: returns the results of a node for its operands; `None` binds the
        equation.
    """
    evaluate = evaluate or bind
    known = dict(program.constants)
    known.update(zip(program.inputs, arguments, strict=True))
    last = last_uses(program)
    for node in program.nodes:
        operands = [read(known, atom) for atom in node.inputs]
        results = evaluate(node, *operands)
        known.update(zip(node.outputs, results, strict=True))
        for value in last.get(node, ()):
            del known[value]
    return [read(known, atom) for atom in program.outputs]


def last_uses(program: Program) -> dict[Node, list[int]]:
    """Returns, for each equation, the values to discard after it.

    The equation reads or makes these, and no later equation and no output reads them.
    """
    kept = set(values(program.outputs))
    found = {}
    for node in reversed(program.nodes):
        found[node] = [v for v in {*node.operands, *node.outputs} if v not in kept]
        kept.update(found[node])
    return found


def read(known: dict[int, Any], atom: Atom) -> Any:
    """Returns the array of a value, or the number of a literal."""
    if isinstance(atom, Scalar):
        return atom.val
    found = known[atom]
    if isinstance(found, Zeros):
        return compat.ad.instantiate_zeros(compat.ad.Zero(found.aval))
    return found


def bind(node: Node, *operands: Any) -> Sequence[Any]:
    """Returns the results of an equation for operands; keeps scope and source line."""
    return compat.bind_equation(node.equation, operands)


def sized(aval: Any) -> Any:
    """Returns the type of an array with numbers in place of symbolic sizes."""
    if all(isinstance(size, int) for size in aval.shape):
        return aval
    return jax.ShapeDtypeStruct(tuple(map(compat.concrete, aval.shape)), aval.dtype)


def nbytes(aval: Any) -> int:
    """Returns the bytes of an array of this type; 0 for a type that is no array's."""
    if not hasattr(aval, "shape") or not hasattr(aval, "dtype"):
        return 0
    return math.prod(map(compat.concrete, aval.shape)) * aval.dtype.itemsize


class _Flattener:
    """Collects the equations of a jaxpr and of the jaxprs that it calls."""

    def __init__(self, opaque: frozenset[str]) -> None:
        self._opaque = opaque
        self.avals: list[Any] = []
        self.constants: dict[int, Any] = {}
        self.nodes: list[Node] = []

    def value(self, aval: Any) -> int:
        """Returns the number of a new value."""
        self.avals.append(aval)
        return len(self.avals) - 1

    def inline(
        self, jaxpr: Jaxpr, atoms: dict[Any, Atom], caller: JaxprEqn | None
    ) -> tuple[Atom, ...]:
        """Adds the equations of a jaxpr and of the jaxprs that it calls.

        A call of an opaque primitive stays one equation.

        Args:
          jaxpr: the jaxpr.
          atoms: the atoms of its inputs and constants; the results of its equations are
            added to them.
          caller: the equation that calls the jaxpr, whose scope is put before the scope
            of each equation; `None` for the outermost jaxpr.

        Returns:
          The atoms of its outputs.
        """

        def atom(each: Any) -> Atom:
            return Scalar(each.val) if isinstance(each, Literal) else atoms[each]

        for each in jaxpr.eqns:
            equation = compat.in_scope(caller, each)
            given = tuple(map(atom, equation.invars))
            called = self._called(equation)
            if called is None:
                new = tuple(self.value(variable.aval) for variable in equation.outvars)
                self.nodes.append(Node(equation, given, new))
                made: tuple[Atom, ...] = new
            else:
                made = self.inline(
                    compat.open_jaxpr(called), self._operands(called, given), equation
                )
            atoms.update(zip(equation.outvars, made, strict=True))
        return tuple(map(atom, jaxpr.outvars))

    def _operands(self, called: Any, given: Sequence[Atom]) -> dict[Any, Atom]:
        """Returns the atoms of the inputs and constants of a called jaxpr."""
        jaxpr = compat.open_jaxpr(called)
        atoms = dict(zip(jaxpr.invars, given, strict=True))
        for variable, array in zip(
            jaxpr.constvars, compat.constants(called), strict=True
        ):
            atoms[variable] = value = self.value(variable.aval)
            self.constants[value] = array
        return atoms

    def _called(self, equation: JaxprEqn) -> Any:
        """Returns the jaxpr that an equation calls; `None` if it must stay."""
        if equation.primitive.name in self._opaque:
            return None
        return compat.called_program(equation)
