"""Private and experimental names of JAX and Flax exist, and are used in one file."""

import ast
import collections
import functools
import importlib
import importlib.util
import logging
import re
import sys
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import nnx
from jax import lax
from jax.experimental import io_callback

import dropit_jax
from dropit_jax import DropIT, compat

_PACKAGE = Path(dropit_jax.__file__).parent
_COMPAT = Path(compat.__file__)

_NOT_PUBLIC = re.compile(
    r"(jax|flax)\.(_src|experimental|extend|interpreters)\b|jaxlib\.|flax\.core\.scope"
)
# Attributes of objects of JAX and Flax that no interface promises.
_ATTRIBUTES = frozenset(
    {"axis_context", "module_context", "orig_method", "rng_counters"}
)


def _imported():
    """The names that `compat` imports from JAX, with their modules."""
    for node in ast.walk(ast.parse(_COMPAT.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("jax"):
            for alias in node.names:
                yield node.module, alias.name


def _reaches(path):
    """Where a file reaches past a public interface: the lines, and the names."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            if node.attr in _ATTRIBUTES or _is_private(node):
                yield node.lineno, node.attr
            names = [ast.unparse(node)]
        for name in names:
            if _NOT_PUBLIC.match(name):
                yield node.lineno, name


def _is_private(node):
    """Whether an attribute is private, and of something of another's."""
    if not node.attr.startswith("_") or node.attr.startswith("__"):
        return False
    owner = ast.unparse(node.value)
    return owner.split(".")[0] in ("jax", "flax", "nn", "nnx", "lax", "jnp")


def _looking(name, look):
    """A primitive, and a list of what is seen of the contexts that it is lowered in."""
    seen = []
    primitive = compat.Primitive(name)
    primitive.def_abstract_eval(lambda x: x)

    def lower(context, x):
        seen.append(look(context))
        return [x]

    compat.mlir.register_lowering(primitive, lower)
    return primitive, seen


class OneFileTest(parameterized.TestCase):
    def test_no_other_file_reaches_past_public_interfaces(self):
        found = [
            f"{path.relative_to(_PACKAGE)}:{line} {name}"
            for path in sorted(_PACKAGE.rglob("*.py"))
            if path != _COMPAT
            for line, name in _reaches(path)
        ]
        self.assertEmpty(found, "These belong into dropit_jax/compat.py.")

    def test_such_files_are_found(self):
        path = Path(self.enterContext(tempfile.TemporaryDirectory()), "file.py")
        path.write_text(
            "import jax\n"
            "from jax.experimental import topologies\n"
            "from jax.interpreters import mlir\n"
            "jax._src.core\n"
            "context.module_context\n"
            "self._own\n"
        )
        lines = {line for line, _ in _reaches(path)}
        self.assertEqual(lines, {2, 3, 4, 5})


@jax.custom_vjp
def _with_a_rule(x):
    return x


_with_a_rule.defvjp(lambda x: (x, None), lambda _, cotangent: (cotangent,))

# The names of primitives, and functions of three numbers that have them.
_PRIMITIVES = {
    compat.CUSTOM_VJP: _with_a_rule,
    compat.NAME: lambda x: jax.ad_checkpoint.checkpoint_name(x, "x"),
    compat.REDUCE_PRECISION: lambda x: lax.reduce_precision(x, 8, 7),
    compat.SCAN: lambda x: lax.scan(lambda c, x: (c + x, c), 0.0, x),
    "broadcast_in_dim": lambda x: lax.broadcast(x, (2,)),
    "convert_element_type": lambda x: x.astype(jnp.bfloat16),
    "copy": jnp.copy,
    "optimization_barrier": lax.optimization_barrier,
    "reshape": lambda x: lax.reshape(x, (3, 1)),
    "sharding_constraint": lambda x: lax.with_sharding_constraint(
        x, jax.sharding.SingleDeviceSharding(jax.devices()[0])
    ),
    "squeeze": lambda x: lax.squeeze(x[:1], (0,)),
    "stop_gradient": lax.stop_gradient,
}


class ThereTest(parameterized.TestCase):
    """One test for each entry: what fails says what is gone."""

    @parameterized.parameters(*_imported())
    def test_names_of_jax(self, module, name):
        self.assertTrue(
            hasattr(importlib.import_module(module), name)
            or importlib.util.find_spec(f"{module}.{name}"),
            f"{module}.{name} is gone from JAX {jax.__version__}: see "
            "dropit_jax/compat.py for what it was for.",
        )

    @parameterized.parameters(*compat._LAZY.items())
    def test_modules_of_jax(self, name, module):
        self.assertIsNotNone(
            importlib.util.find_spec(module),
            f"{module} is gone from JAX {jax.__version__}.",
        )
        self.assertEqual(getattr(compat, name).__name__, module)
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            compat.nothing  # noqa: B018

    @parameterized.parameters(jax.jit(jnp.sin), jax.nn.relu, _with_a_rule)
    def test_called_program(self, function):
        (equation,) = compat.open_jaxpr(jax.make_jaxpr(function)(jnp.ones(3))).eqns
        called = compat.called_program(equation)
        self.assertIsNotNone(called, f"JAX {jax.__version__} calls in another way.")
        self.assertLen(compat.open_jaxpr(called).invars, 1)

    def test_what_is_no_call_calls_nothing(self):
        (equation,) = compat.open_jaxpr(jax.make_jaxpr(lax.sin)(1.0)).eqns
        self.assertIsNone(compat.called_program(equation))

    def test_a_call_that_lays_down_shardings_does_more(self):
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        function = jax.jit(jnp.sin, in_shardings=sharding)
        (equation,) = compat.open_jaxpr(jax.make_jaxpr(function)(jnp.ones(3))).eqns
        self.assertIsNone(compat.called_program(equation))

    def test_constants(self):
        array = np.arange(3.0)
        traced = jax.make_jaxpr(lambda x: x + array)(jnp.ones(3))
        count = len(compat.open_jaxpr(traced).constvars)
        self.assertLen(compat.constants(traced), count)

    def test_an_equation_is_bound_under_its_scopes(self):
        @jax.jit
        def inner(x):
            with jax.named_scope("inside"):
                return jnp.sin(x)

        def outer(x):
            with jax.named_scope("outside"):
                return inner(x)

        (call,) = compat.open_jaxpr(jax.make_jaxpr(outer)(jnp.ones(3))).eqns
        (sine,) = compat.open_jaxpr(compat.called_program(call)).eqns
        sine = compat.in_scope(call, sine)
        traced = jax.make_jaxpr(lambda x: compat.bind_equation(sine, [x]))(jnp.ones(3))
        (equation,) = compat.open_jaxpr(traced).eqns
        self.assertEqual(equation.primitive.name, "sin")
        self.assertEqual(str(equation.source_info.name_stack), "outside/inside")

    def test_names_of_primitives(self):
        for name, function in _PRIMITIVES.items():
            equations = compat.open_jaxpr(jax.make_jaxpr(function)(jnp.ones(3))).eqns
            names = [equation.primitive.name for equation in equations]
            self.assertIn(name, names, f"JAX {jax.__version__} has another name.")
        known = {compat.CUSTOM_VJP, compat.SCAN, *compat.COPIES}
        self.assertEqual(set(_PRIMITIVES), known)

    @parameterized.product(constants=[0, 2], carried=[0, 1, 3])
    def test_counts_of_a_scan(self, constants, carried):
        def loop(held, carry, xs):
            def body(carry, x):
                return [each * (x + sum(held)) for each in carry], sum(held) + x

            return jax.lax.scan(body, carry, xs)

        args = constants * [2.0], carried * [1.0], jnp.ones(3)
        equations = compat.open_jaxpr(jax.make_jaxpr(loop)(*args)).eqns
        (scan,) = [each for each in equations if each.primitive.name == "scan"]
        self.assertEqual(compat.scan_counts(scan), (constants, carried))

    @parameterized.parameters(False, True)
    def test_a_checkpointed_function(self, remat3):
        policy = jax.checkpoint_policies.dots_saveable

        def function(x):
            return jax.checkpoint(jnp.sin, policy=policy)(x)

        jax.config.update("jax_remat3", remat3)
        self.addCleanup(jax.config.update, "jax_remat3", False)
        (equation,) = compat.open_jaxpr(jax.make_jaxpr(function)(1.0)).eqns
        jaxpr, found, prevent_cse = compat.remat(equation)
        names = [each.primitive.name for each in compat.open_jaxpr(jaxpr).eqns]
        self.assertEqual(names, ["sin"])
        self.assertIs(found, policy)
        self.assertTrue(prevent_cse)

    def test_what_is_not_checkpointed_has_no_policy(self):
        (equation,) = compat.open_jaxpr(jax.make_jaxpr(lax.sin)(1.0)).eqns
        self.assertIsNone(compat.remat(equation))

    def test_arguments_of_a_shard_map(self):
        mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        spec = jax.sharding.PartitionSpec("x")
        given = {"in_specs": (spec,), "out_specs": (spec,), "axis_names": {"x"}}
        function = jax.shard_map(
            lambda x: (jnp.sin(x),), mesh=mesh, check_vma=True, **given
        )
        equations = compat.open_jaxpr(jax.make_jaxpr(function)(jnp.ones(4))).eqns
        (equation,) = [e for e in equations if e.primitive.name == "shard_map"]
        found = compat.shard_map_arguments(equation)
        self.assertEqual({name: found[name] for name in given}, given)
        self.assertEqual(found["mesh"].shape, mesh.shape)

    def test_references(self):
        def function(x):
            reference = jax.new_ref(x)
            return reference[...]

        equations = compat.open_jaxpr(jax.make_jaxpr(function)(1.0)).eqns
        made, read = equations[0].outvars[0], equations[-1].outvars[0]
        self.assertTrue(compat.is_reference(made.aval))
        self.assertFalse(compat.is_reference(read.aval))

    def test_scopes_and_lines(self):
        seen = []

        def function(x):
            with jax.named_scope("inside"):
                seen.append(compat.current_scope())
                return jnp.sin(x)

        (equation,) = compat.open_jaxpr(jax.make_jaxpr(function)(1.0)).eqns
        self.assertEqual(seen, ["inside"])
        line = compat.source_line(equation)
        self.assertRegex(line, r"^test_compat\.py:\d+ .*function")

    def test_a_source_line_of_a_path_with_spaces(self):
        scope = {}
        text = "def loss(x):\n    return x + 1"
        exec(compile(text, "my models (old)/model.py", "exec"), scope)
        (equation,) = compat.open_jaxpr(jax.make_jaxpr(scope["loss"])(1.0)).eqns
        self.assertEqual(compat.source_line(equation), "model.py:2 (loss)")

    def test_symbolic_sizes_are_numbers(self):
        (first, second) = jax.export.symbolic_shape("b, 2*b+1")
        self.assertEqual(compat.concrete(second), 2 * compat.concrete(first) + 1)
        self.assertEqual(compat.concrete(7), 7)

    def test_exports_are_told_from_other_lowerings(self):
        primitive, seen = _looking("exported_in_tests", compat.is_export)
        x = jax.ShapeDtypeStruct((4,), jnp.float32)
        jax.jit(primitive.bind).lower(x)
        jax.export.export(jax.jit(primitive.bind))(x)
        self.assertEqual(seen, [False, True])

    def test_flaxs_wrapper_of_a_method_can_be_left_out(self):
        def wrapped(method):
            @functools.wraps(method)
            def call(self, x):
                return method(self, x)

            return call

        dense = nn.Dense(3).__call__
        found = compat.without_flax_wrapper(dense)
        self.assertIs(found.func, dense.__func__.__wrapped__, "wrappers have changed")
        with mock.patch.object(nn.Dense, "__call__", wrapped(nn.Dense.__call__)):
            patched = nn.Dense(3).__call__
            self.assertEqual(compat.without_flax_wrapper(patched), patched)

    def test_rules_of_a_module_share_an_object(self):
        look = functools.partial(compat.of_module, kind=collections.Counter)
        primitive, seen = _looking("sharing_in_tests", look)
        x = jax.ShapeDtypeStruct((4,), jnp.float32)
        for _ in range(2):
            function = jax.jit(lambda x: primitive.bind(primitive.bind(x)[:2]))
            function.lower(x)
        first, again, other, _ = seen
        self.assertIs(first, again)
        self.assertIsNot(first, other)

    @parameterized.parameters(
        lambda x: jax.debug.print("{}", x),
        lambda x: jax.debug.callback(lambda _: None, x),
        lambda x: jax.pure_callback(lambda x: x, x, x),
        lambda x: io_callback(lambda _: None, None, x),
    )
    def test_calls_of_the_host_have_these_names(self, function):
        (equation,) = compat.open_jaxpr(jax.make_jaxpr(function)(1.0)).eqns
        self.assertIn(equation.primitive.name, compat.HOST_CALLS)

    def test_modules_of_nnx_are_told_from_arrays(self):
        layer = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        found = compat.flax_modules({"x": jnp.ones(2), "layer": layer})
        self.assertIsNone(found["x"])
        self.assertIs(found["layer"], layer)

    @parameterized.parameters(1, 2)
    def test_number_of_devices(self, count):
        primitive, seen = _looking("seen_in_tests", compat.num_devices)
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:count]), "x")
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        x = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=sharding)
        jax.jit(primitive.bind).lower(x)
        self.assertEqual(seen, [count])

    def test_flax_tells_the_function_of_a_method(self):
        seen = []

        def interceptor(method, args, kwargs, context):
            seen.append(compat.flax_function(context))
            return method(*args, **kwargs)

        with nn.intercept_methods(interceptor):
            nn.Dense(2).init(jax.random.key(0), jnp.ones((1, 3)))
        self.assertIn(nn.Dense.__call__.__wrapped__, seen, f"Flax {flax.__version__}")


