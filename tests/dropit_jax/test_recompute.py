import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax.sharding import AxisType, PartitionSpec

from dropit_jax import layer_preset
from dropit_jax import linen as dn
from dropit_jax.linen.remat import recomputed, remat
from dropit_jax.nn.recompute import recompute
from dropit_jax.storage.quantization import quantize


def _function(x, w):
    return jnp.tanh(x @ w["kernel"]) * w["scale"]


def _arguments():
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(4, 3, 128)), jnp.float32)
    kernel = jnp.asarray(random.normal(size=(128, 5)) / 8, jnp.float32)
    return x, {"kernel": kernel, "scale": jnp.float32(1.5), "count": jnp.int32(3)}


def _rounded(x):
    return quantize(x, 8, 64).dequantize(x.dtype)


class RecomputeTest(parameterized.TestCase):
    def test_the_gradient_is_the_exact_one_at_what_is_cached(self):
        x, w = _arguments()
        out, pullback = jax.vjp(functools.partial(recompute, _function), x, w)
        expected, exact = jax.vjp(_function, _rounded(x), w)
        chex.assert_trees_all_equal(out, _function(x, w))
        cotangent = jnp.ones_like(out)
        actual, wanted = pullback(cotangent), exact(cotangent)
        for gradients in (actual, wanted):  # of an integer there is none
            self.assertEqual(gradients[1].pop("count").dtype, jax.dtypes.float0)
        chex.assert_trees_all_close(actual, wanted, rtol=1e-5, atol=1e-6)
        self.assertFalse(np.array_equal(out, expected))  # the output is not rounded

    def test_every_element_is_within_its_bound(self):
        x, _ = _arguments()
        groups = np.asarray(x).reshape(4, 3, 2, 64)
        bound = np.ptp(groups, axis=-1, keepdims=True) / 510
        error = np.abs(np.asarray(_rounded(x)).reshape(groups.shape) - groups)
        self.assertLess((error / bound).max(), 1.02)

    def test_caches_8_bits_of_what_it_is_told_to(self):
        x, w = _arguments()

        def cached(compact):
            function = functools.partial(recompute, _function, compact=compact)
            _, pullback = jax.vjp(function, x, w)
            return sum(leaf.nbytes for leaf in jax.tree.leaves(pullback))

        rest = sum(leaf.nbytes for leaf in jax.tree.leaves(w))
        self.assertEqual(cached((0,)), x.size + 4 * x.size // 64 + rest)
        self.assertEqual(cached(()), x.nbytes + rest)

    def test_transformations(self):
        x, w = _arguments()

        def loss(x, w):
            return jnp.sum(recompute(_function, x, w) ** 2)

        gradient = jax.grad(loss, allow_int=True)
        expected = jnp.stack([gradient(each, w) for each in x])
        close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)
        close(jax.vmap(gradient, (0, None))(x, w), expected)
        close(jax.lax.map(lambda each: gradient(each, w), x), expected)
        close(jax.jit(jax.grad(jax.checkpoint(loss)))(x[0], w), expected[0])
        with pytest.raises(TypeError, match="no second derivative"):
            jax.grad(lambda x: jax.grad(loss)(x, w).sum())(x)

    @parameterized.parameters(AxisType.Auto, AxisType.Explicit)
    def test_on_a_mesh_the_inputs_stay_where_they_are(self, axis_type):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
        x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 128)), jnp.float32)

        def loss(x):
            return jnp.sum(jnp.sin(recompute(jnp.tanh, x)))

        expected = jax.device_get(jax.grad(loss)(x))
        with jax.set_mesh(mesh):
            sharded = jax.device_put(x, PartitionSpec("data"))
            compiled = jax.jit(jax.grad(loss)).lower(sharded).compile()
            self.assertNotRegex(compiled.as_text(), "all-|collective|reduce-scatter")
            actual = jax.device_get(compiled(sharded))
        chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


