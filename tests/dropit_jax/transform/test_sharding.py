"""On meshes of eight devices: collectives and gradients are the plain function's.

In float64, where sums in another order round to the same codes.
"""

import collections
import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dropit_jax.transform.drop import drop
from dropit_jax.transform.forms.storage import Bits, Codes

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit

_COLLECTIVE = re.compile(
    r"^ *(?:ROOT )?%\S+ = (.*?) "
    r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(",
    re.MULTILINE,
)
_ARRAY = re.compile(r"\w+\[[\d,]*\]")

_RNG = np.random.default_rng(0)


@dataclasses.dataclass(frozen=True)
class Placement:
    """How the arrays of a program are sharded; by default not at all.

    Attributes:
      axes: of the mesh, with their sizes.
      batch: the one that the batch is sharded over.
      features: the one that heads and hidden features are sharded over.
      weights: the one that weights are sharded over where they are not in use.
      axis_type: of all axes.
    """

    axes: tuple[tuple[str, int], ...] = ()
    batch: str | None = None
    features: str | None = None
    weights: str | None = None
    axis_type: AxisType = AUTO

    @property
    def mesh(self) -> jax.sharding.Mesh:
        names, sizes = zip(*self.axes, strict=True)
        return jax.make_mesh(sizes, names, axis_types=(self.axis_type,) * len(names))

    def out(self, ndim: int, features: int | None = None) -> dict[str, P]:
        """The argument that JAX asks for where a product has a sum over devices."""
        if self.axis_type is AUTO:
            return {}
        spec = [self.batch, *[None] * (ndim - 1)]
        if features is not None:
            spec[features] = self.features
        return {"out_sharding": P(*spec)}

    @property
    def gathers(self) -> bool:
        """Whether the program itself gathers weights, as Explicit mode asks for."""
        return self.axis_type is EXPLICIT and self.weights is not None

    def gathered(self, params: Any) -> Any:
        """Weights that are in use."""
        if not self.gathers:
            return params
        return jax.tree.map(lambda p: jax.sharding.reshard(p, P()), params)


_ONE_DEVICE = Placement()
_PLACEMENTS = {
    "data": Placement((("data", 8),), batch="data"),
    "fsdp": Placement((("data", 8),), batch="data", weights="data"),
    "tensor": Placement((("model", 8),), features="model"),
    "data_tensor": Placement(
        (("data", 4), ("model", 2)), batch="data", features="model"
    ),
}


# Sizes are such that
# - on no mesh two devices share a group of 64 features: their minimum and maximum
#   would meet in two all-reduces of one number a group (`FormsTest` has such groups);
# - the batch is large, so that of weights and activations XLA gathers the weights:
#   activations that are rebuilt would be gathered once more;
# - vectors are not sharded, as each equation that reads one, be it to rebuild a value,
#   gathers it.
def _weight(*shape):
    fan_in = np.prod(shape[:-1])
    return _RNG.normal(size=shape) / np.sqrt(fan_in)


def _normalized(x):
    return x * lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def _mlp(place, params, x):
    params = place.gathered(params)
    for _ in range(2):
        hidden = jax.nn.gelu(x @ params["column"])
        x = x + jnp.einsum("bf,fd->bd", hidden, params["row"], **place.out(2))
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return jnp.mean(jnp.sin(x))


def _batch_norm(x, scale):
    """With statistics of the whole batch."""
    mean = x.mean((0, 1, 2))
    variance = jnp.mean(x**2, axis=(0, 1, 2)) - mean**2
    return (x - mean) * lax.rsqrt(variance + 1e-5) * scale


def _convs(place, params, x):
    params = place.gathered(params)
    conv = functools.partial(
        lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    y = conv(x, params["column"], **place.out(4, features=3))
    y = jax.nn.relu(_batch_norm(y, params["scale"]))
    x = x + conv(y, params["row"], **place.out(4))
    return jnp.mean(jnp.sin(jax.nn.relu(x).mean((1, 2))))


def _block(place, params, x):
    params = place.gathered(params)
    y = _normalized(x)
    q, k, v = (
        jnp.einsum("btd,dhk->bthk", y, params[name], **place.out(4, features=2))
        for name in "qkv"
    )
    scores = jnp.einsum("bqhk,bthk->bhqt", q, k) / np.sqrt(q.shape[-1])
    causal = np.tril(np.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e9))
    y = jnp.einsum("bhqt,bthk->bqhk", weights, v)
    x = x + jnp.einsum("bqhk,hkd->bqd", y, params["out"], **place.out(3))
    y = jax.nn.silu(_normalized(x) @ params["column"])
    return x + jnp.einsum("btf,fd->btd", y, params["row"], **place.out(3))


def _transformer(place, params, x):
    return jnp.mean(jnp.sin(_block(place, params, x)))


def _scanned(place, params, x):
    def turn(x, params):
        params = place.gathered(params)
        y = jnp.tanh(_normalized(x) @ params["column"])
        return x + jnp.einsum("bf,fd->bd", y, params["row"], **place.out(2)), None

    return jnp.mean(jnp.sin(lax.scan(turn, x, params)[0]))


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A function of parameters and a batch.

    Attributes:
      function: of a placement, the parameters and the batch.
      params: by name.
      sharded: of each parameter, the axis that may be sharded, of features or weights.
      x: the batch.
    """

    function: Callable[..., Any]
    params: dict[str, np.ndarray]
    sharded: dict[str, int]
    x: np.ndarray

    def shardings(self, place: Placement, mesh: jax.sharding.Mesh) -> dict[str, Any]:
        name = place.features or place.weights

        def sharding(key):
            axes = range(self.params[key].ndim)
            spec = [name if axis == self.sharded.get(key) else None for axis in axes]
            return NamedSharding(mesh, P(*spec))

        return {key: sharding(key) for key in self.params}


_PROGRAMS = {
    "mlp": Program(
        _mlp,
        {"column": _weight(64, 512), "row": _weight(512, 64)},
        {"column": 1, "row": 0},
        _RNG.normal(size=(1024, 64)),
    ),
    "convs": Program(
        _convs,
        {
            "column": _weight(3, 3, 16, 128),
            "row": _weight(3, 3, 128, 16),
            "scale": 1 + _weight(128),
        },
        {"column": 3, "row": 2},
        _RNG.normal(size=(32, 4, 4, 16)),
    ),
    "transformer": Program(
        _transformer,
        {
            **{name: _weight(32, 8, 8) for name in "qkv"},
            "out": _weight(8, 8, 32),
            "column": _weight(32, 512),
            "row": _weight(512, 32),
        },
        {"q": 1, "k": 1, "v": 1, "out": 0, "column": 1, "row": 0},
        _RNG.normal(size=(32, 16, 32)),
    ),
    "scanned": Program(
        _scanned,
        {"column": _weight(3, 64, 512), "row": _weight(3, 512, 64)},
        {"column": 2, "row": 1},
        _RNG.normal(size=(1024, 64)),
    ),
}


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
    program = _PROGRAMS[name]
    function = functools.partial(program.function, _ONE_DEVICE)
    if preset != "exact":
        function = drop(function, preset)
    return jax.device_get(jax.jit(jax.grad(function))(program.params, program.x))


def _error(gradients, exact):
    """Of all gradients as one vector, relative to the exact ones."""
    flat = (np.concatenate([*map(np.ravel, g.values())]) for g in (gradients, exact))
    found, expected = flat
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


# Every program and every mesh with both types of axes.
_CASES = (
    ("mlp", "fsdp", AUTO, "exact", "lean"),
    ("mlp", "data", EXPLICIT, "lean"),
    ("convs", "data", AUTO, "exact", "lean"),
    ("convs", "data_tensor", EXPLICIT, "lean"),
    ("transformer", "data_tensor", AUTO, "exact", "lean"),
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
        program = _PROGRAMS[name]
        place = dataclasses.replace(_PLACEMENTS[mesh], axis_type=axis_type)
        function = functools.partial(program.function, place)
        plain, _ = _on_mesh(function, program, place)
        self.assertNotEmpty(plain)
        for preset in presets:
            collectives, gradients = _on_mesh(drop(function, preset), program, place)
            self.assertEqual(collectives, plain, preset)
            if preset == "lean" and place.gathers:
                # Weights that the function gathers are values like any other, of which
                # one device has none: they are stored in few bits, too.
                self.assertLess(_error(gradients, _on_one_device(name, "exact")), 0.02)
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
        program = _PROGRAMS["mlp"]
        place = dataclasses.replace(_PLACEMENTS["data_tensor"], axis_type=axis_type)
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
            error = _error(gradients, _on_one_device("mlp", "exact"))
            self.assertLess(error, tolerance)

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
        arrays = [
            jnp.asarray(_RNG.normal(size=(8, features)), jnp.float32)
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
