"""Parses the text of a compiled program, which is in XLA's HLO."""

import dataclasses
import functools
import re

# NumPy's names of dtypes, by XLA's where these are not a letter and a number of bits.
_DTYPES = {"pred": "bool", "bf16": "bfloat16", "c64": "complex64", "c128": "complex128"}
_LETTERS = {"f": "float", "s": "int", "u": "uint"}

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY_TYPE = re.compile(r"(\w+)\[([\d,<= ]*)\]")
_OPCODE = re.compile(r"(?:^|\s)([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BODY = re.compile(r"(?:calls|body)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_EITHER_BRANCH = re.compile(r"(?:true|false)_computation=%?([\w.\-]+)")
_TUPLE_INDEX = re.compile(r"index=(\d+)")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_PARAMETER_NUMBER = re.compile(r"\((\d+)\)")
_NAME = re.compile(r"%([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')

# The most instructions that `Program.origin` follows: a value may circle in a loop.
_HOPS = 16


@dataclasses.dataclass(frozen=True)
class ArrayType:
    """The dtype and shape of an array."""

    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of a computation.

    Attributes:
      name: the name, unique in the program.
      opcode: the operation, such as "fusion" or "custom-call".
      results: the type of the result, or the types of the tuple's elements.
      operands: the names of instructions of the same computation.
      attributes: the text after the operands; for a parameter, its number in
        parentheses and the text after it.
      is_root: whether the result is the result of the computation.
    """

    name: str
    opcode: str
    results: tuple[ArrayType, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def op_name(self) -> str:
        """JAX's name of the operation, such as "jvp(Net)/dense/dot_general", or ""."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""

    @property
    def called(self) -> list[str]:
        """The names of the computations that an instruction runs, except `branches`."""
        return _CALLED.findall(self.attributes)

    @property
    def body(self) -> str:
        """The name of the computation of a fusion or of a loop's body, or ""."""
        found = _BODY.search(self.attributes)
        return found[1] if found else ""

    @property
    def element(self) -> int:
        """The index of the element that a get-tuple-element returns."""
        found = _TUPLE_INDEX.search(self.attributes)
        return int(found[1]) if found else 0

    @property
    def number(self) -> int:
        """The position of a parameter among the parameters of its computation."""
        found = _PARAMETER_NUMBER.match(self.attributes)
        return int(found[1]) if found else 0

    @property
    def repeats(self) -> int:
        """The number of steps of a loop; 1 if it is unknown, or there is no loop."""
        found = _TRIP_COUNT.search(self.attributes)
        return int(found[1]) if found and self.opcode == "while" else 1

    @property
    def branches(self) -> list[str]:
        """The names of the branches of a conditional."""
        found = _BRANCHES.search(self.attributes)
        if found is None:
            return _EITHER_BRANCH.findall(self.attributes)
        return _NAME.findall(found[1])


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
    """A program.

    Attributes:
      computations: the computations, by name.
      entry: the name of the computation that runs first.
    """

    computations: dict[str, Computation]
    entry: str

    @functools.cached_property
    def homes(self) -> dict[str, Computation]:
        """The computation that contains each instruction, by the instruction's name."""
        computations = self.computations.values()
        return {name: each for each in computations for name in each}

    def origin(self, name: str, index: tuple[int, ...]) -> Instruction | None:
        """Returns the instruction that computes the result of an instruction.

        The two differ if the result comes from a loop, a fusion with several results,
        or a get-tuple-element. `None`: the program has no instruction of the name.

        Args:
          name: the name of an instruction.
          index: the index in the tuple of its results; () if the result is no tuple.
        """
        found = None
        for _ in range(_HOPS):
            if name not in self.homes:
                break
            found = self.homes[name][name]
            further = self._step_inwards(found, index)
            if further is None:
                break
            name, index = further
        return found

    def _step_inwards(
        self, instruction: Instruction, index: tuple[int, ...]
    ) -> tuple[str, tuple[int, ...]] | None:
        """Returns the instruction and index that an element of a result comes from."""
        if instruction.opcode == "get-tuple-element":
            return instruction.operands[0], (instruction.element,)
        inside = self.computations.get(instruction.body)
        if instruction.opcode == "parameter":  # of a loop: the last step's result
            inside = self.homes[instruction.name]
        if not index or inside is None:
            return None
        root = next(each for each in inside.values() if each.is_root)
        return (root.operands[index[0]], ()) if root.opcode == "tuple" else None


def parse(text: str) -> Program:
    """Returns the program of a text that `jax.stages.Compiled.as_text` returned."""
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


def array_types(text: str) -> tuple[ArrayType, ...]:
    """Returns the types of the arrays in a text: "(f32[2,3], s8[4])" has two."""
    return tuple(
        ArrayType(_dtype(name), tuple(int(size) for size in re.findall(r"\d+", sizes)))
        for name, sizes in _ARRAY_TYPE.findall(text)
    )


def _instruction(root: str | None, name: str, definition: str) -> Instruction:
    # The type of a tuple is in parentheses, as the operands are.
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
    """Returns where the first parenthesis is closed: "f(a(b))c" -> 6.

    Returns the length of the text if the parenthesis is not closed.
    """
    depth = 0
    for parenthesis in re.finditer(r"[()]", text):
        depth += 1 if parenthesis[0] == "(" else -1
        if depth == 0:
            return parenthesis.start()
    return len(text)


def _dtype(name: str) -> str:
    """Returns NumPy's name of a dtype, or else XLA's: "f32" -> "float32"."""
    if name in _DTYPES:
        return _DTYPES[name]
    letter, bits = name[0], name[1:]
    return _LETTERS[letter] + bits if letter in _LETTERS and bits.isdigit() else name
