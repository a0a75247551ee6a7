"""Under JAX's switches: where the plain function passes, the dropped one does too."""

import functools
import tempfile
import unittest

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.compilation_cache import compilation_cache

from dropit_jax import drop, plan
from tests.dropit_jax.transform.comparing import error
from tests.dropit_jax.transform.features.rules import Cube

# Written so that the plain functions pass under each switch: no operands of different
# ranks, and none of different dtypes.
_RNG = np.random.default_rng(0)
_PARAMS = {
    "w": _RNG.normal(size=(2, 16, 16)) / 4,
    "b": _RNG.normal(size=(2, 1, 16)) / 4,
}
_X = _RNG.normal(size=(8, 16))


def _layer(x, p):
    return jnp.tanh(x @ p["w"] + p["b"])


def _of_layer(params, i):
    return {name: value[i] for name, value in params.items()}


def _attention(params, x):
    query, value = (x @ params["w"][i] for i in range(2))
    causal = jnp.tril(jnp.ones((8, 8), bool))
    scores = jnp.where(causal, query @ query.T, -jnp.inf)
    return jnp.sum((jax.nn.softmax(scores) @ value) ** 2)


def _scan(params, x):
    y, _ = lax.scan(lambda x, p: (_layer(x, p), None), x, params)
    return jnp.sum(y**2)


def _checkpointed(params, x):
    for i in range(2):
        x = jax.checkpoint(_layer)(x, _of_layer(params, i))
    return jnp.sum(x**2)


def _convolved(params, x):
    kernel = params["w"].reshape(-1)[: 9 * 4 * 4].reshape(3, 3, 4, 4)
    y = lax.conv_general_dilated(
        jnp.tanh(x.reshape(2, 4, 4, 4)),
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    mean, var = (f(y, (0, 1, 2), keepdims=True) for f in (jnp.mean, jnp.var))
    return jnp.sum(((y - mean) * lax.rsqrt(var + 1e-5)) ** 3)


_FUNCTIONS = {
    function.__name__[1:]: function
    for function in (_attention, _scan, _checkpointed, _convolved)
}
_SWITCHES = {
    "jax_debug_nans": True,
    "jax_disable_jit": True,
    "jax_enable_x64": True,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_check_tracer_leaks": True,
    # JAX's implementations to come of `checkpoint` and `custom_vjp`.
    "jax_remat3": True,
    "jax_custom_vjp3": True,
}


def setUpModule():
    """Has each program compiled once: most switches change none."""
    folder = tempfile.TemporaryDirectory()
    unittest.addModuleCleanup(folder.cleanup)
    for name, value in {
        "jax_compilation_cache_dir": folder.name,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }.items():
        unittest.addModuleCleanup(jax.config.update, name, getattr(jax.config, name))
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    unittest.addModuleCleanup(compilation_cache.reset_cache)


def _arguments(dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), (_PARAMS, _X))


@functools.cache
def _expected(name, dtype):
    """The plain function's gradient, with all switches off but that of its dtype."""
    with jax.enable_x64(dtype == np.float64):
        gradient = jax.jit(jax.grad(_FUNCTIONS[name], argnums=(0, 1)))
        return gradient(*_arguments(dtype))


# What is traced in another way is so in every function; a check of numbers matters
# where there are infinities, the search for leaks takes seconds, and JAX's
# implementations to come are of loops and of what is computed again.
_JITTED = {
    "jax_debug_nans": ("attention", "convolved"),
    "jax_enable_x64": tuple(_FUNCTIONS),
    "jax_numpy_dtype_promotion": tuple(_FUNCTIONS),
    "jax_numpy_rank_promotion": tuple(_FUNCTIONS),
    "jax_check_tracer_leaks": ("attention", "checkpointed"),
    "jax_remat3": ("scan", "checkpointed"),
    "jax_custom_vjp3": ("attention", "scan", "checkpointed"),
}
# The switches that act at run time; with the others one function is run eagerly, as
# they act when it is traced, which is the same.
_EAGER = {
    "jax_debug_nans": ("attention", "scan"),
    "jax_disable_jit": ("attention", "convolved", "checkpointed"),
}