def _lowered_for_a_gpu(size):
    """A compression and a decompression, of a size that nothing else has."""

    def round_trip(x):
        return dropit_jax.compress(x, DropIT(0.5)).decompress()

    x = jax.ShapeDtypeStruct((3, 7, size), jnp.float32)
    return jax.jit(round_trip).trace(x).lower(lowering_platforms=("cuda",)).as_text()


class TritonTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        compat.has_triton.cache_clear()
        self.addCleanup(compat.has_triton.cache_clear)

    def test_without_it_the_twin_runs_and_that_is_said_once(self):
        with (
            mock.patch.dict(sys.modules, {compat._LAZY["triton"]: None}),
            self.assertLogs("dropit_jax", logging.WARNING) as logs,
        ):
            texts = [_lowered_for_a_gpu(size) for size in (32, 48)]
        self.assertNotIn("triton", "".join(texts))
        self.assertLen(logs.output, 1)
        self.assertIn("no Triton backend", logs.output[0])

    def test_with_it_the_kernel_runs(self):
        self.assertIn("__gpu$xla.gpu.triton", _lowered_for_a_gpu(64))

    def test_its_deprecation_reaches_no_user(self):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            compat.hush_triton()
            warnings.warn(
                "The Pallas Triton backend is deprecated and will be removed",
                DeprecationWarning,
                stacklevel=1,
            )
            warnings.warn("something else", DeprecationWarning, stacklevel=1)
        self.assertEqual([str(each.message) for each in caught], ["something else"])


if __name__ == "__main__":
    absltest.main()
