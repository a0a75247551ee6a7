"""On meshes of eight devices: collectives and gradients are the plain function's.

In float64, where sums in another order round to the same codes.
"""

import collections
import contextlib
import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dropit_jax.transform.drop import drop
from dropit_jax.transform.forms.storage import Bits, Codes
from tests.dropit_jax.transform.comparing import error
from tests.dropit_jax.transform.sharded_programs import (
    AUTO,
    EXPLICIT,
    ONE_DEVICE,
    PLACEMENTS,
    PROGRAMS,
)

_COLLECTIVE = re.compile(
    r"^ *(?:ROOT )?%\S+ = (.*?) "
    r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(",
    re.MULTILINE,
)
_ARRAY = re.compile(r"\w+\[[\d,]*\]")


def _collectives(compiled):
    """How often a compiled program has each collective of each types of arrays."""
    found = _COLLECTIVE.findall(compiled.as_text())
    return collections.Counter(
        (kind, tuple(sorted(_ARRAY.findall(types)))) for types, kind in found
    )


def _on_mesh(function, program, place):
    """The collectives of the gradient, and its values."""
    mesh = place.mesh
    shardings = program.shardings(place, mesh)
    params = jax.device_put(program.params, shardings)
    x = jax.device_put(program.x, NamedSharding(mesh, P(place.batch)))
    gradient = jax.jit(jax.grad(function), out_shardings=shardings)
    is_set = place.axis_type is EXPLICIT
    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
        compiled = gradient.lower(params, x).compile()
        return _collectives(compiled), jax.device_get(compiled(params, x))


@functools.cache
def _on_one_device(name, preset):
    """The gradient; of the plain function where the preset loses nothing."""
    program = PROGRAMS[name]
    function = functools.partial(program.function, ONE_DEVICE)
    if preset != "exact":
        function = drop(function, preset)
    return jax.device_get(jax.jit(jax.grad(function))(program.params, program.x))


# Every program and every mesh with both types of axes, and each type with "exact".
_CASES = (
    ("mlp", "fsdp", AUTO, "exact", "lean"),
    ("mlp", "data", EXPLICIT, "lean"),
    ("convs", "data", AUTO, "lean"),
    ("convs", "data_tensor", EXPLICIT, "lean"),
    ("transformer", "data_tensor", AUTO, "lean"),
    ("transformer", "tensor", EXPLICIT, "lean"),
    ("scanned", "tensor", AUTO, "lean"),
    ("scanned", "fsdp", EXPLICIT, "exact", "lean"),
)


class ProgramTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.enterContext(jax.enable_x64(True))

    @parameterized.named_parameters(
        (
            "_".join((name, mesh, axis_type.name.lower())),
            name,
            mesh,
            axis_type,
            *presets,
        )
        for name, mesh, axis_type, *presets in _CASES
    )
    def test_moves_what_the_plain_function_does(self, name, mesh, axis_type, *presets):
        program = PROGRAMS[name]
        place = dataclasses.replace(PLACEMENTS[mesh], axis_type=axis_type)
        function = functools.partial(program.function, place)
        plain, _ = _on_mesh(function, program, place)
        self.assertNotEmpty(plain)
        for preset in presets:
            collectives, gradients = _on_mesh(drop(function, preset), program, place)
            self.assertEqual(collectives, plain, preset)
            if preset == "lean" and place.gathers:
                # Weights that the function gathers are values like any other, of which
                # one device has none: they are stored in few bits, too.
                self.assertLess(error(gradients, _on_one_device(name, "exact")), 0.02)
                continue
            alone = _on_one_device(name, preset)
            chex.assert_trees_all_close(gradients, alone, rtol=1e-6, atol=1e-9)


def _layer(x, column, row):
    """A layer of the MLP, on a device that has some of the features."""
    x = x + lax.psum(jax.nn.gelu(x @ column) @ row, "model")
    # The variance chooses by a boolean, which `shard_map` has one of for every device.
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)


def _layers(layer, params, x):
    for _ in range(2):
        x = layer(x, params["column"], params["row"])
    return jnp.mean(jnp.sin(x))


class ShardMapTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.enterContext(jax.enable_x64(True))

    def _assert_like_plain(self, axis_type, make, *presets):
        """Holds gradients against the plain ones.

        Args:
          axis_type: of the mesh.
          make: makes a function of a preset, given `jax.shard_map` for a layer.
          *presets: the presets.
        """
        program = PROGRAMS["mlp"]
        place = dataclasses.replace(PLACEMENTS["data_tensor"], axis_type=axis_type)
        specs = (P("data"), P(None, "model"), P("model"))
        shared_out = functools.partial(
            jax.shard_map, mesh=place.mesh, in_specs=specs, out_specs=specs[0]
        )
        plain = functools.partial(_layers, shared_out(_layer))
        expected, _ = _on_mesh(plain, program, place)
        self.assertNotEmpty(expected)
        for preset in presets:
            function = make(shared_out, preset)
            collectives, gradients = _on_mesh(function, program, place)
            self.assertEqual(collectives, expected, preset)
            tolerance = 1e-9 if preset == "exact" else 0.02
            exact = _on_one_device("mlp", "exact")
            self.assertLess(error(gradients, exact), tolerance)

    def test_in_a_dropped_function(self):
        def make(shared_out, preset):
            return drop(functools.partial(_layers, shared_out(_layer)), preset)

        self._assert_like_plain(EXPLICIT, make, "exact")

    def test_around_a_dropped_function(self):
        def make(shared_out, preset):
            return functools.partial(_layers, shared_out(drop(_layer, preset)))

        self._assert_like_plain(AUTO, make, "exact", "lean")


class FormsTest(parameterized.TestCase):
    """Shards of Explicit axes that hold no whole groups, or no whole bytes."""

    def test_values_and_shardings_are_kept(self):
        forms = (Bits(), Codes(4))
        mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(EXPLICIT,) * 2)
        specs = (P("data", "model"), P("data", "model"), P("data", None))
        rng = np.random.default_rng(0)
        arrays = [
            jnp.asarray(rng.normal(size=(8, features)), jnp.float32)
            for features in (136, 8, 136)
        ]
        sharded = [
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in zip(arrays, specs, strict=True)
        ]

        def roundtrip(arrays):
            found = []
            for x in arrays:
                for form in forms:
                    value = x > 0 if isinstance(form, Bits) else x
                    stored = form.encode(value)
                    held = sum(leaf.nbytes for leaf in jax.tree.leaves(stored))
                    self.assertEqual(form.nbytes(jax.typeof(value)), held)
                    rebuilt = form.decode(stored, jax.typeof(value))
                    self.assertEqual(jax.typeof(rebuilt), jax.typeof(value))
                    found.append(rebuilt)
            return found

        expected = jax.jit(roundtrip)(arrays)
        with jax.set_mesh(mesh):
            compiled = jax.jit(roundtrip).lower(sharded).compile()
            found = compiled(sharded)
        chex.assert_trees_all_equal(jax.device_get(found), jax.device_get(expected))
        # The extremes of groups that devices share meet, of each of two arrays.
        kinds = [kind for kind, _ in _collectives(compiled).elements()]
        self.assertEqual(kinds, ["all-gather"] * 2)


if __name__ == "__main__":
    absltest.main()
