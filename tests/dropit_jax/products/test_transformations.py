"""JAX's and Flax's transformations of models with DropIT layers.

`vmap`, `scan` and `checkpoint` of single operations are in `test_mapped_operations.py`,
lifted transformations without keys in `linen/test_transformations.py`, meshes in
`test_sharding.py`.
"""

import collections
import contextlib
import functools
import io
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest, parameterized
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from dropit_jax import DropIT, compress, memory
from dropit_jax import linen as dn
from dropit_jax.nn import gelu

_POLICY = DropIT(0.75)
_OPCODE = re.compile(r"= \S+ ([a-z-]+)\(")


class Net(nn.Module):
    """A convolution and two dense layers, the first of which reads tanh's result."""

    dropit: DropIT | None

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(dn.Conv(32, (3,), dropit=self.dropit, name="conv")(x))
        x = nn.tanh(dn.Dense(32, dropit=self.dropit, name="hidden")(x))
        return dn.Dense(5, dropit=self.dropit, name="head")(x)


_X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6, 32)), jnp.float32)


def _variables(model):
    """Variables of an initialisation's types, which need not be compiled."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 8, leaf.dtype),
        jax.eval_shape(model.init, jax.random.key(0), _X),
    )


@functools.cache
def _params():
    return _variables(Net(None))["params"]


def _loss(params, x, dropit=_POLICY, rngs=None):
    out = Net(dropit).apply({"params": params}, x, rngs=rngs)
    return jnp.sum(jnp.sin(out))


@functools.cache
def _gradients(dropit=_POLICY):
    loss = functools.partial(_loss, dropit=dropit)
    return jax.jit(jax.grad(loss, argnums=(0, 1)))(_params(), _X)


class CheckpointTest(parameterized.TestCase):
    def _saved(self, loss):
        """Types of what autodiff saves beside arguments, and where they are from."""
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            jax.ad_checkpoint.print_saved_residuals(loss, _params(), _X)
        lines = (line.split(" ", 1) for line in printed.getvalue().splitlines())
        return [(kind, where) for kind, where in lines if "argument" not in where]

    def test_the_name_saves_what_is_cached_and_nothing_else(self):
        policy = jax.checkpoint_policies.save_only_these_names("dropit")
        loss = jax.checkpoint(_loss, policy=policy)
        saved = self._saved(loss)
        self.assertTrue(all("named 'dropit'" in where for _, where in saved))
        residual = compress(_X, _POLICY)  # all three inputs have this shape
        kinds = [
            f"{'f32' if leaf.dtype == jnp.float32 else 'u8'}"
            f"[{','.join(map(str, leaf.shape))}]"
            for leaf in jax.tree.leaves(residual)
        ]
        self.assertCountEqual([kind for kind, _ in saved], kinds * 3)
        actual = jax.jit(jax.grad(loss, argnums=(0, 1)))(_params(), _X)
        chex.assert_trees_all_close(actual, _gradients(), rtol=1e-5, atol=1e-6)

    def test_flaxs_remat_takes_the_name(self):
        policy = jax.checkpoint_policies.save_only_these_names("dropit")
        net = nn.remat(Net, policy=policy)(_POLICY)

        @jax.jit
        @jax.grad
        def gradient(params):
            return jnp.sum(jnp.sin(net.apply({"params": params}, _X)))

        chex.assert_trees_all_close(
            gradient(_params()), _gradients()[0], rtol=1e-5, atol=1e-6
        )


class FrozenTest(parameterized.TestCase):
    def _opcodes(self, gradient, *args):
        text = jax.jit(gradient).lower(*args).compile().as_text()
        return collections.Counter(_OPCODE.findall(text))

    def test_a_model_that_is_not_trained_compiles_to_flaxs_program(self):
        programs = [
            self._opcodes(jax.grad(functools.partial(_loss, _params(), dropit=d)), _X)
            for d in (_POLICY, None)
        ]
        self.assertEqual(*programs)

    def test_layers_that_are_stopped_compile_to_flaxs_program(self):
        def gradient(dropit):
            def loss(params, x):
                return _loss(lax.stop_gradient(params), x, dropit)

            return jax.grad(loss, argnums=(0, 1))

        programs = [
            self._opcodes(gradient(dropit), _params(), _X) for dropit in (_POLICY, None)
        ]
        self.assertEqual(*programs)

    def test_of_layers_that_are_not_trained_nothing_is_cached(self):
        nbytes = compress(_X, _POLICY).nbytes
        for trained in ((), ("head",), ("conv", "hidden"), ("conv", "hidden", "head")):

            def loss(layers):
                return _loss(_params() | layers, _X)

            layers = {name: _params()[name] for name in trained}
            cached = memory.cached_bytes(jax.grad(loss), layers)
            self.assertEqual(cached, len(trained) * nbytes)

    def test_only_the_bias_is_trained(self):
        kernels = {k: {"kernel": v["kernel"]} for k, v in _params().items()}
        biases = {k: {"bias": v["bias"]} for k, v in _params().items()}

        def loss(biases, dropit):
            params = {name: kernels[name] | biases[name] for name in kernels}
            return _loss(params, _X, dropit)

        programs = [
            self._opcodes(jax.grad(functools.partial(loss, dropit=d)), biases)
            for d in (_POLICY, None)
        ]
        self.assertEqual(*programs)


class ForwardModeTest(parameterized.TestCase):
    @parameterized.parameters(
        (dn.Dense(4, dropit=_POLICY), (2, 32)),
        (dn.Conv(4, (3, 3), dropit=_POLICY), (2, 5, 5, 16)),
        (dn.Einsum((32, 4), "bd,df->bf", dropit=_POLICY), (2, 32)),
        (dn.ConvTranspose(4, (3, 3), dropit=_POLICY), (2, 5, 5, 16)),
        (dn.MultiHeadDotProductAttention(2, dropit=_POLICY), (2, 3, 16)),
    )
    def test_it_is_refused(self, layer, shape):
        x = jnp.ones(shape)
        shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
        variables = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), shapes)
        message = "DropIT has no forward-mode differentiation.*dropit=None"
        with pytest.raises(TypeError, match=message):
            jax.jvp(lambda v: layer.apply(v, x), (variables,), (variables,))
        with pytest.raises(TypeError, match=message):
            jax.jacfwd(lambda v: layer.apply(v, x).sum())(variables)
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jvp(jax.jit(lambda v: layer.apply(v, x)), (variables,), (variables,))


class SecondDerivativeTest(parameterized.TestCase):
    @parameterized.parameters(
        jax.hessian,
        lambda loss: jax.grad(lambda params: optax.tree.norm(jax.grad(loss)(params))),
        lambda loss: lambda p: jax.jvp(jax.grad(loss), (p,), (p,)),
        lambda loss: jax.grad(lambda p: optax.tree.norm(jax.grad(jax.jit(loss))(p))),
    )
    def test_of_kernels_it_is_refused(self, derivative):
        loss = functools.partial(_loss, x=_X)
        with pytest.raises(TypeError, match=r"DropIT has no second derivative|forward"):
            derivative(loss)(_params())

    @parameterized.named_parameters(
        ("eager", lambda f: f, lambda step, params: step(params, None)[0]),
        ("jit", jax.jit, lambda step, params: step(params, None)[0]),
        (
            "scan",
            jax.jit,
            lambda step, params: jax.lax.scan(step, params, None, length=1)[0],
        ),
    )
    def test_a_gradient_that_is_detached_is_none(self, wrap, run):
        """First-order meta-learning detaches the inner gradient."""

        def loss(params):
            return jnp.sum(gelu(Net(_POLICY).apply({"params": params}, _X)))

        def step(params, _):
            gradient = jax.lax.stop_gradient(jax.grad(loss)(params))
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), None

        found = wrap(jax.grad(lambda params: loss(run(step, params))))(_params())
        expected = jax.jit(jax.grad(loss))(step(_params(), None)[0])
        chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)

    def test_of_the_input_it_is_exact(self):
        # A gradient penalty: nothing that is cached is differentiated.
        def penalty(params, dropit):
            return jnp.sum(jax.grad(_loss, argnums=1)(params, _X, dropit) ** 2)

        gradient = jax.jit(jax.grad(penalty), static_argnums=1)
        chex.assert_trees_all_close(
            gradient(_params(), _POLICY),
            gradient(_params(), None),
            rtol=1e-4,
            atol=1e-4,
        )


class ManyTest(parameterized.TestCase):
    """One batch in parts, or one model for several."""

    @parameterized.parameters(1, 4)
    def test_accumulated_gradients_are_the_batchs(self, size):
        batches = _X.reshape(-1, size, *_X.shape[1:])

        @jax.jit
        def accumulated(params):
            def add(total, x):
                return jax.tree.map(jnp.add, total, jax.grad(_loss)(params, x)), None

            return lax.scan(add, jax.tree.map(jnp.zeros_like, params), batches)[0]

        # No chunk crosses a sample, so that each keeps the same of itself.
        chex.assert_trees_all_close(
            accumulated(_params()), _gradients()[0], rtol=1e-4, atol=1e-4
        )

    def test_optaxs_accumulation(self):
        optimizer = optax.MultiSteps(optax.sgd(0.1), every_k_schedule=4)
        params, state = _params(), optimizer.init(_params())

        @jax.jit
        def step(params, state, x):
            updates, state = optimizer.update(jax.grad(_loss)(params, x), state, params)
            return optax.apply_updates(params, updates), state

        for x in _X.reshape(4, 2, *_X.shape[1:]):
            params, state = step(params, state, x)
        expected = jax.tree.map(
            lambda p, g: p - 0.1 * g / 4, _params(), _gradients()[0]
        )
        chex.assert_trees_all_close(params, expected, rtol=1e-4, atol=1e-5)

    @parameterized.parameters(
        (AxisType.Auto, True), (AxisType.Explicit, True), (AxisType.Explicit, False)
    )
    def test_shard_map(self, axis_type, check_vma):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))

        @jax.jit
        @functools.partial(
            jax.shard_map,
            mesh=mesh,
            in_specs=(P(), P("data")),
            out_specs=(P(), P("data")),
            check_vma=check_vma,
        )
        def gradients(params, x):
            to_params, to_x = jax.grad(_loss, argnums=(0, 1))(params, x)
            # Where JAX tracks what varies from device to device it sums by itself.
            return to_params if check_vma else lax.psum(to_params, "data"), to_x

        with jax.set_mesh(mesh):
            actual = gradients(_params(), jax.device_put(_X, P("data")))
        chex.assert_trees_all_close(
            jax.device_get(actual), jax.device_get(_gradients()), rtol=1e-4, atol=1e-4
        )

    def test_flaxs_vmap_is_many_models(self):
        def ensemble(layer):
            lifted = nn.vmap(
                layer,
                in_axes=None,
                axis_size=3,
                variable_axes={"params": 0},
                split_rngs={"params": True},
            )
            return lifted(_POLICY)

        variables = _variables(ensemble(Net))

        @jax.jit
        @jax.grad
        def together(variables):
            return jnp.sum(jnp.sin(ensemble(Net).apply(variables, _X)))

        one = jax.jit(jax.grad(_loss))
        each = [
            one(jax.tree.map(lambda leaf, i=i: leaf[i], variables["params"]), _X)
            for i in range(3)
        ]
        expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
        chex.assert_trees_all_close(
            together(variables)["params"], expected, rtol=1e-4, atol=1e-5
        )


class KeyTest(parameterized.TestCase):
    """Random choices under lifted transformations."""

    def _kernel_gradients(self, policy, lift):
        """The gradients for a seed."""

        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return dn.Dense(32, use_bias=False, dropit=policy)(x), None

        class Stack(nn.Module):
            @nn.compact
            def __call__(self, x):
                return lift(Layer)(name="layers")(x, None)[0]

        variables = _variables(Stack())

        def loss(variables, seed):
            rngs = {"dropit": jax.random.key(seed)}
            return jnp.sum(Stack().apply(variables, _X, rngs=rngs))

        gradient = jax.jit(jax.grad(loss))
        return lambda seed: gradient(variables, seed)["params"]["layers"]

    def _scanned(self, split):
        return functools.partial(
            nn.scan,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropit": split},
            length=2,
        )

    @parameterized.parameters(
        ("scan", DropIT(0.75, strategy="random")),
        ("remat", DropIT(0.75, strategy="random")),
        ("scan", DropIT(0.5, value_dtype="int4", rounding="stochastic")),
        ("remat", DropIT(0.5, strategy="random", granularity="channel")),
    )
    def test_lifted_transformations(self, name, policy):
        lift = self._scanned(True) if name == "scan" else nn.remat
        gradients = self._kernel_gradients(policy, lift)
        one, again, other = (gradients(seed) for seed in (1, 1, 2))
        chex.assert_trees_all_equal(one, again)
        (one,), (other,) = jax.tree.leaves(one), jax.tree.leaves(other)
        self.assertGreater(np.abs(np.subtract(one, other)).max(), 0)

    def test_layers_of_a_scan_draw_apart_if_told_to(self):
        policy = DropIT(0.75, strategy="random", granularity="channel")
        # A row of the kernel's gradient is zero where its channel was dropped.
        dropped = {
            split: np.all(
                self._kernel_gradients(policy, self._scanned(split))(1)["Dense_0"][
                    "kernel"
                ]
                == 0,
                axis=-1,
            )
            for split in (True, False)
        }
        np.testing.assert_array_equal(dropped[True].sum(axis=-1), 24)
        self.assertFalse(np.array_equal(*dropped[True]))
        self.assertTrue(np.array_equal(*dropped[False]))

    def test_a_key_is_missing(self):
        policy = DropIT(0.75, strategy="random")
        with pytest.raises(ValueError, match=r"strategy='random'.*rngs=\{'dropit'"):
            jax.grad(functools.partial(_loss, dropit=policy))(_params(), _X)


if __name__ == "__main__":
    absltest.main()
