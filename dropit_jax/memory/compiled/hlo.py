"""Reads the text of a compiled program."""

import dataclasses
import functools
import re

# XLA's names of types where they are not letter and number of bits.
_DTYPES = {"pred": "bool", "bf16": "bfloat16", "c64": "complex64", "c128": "complex128"}
_LETTERS = {"f": "float", "s": "int", "u": "uint"}

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,<= ]*)\]")
_OPCODE = re.compile(r"(?:^|\s)([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BODY = re.compile(r"(?:calls|body)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_EITHER_BRANCH = re.compile(r"(?:true|false)_computation=%?([\w.\-]+)")
_ELEMENT = re.compile(r"index=(\d+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_NUMBER = re.compile(r"\((\d+)\)")
_NAME = re.compile(r"%([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')

# How far to follow a value through loops and fusions; it may go in circles.
_HOPS = 16


@dataclasses.dataclass(frozen=True)
class Array:
    """The type of an array."""

    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of a computation.

    Attributes:
      name: unique in its program.
      opcode: such as "fusion" or "custom-call".
      results: its result, or the elements of the tuple that it is.
      operands: names of instructions of the same computation.
      attributes: the rest of the line, as it is; of a parameter, its number too.
      is_root: whether the computation returns its result.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def op_name(self) -> str:
        """The name that JAX gave to the operation; "" if none."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""

    @property
    def called(self) -> list[str]:
        """The computations that run with it."""
        return _CALLED.findall(self.attributes)

    @property
    def body(self) -> str:
        """The computation whose result is that of a loop or a fusion; "" if none."""
        found = _BODY.search(self.attributes)
        return found[1] if found else ""

    @property
    def element(self) -> int:
        """The index of the element that a get-tuple-element reads."""
        found = _ELEMENT.search(self.attributes)
        return int(found[1]) if found else 0

    @property
    def number(self) -> int:
        """The position of a parameter among its computation's."""
        found = _NUMBER.match(self.attributes)
        return int(found[1]) if found else 0

    @property
    def repeats(self) -> int:
        """The number of times that a loop runs what it calls; 1 if it is not known."""
        found = _TRIPS.search(self.attributes)
        return int(found[1]) if found and self.opcode == "while" else 1

    @property
    def branches(self) -> list[str]:
        """The computations of which one runs."""
        found = _BRANCHES.search(self.attributes)
        if found is None:
            return _EITHER_BRANCH.findall(self.attributes)
        return _NAME.findall(found[1])


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations of a program by their names, and the name of the first."""

    computations: dict[str, Computation]
    entry: str

    @functools.cached_property
    def homes(self) -> dict[str, Computation]:
        """The computation of each instruction, by the instruction's name."""
        computations = self.computations.values()
        return {name: each for each in computations for name in each}

    def origin(self, name: str, index: tuple[int, ...]) -> Instruction | None:
        """The instruction that computes a value, given the one that has it.

        That is another one where the value comes out of a loop, or of a fusion with
        several results.

        Args:
          name: of the instruction.
          index: which element of its result, () if that is no tuple.
        """
        found = None
        for _ in range(_HOPS):
            if name not in self.homes:
                break
            found = self.homes[name][name]
            further = self._inwards(found, index)
            if further is None:
                break
            name, index = further
        return found

    def _inwards(
        self, instruction: Instruction, index: tuple[int, ...]
    ) -> tuple[str, tuple[int, ...]] | None:
        if instruction.opcode == "get-tuple-element":
            return instruction.operands[0], (instruction.element,)
        inside = self.computations.get(instruction.body)
        if instruction.opcode == "parameter":  # of a loop: what the last step returned
            inside = self.homes[instruction.name]
        if not index or inside is None:
            return None
        root = next(each for each in inside.values() if each.is_root)
        return (root.operands[index[0]], ()) if root.opcode == "tuple" else None


def parse(text: str) -> Program:
    """Reads a program, in the form that `jax.stages.Compiled.as_text` has."""
    computations: dict[str, Computation] = {}
    entry, inside = "", ""
    for line in text.splitlines():
        instruction = _INSTRUCTION.match(line)
        if instruction and inside:
            parsed = _instruction(*instruction.groups())
            computations[inside][parsed.name] = parsed
        elif opening := _COMPUTATION.match(line):
            inside = opening[2]
            computations[inside] = {}
            entry = inside if opening[1] else entry
        elif line.startswith("}"):
            inside = ""
    return Program(computations, entry)


def array_types(text: str) -> tuple[Array, ...]:
    """The types of the arrays in a text: of an array, or of a tuple's elements."""
    return tuple(
        Array(_dtype(name), tuple(int(size) for size in re.findall(r"\d+", sizes)))
        for name, sizes in _ARRAY.findall(text)
    )


def _instruction(root: str | None, name: str, definition: str) -> Instruction:
    # A tuple's type stands in parentheses, and so do the operands.
    start = _closing(definition) + 1 if definition.startswith("(") else 0
    opcode = _OPCODE.search(definition, start)
    if opcode is None:
        raise ValueError(f"Not an instruction: {name} = {definition[:80]}")
    end = opcode.end() + _closing(definition[opcode.end() - 1 :])
    return Instruction(
        name=name,
        opcode=opcode[1],
        results=array_types(definition[: opcode.start()]),
        operands=tuple(_NAME.findall(definition[opcode.end() : end])),
        attributes=definition[opcode.end() - 1 if opcode[1] == "parameter" else end :],
        is_root=root is not None,
    )


def _closing(text: str) -> int:
    """Where the parenthesis closes that the text starts with."""
    depth = 0
    for parenthesis in re.finditer(r"[()]", text):
        depth += 1 if parenthesis[0] == "(" else -1
        if depth == 0:
            return parenthesis.start()
    return len(text)


def _dtype(name: str) -> str:
    """NumPy's name of a type, or XLA's where there is none."""
    if name in _DTYPES:
        return _DTYPES[name]
    letter, bits = name[0], name[1:]
    return _LETTERS[letter] + bits if letter in _LETTERS and bits.isdigit() else name
