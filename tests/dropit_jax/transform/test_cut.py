"""The cut against a brute-force search over all that could be stored."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from dropit_jax.transform.planning import cut
from dropit_jax.transform.planning.classify import Classes, Kind
from dropit_jax.transform.tracing import program as programs

_SCALES = (1.0, 3.0 * 2**30)  # the second beyond 32 bits


def _program(seed, size=5):
    """A random program of sums, and what of it is read."""
    rng = np.random.default_rng(seed)
    places = [rng.integers(0, i + 1, 2) for i in range(size)]

    def function(x):
        made = [x]
        for first, second in places:
            made.append(made[first] + jnp.sin(made[second]))
        return made[-3:]

    program = programs.flatten(jax.make_jaxpr(function)(jnp.ones(3)))
    needed = frozenset(programs.values(program.outputs))
    kinds = [Kind.FLOWING] * len(program.avals)
    for value in program.inputs:
        kinds[value] = Kind.FREE
    needed -= set(program.inputs)
    return program, Classes(kinds, frozenset(), needed)


def _price(program, classes, stored, storing, rebuilding):
    """What it costs to store these values and to compute the rest again."""
    makers, total, seen = program.makers(), 0.0, set()
    todo = list(classes.needed)
    while todo:
        value = todo.pop()
        if value in seen or classes.kinds[value] is Kind.FREE:
            continue
        seen.add(value)
        if value in stored:
            total += storing[value]
            continue
        node = makers[value]
        total += rebuilding[node]
        todo.extend(node.operands)
    return total


class CutTest(parameterized.TestCase):
    @parameterized.product(seed=tuple(range(10)), scale=_SCALES)
    def test_no_choice_is_cheaper(self, seed, scale):
        program, classes = _program(seed)
        rng = np.random.default_rng(seed)
        storing = {
            value: scale * rng.integers(1, 20) for value in range(len(program.avals))
        }
        rebuilding = {
            node: math.inf if rng.random() < 0.2 else scale * rng.integers(0, 8)
            for node in program.nodes
        }
        stored = cut.stored_values(
            program, classes, storing.__getitem__, rebuilding.__getitem__
        )
        made = [value for node in program.nodes for value in node.outputs]
        best = min(
            _price(program, classes, set(chosen), storing, rebuilding)
            for count in range(len(made) + 1)
            for chosen in itertools.combinations(made, count)
        )
        found = _price(program, classes, stored, storing, rebuilding)
        self.assertAlmostEqual(found / best, 1, places=6)

    def test_nothing_is_needed(self):
        program, classes = _program(0)
        nothing = Classes(classes.kinds, frozenset(), frozenset())
        self.assertEmpty(cut.stored_values(program, nothing, lambda _: 1, lambda _: 1))


if __name__ == "__main__":
    absltest.main()