class SwitchTest(parameterized.TestCase):
    def _check(self, switch, name, presets, transform):
        dtype = np.float64 if switch == "jax_enable_x64" else np.float32
        expected = _expected(name, dtype)
        self.addCleanup(jax.config.update, switch, getattr(jax.config, switch))
        jax.config.update(switch, _SWITCHES[switch])
        if switch == "jax_debug_nans" and transform is not jax.jit:
            jax.clear_caches()  # not all that is compiled already is checked
        rounding = 1e-12 if dtype == np.float64 else 1e-5

        def gradients(*args):
            functions = [drop(_FUNCTIONS[name], preset) for preset in presets]
            return [jax.grad(f, argnums=(0, 1))(*args) for f in functions]

        every = transform(gradients)(*_arguments(dtype))
        for preset, found in zip(presets, every, strict=True):
            chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
            bound = rounding if preset == "exact" else 0.02
            self.assertLess(error(found, expected), bound, preset)

    @parameterized.named_parameters(
        (f"{switch}_{name}", switch, name)
        for switch, names in _JITTED.items()
        for name in names
    )
    def test_jitted(self, switch, name):
        # A leak is looked for with patience: one preset is enough to find it.
        one = switch == "jax_check_tracer_leaks"
        self._check(switch, name, ("lean",) if one else ("exact", "lean"), jax.jit)

    @parameterized.named_parameters(
        (f"{switch}_{name}", switch, name)
        for switch in _SWITCHES
        for name in _FUNCTIONS
        if name == "scan" or name in _EAGER.get(switch, ())
    )
    def test_eagerly(self, switch, name):
        # What is lean has the arithmetic of what is exact too, and more.
        presets = ("lean",) if switch in _EAGER else ("exact",)
        self._check(switch, name, presets, lambda gradient: gradient)


def _cube(x):
    return Cube(jax.typeof(x))(x)


def _with_remat_rules():
    """A function whose cosine `jax.checkpoint` saves: it is of a rule of its own."""

    @jax.custom_vjp
    def double_slope(x):
        return jnp.sin(x)

    double_slope.defremat(
        lambda x: (jnp.sin(x), jnp.cos(x)),
        lambda cosine, x: (jnp.sin(x), cosine),
        lambda cosine, g: (2 * cosine * g,),
    )
    return double_slope


def _with_remat_closure():
    @jax.custom_gradient(remat=True)
    def double_slope(x):
        cosine = jnp.cos(x)
        return jnp.sin(x), lambda x: (jnp.sin(x), lambda g: (2 * cosine * g,))

    return double_slope


_HAS_REMAT_RULES = hasattr(jax.custom_vjp, "defremat")


class NextImplementationsTest(parameterized.TestCase):
    """What JAX's implementations to come can alone, and `jax.checkpoint` around."""

    def setUp(self):
        super().setUp()
        for switch in ("jax_remat3", "jax_custom_vjp3"):
            self.addCleanup(jax.config.update, switch, getattr(jax.config, switch))
            jax.config.update(switch, True)

    def _assert_same(self, function, transform=lambda function: function):
        @jax.jit
        def gradients(*args):
            functions = (function, drop(function, "exact"), drop(function, "lean"))
            return [jax.grad(transform(each))(*args) for each in functions]

        expected, exact, lean = gradients(*_arguments(np.float32))
        self.assertLess(error(exact, expected), 1e-6)
        self.assertLess(error(lean, expected), 0.02)

    def _assert_checkpointed_is_same(self, operation):
        block = jax.checkpoint(lambda x, w: operation(jnp.tanh(x @ w)))

        def function(params, x):
            y = operation(block(jnp.sin(x), params["w"][0]))
            return jnp.sum(y @ params["w"][1])

        self._assert_same(function)

    def test_a_hijax_primitive_in_a_checkpoint(self):
        self._assert_checkpointed_is_same(_cube)

    @parameterized.parameters(_with_remat_rules, _with_remat_closure)
    def test_rules_for_a_checkpoint(self, make):
        if not _HAS_REMAT_RULES:
            self.skipTest("NOT TESTED: this JAX has no jax.custom_vjp.defremat.")
        self._assert_checkpointed_is_same(make())

    def test_a_checkpoint_around(self):
        self._assert_same(_checkpointed, jax.checkpoint)

    def test_bodies_are_planned_as_ever(self):
        args = _arguments(np.float32)
        new = plan(_checkpointed, "lean")(*args)
        jax.config.update("jax_remat3", False)
        old = plan(_checkpointed, "lean")(*args)
        # An equation of the same value may be another one.
        self.assertEqual(
            sorted((v.shape, v.form, v.nbytes) for v in new.values),
            sorted((v.shape, v.form, v.nbytes) for v in old.values),
        )
        self.assertLess(new.nbytes, new.plain_bytes)

    def test_saved_by_name(self):
        policy = jax.checkpoint_policies.save_only_these_names("hidden")

        def block(x, w):
            return jnp.sin(checkpoint_name(jnp.tanh(x @ w), "hidden")) @ w

        def function(params, x):
            saving = jax.checkpoint(block, policy=policy)
            return jnp.sum(saving(saving(x, params["w"][0]), params["w"][1]) ** 2)

        self._assert_same(function)


if __name__ == "__main__":
    absltest.main()