class ShardMapTest(parameterized.TestCase):
    def test_parameters_that_devices_share(self):
        random = np.random.default_rng(0)
        x = jnp.asarray(random.normal(size=(16, 64)), jnp.float32)
        w = jnp.asarray(random.normal(size=(64, 3)) / 8, jnp.float32)

        def loss(w, x):
            return recompute(lambda x, w: jnp.sin(x @ w), x, w).sum()

        expected = jax.grad(loss)(w, x)
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        specs = (PartitionSpec(), PartitionSpec("data"))
        mapped = jax.shard_map(
            jax.grad(loss), mesh=mesh, in_specs=specs, out_specs=PartitionSpec()
        )
        chex.assert_trees_all_close(
            jax.jit(mapped)(w, x), expected, rtol=1e-4, atol=1e-5
        )


class Block(nn.Module):
    """Parameters, running statistics, random numbers, a flag and a mask."""

    features: int

    @nn.compact
    def __call__(self, x, train, mask=None):
        y = nn.Dense(self.features, name="inner")(x)
        y = nn.BatchNorm(use_running_average=not train)(y)
        y = nn.Dropout(0.25, deterministic=not train)(nn.relu(y))
        self.sow("intermediates", "y", y)
        return x + (y if mask is None else y * mask)


class Model(nn.Module):
    """Blocks of one class in a row."""

    block: type

    @nn.compact
    def __call__(self, x, train, mask=None):
        for _ in range(2):
            x = self.block(x.shape[-1])(x, train, mask)
        return x


class RecomputedBlockTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        random = np.random.default_rng(0)
        self.x = jnp.asarray(random.normal(size=(8, 64)), jnp.float32)
        self.mask = jnp.asarray(random.random((8, 64)) < 0.5, jnp.float32)
        self.plain = Model(Block)
        self.variables = self.plain.init(jax.random.key(0), self.x, False)

    def _run(self, model):
        def loss(params, x):
            out, updates = model.apply(
                {**self.variables, "params": params},
                x,
                True,
                mask=self.mask,
                mutable=["batch_stats", "intermediates"],
                rngs={"dropout": jax.random.key(1)},
            )
            return jnp.sum(out**2), (out, updates)

        gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        return jax.jit(gradient)(self.variables["params"], self.x)

    def test_variables_updates_random_numbers_and_output_are_the_blocks(self):
        model = Model(recomputed(Block))
        chex.assert_trees_all_equal(
            model.init(jax.random.key(0), self.x, False), self.variables
        )
        expected, exact = self._run(self.plain)
        actual, gradients = self._run(model)
        chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)
        near, far = (
            jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
            for tree in (gradients, exact)
        )
        self.assertLess(float(jnp.linalg.norm(near - far) / jnp.linalg.norm(far)), 0.02)

    def test_without_training(self):
        model = Model(recomputed(Block))
        chex.assert_trees_all_close(
            model.apply(self.variables, self.x, False),
            self.plain.apply(self.variables, self.x, False),
            rtol=1e-6,
            atol=1e-6,
        )

    def test_which_preset_recomputes_how(self):
        self.assertIs(remat(Block, layer_preset("lean")), Block)
        compact = remat(Block, layer_preset("lean", remat="blocks"))
        self.assertIs(compact, recomputed(Block))
        self.assertEqual(compact.__name__, "Block")
        for memory in (
            layer_preset("dropit", remat="blocks"),
            layer_preset("lean", remat="dots"),
        ):
            block = remat(Block, memory, static_argnums=(2,))
            self.assertIsNot(block, compact)
            expected, exact = self._run(self.plain)
            actual, gradients = self._run(_with_names(block))
            close = functools.partial(chex.assert_trees_all_close, rtol=1e-4)
            close(actual[0], expected[0])
            close(jax.tree.leaves(gradients), jax.tree.leaves(exact), atol=1e-4)

    def test_a_blocks_inputs_are_cached_in_8_bits(self):
        def cached(block):
            model = Model(block)

            def run(x):
                return model.apply(self.variables, x, False)

            _, pullback = jax.vjp(run, self.x)
            held = {id(leaf) for leaf in jax.tree.leaves(self.variables)}
            leaves = [
                leaf for leaf in jax.tree.leaves(pullback) if id(leaf) not in held
            ]
            return sum(leaf.nbytes for leaf in leaves)

        size = self.x.size
        self.assertEqual(cached(recomputed(Block)), 2 * (size + 4 * size // 64))


class Drop(nn.Module):
    """Nothing but random numbers."""

    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=False)(x)


class Twice(nn.Module):
    """A block that is called twice."""

    block: type

    @nn.compact
    def __call__(self, x):
        block = self.block(name="block")
        return block(block(x))


class Holder(nn.Module):
    """A block that is given a module."""

    inner: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.inner(x)


class Given(nn.Module):
    """Gives a module to a block."""

    @nn.compact
    def __call__(self, x):
        return recomputed(Holder)(nn.Dense(4, name="inner"), name="holder")(x)


class RandomNumbersTest(parameterized.TestCase):
    def _run(self, model):
        x = jnp.ones((4, 64))
        return model.apply({}, x, rngs={"dropout": jax.random.key(0)})

    def test_a_block_that_is_called_twice_draws_twice(self):
        chex.assert_trees_all_equal(
            self._run(Twice(recomputed(Drop))), self._run(Twice(Drop))
        )

    def test_a_block_in_a_loop(self):
        def model(block):
            def body(mdl, x, _):
                return block(name="block")(x), None

            class Loop(nn.Module):
                @nn.compact
                def __call__(self, x):
                    scan = nn.scan(
                        body, split_rngs={"dropout": True}, length=3, variable_axes={}
                    )
                    return scan(self, x, None)[0]

            return Loop()

        chex.assert_trees_all_equal(
            self._run(model(recomputed(Drop))), self._run(model(Drop))
        )

    def test_blocks_keep_their_names(self):
        x = jnp.ones((2, 64))
        names = set(Model(Block).init(jax.random.key(0), x, False)["params"])
        for memory in (
            layer_preset("baseline", remat="blocks"),
            layer_preset("lean", remat="dots"),
            layer_preset("lean", remat="blocks"),
        ):
            block = remat(Block, memory, static_argnums=(2,))
            variables = Model(block).init(jax.random.key(0), x, False)
            self.assertEqual(set(variables["params"]), names)

    def test_a_module_in_a_field_is_refused(self):
        x = jnp.ones((2, 4))
        variables = Given().init(jax.random.key(0), x)
        with pytest.raises(ValueError, match=r"Holder\.inner holds a module"):
            Given().apply(variables, x)


def _with_names(block):
    """A model of blocks whose class has another name, with the plain one's names."""

    class Named(nn.Module):
        @nn.compact
        def __call__(self, x, train, mask=None):
            for number in range(2):
                x = block(x.shape[-1], name=f"Block_{number}")(x, train, mask)
            return x

    return Named()


class AttentionTest(parameterized.TestCase):
    @parameterized.parameters(False, True)
    def test_the_gradient_is_the_exact_one_at_what_is_cached(self, masked):
        random = np.random.default_rng(0)
        q, k, v = (
            jnp.asarray(random.normal(size=(2, 5, 2, 64)), jnp.float32)
            for _ in range(3)
        )
        mask = nn.make_causal_mask(jnp.ones((2, 5))) if masked else None
        attend = layer_preset("lean")
        ours = functools.partial(dn.toolbox(attend).dot_product_attention, mask=mask)
        theirs = functools.partial(nn.dot_product_attention, mask=mask)
        out, pullback = jax.vjp(ours, q, k, v)
        _, exact = jax.vjp(theirs, *map(_rounded, (q, k, v)))
        chex.assert_trees_all_close(out, theirs(q, k, v), rtol=1e-6)
        cotangent = jnp.ones_like(out)
        chex.assert_trees_all_close(
            pullback(cotangent), exact(cotangent), rtol=1e-4, atol=1e-5
        )
        cached = sum(leaf.nbytes for leaf in jax.tree.leaves(pullback))
        held = 0 if mask is None else mask.nbytes
        self.assertEqual(cached, 3 * (q.size + 4 * q.size // 64) + held)

    def test_other_widths_are_refused(self):
        q = jnp.ones((1, 2, 1, 4))
        with pytest.raises(ValueError, match="bits=8 or None, got 4"):
            dn.toolbox(layer_preset("lean")).dot_product_attention(q, q, q, bits=4)


if __name__ == "__main__":
    absltest.main()
