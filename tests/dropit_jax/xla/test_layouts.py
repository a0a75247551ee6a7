"""How compressed arrays lie in a GPU's memory, and what that saves."""

import functools
import math
from unittest import mock

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import dropit_jax
from dropit_jax import DropIT
from dropit_jax import linen as dn
from dropit_jax.memory.compiled import hlo
from dropit_jax.xla import layouts
from dropit_jax.xla.partitioning import on_every_device
from tests.dropit_jax import gpu_programs, reference

_CONSTRAINT = "@LayoutConstraint"


def _lowered(function, *shapes, platform="cuda"):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    traced = jax.jit(function).trace(*args)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def _order(*axes):
    """As a result's layout is written, the innermost axis first."""
    return f"result_layouts = [dense<{[*reversed(axes)]}>"


# What a GPU takes, here too.
_as_on_a_gpu = on_every_device(
    functools.partial(layouts._constrained, order=(0, 1, 2)),
    results=1,
    elementwise=True,
)


class RowMajorTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.x = jnp.asarray(reference.activation(0, (2, 3, 4)))

    @parameterized.parameters(True, False)
    def test_changes_nothing(self, jitted):
        function = jax.jit(layouts.row_major) if jitted else layouts.row_major
        reference.assert_same_bits(function(self.x), self.x)

    @parameterized.parameters(0, 1, 2)
    def test_can_be_mapped(self, axis):
        mapped = jax.vmap(layouts.row_major, axis, axis)
        reference.assert_same_bits(jax.jit(mapped)(self.x), self.x)
        text = _lowered(mapped, self.x.shape)
        self.assertEqual(text.count(_CONSTRAINT), 1)
        self.assertIn(_order(0, 1, 2), text)

    def test_has_the_derivatives_of_the_identity(self):
        def total(function):
            return lambda x: jnp.sum(jnp.sin(function(x)) ** 2)

        def derivatives(function, x):
            f = total(function)
            _, tangent = jax.jvp(f, (x,), (jnp.cos(x),))
            of_checkpoint = jax.grad(jax.checkpoint(f))(x)
            return jax.grad(f)(x), jax.hessian(f)(x), of_checkpoint, tangent

        of = jax.jit(derivatives, static_argnums=0)
        chex.assert_trees_all_close(
            of(layouts.row_major, self.x), of(lambda x: x, self.x), atol=1e-6
        )

    @parameterized.parameters("cpu", "tpu", "rocm")
    def test_elsewhere_xla_chooses(self, platform):
        text = _lowered(layouts.row_major, (2, 3, 4), platform=platform)
        self.assertNotIn(_CONSTRAINT, text)

    @parameterized.parameters((1, 1), (3, 1), (4, 0), (5, 0))
    def test_of_images_convolutions_choose(self, rank, expected):
        text = _lowered(layouts.row_major_unless_images, tuple(range(2, 2 + rank)))
        self.assertEqual(text.count(_CONSTRAINT), expected)

    @parameterized.product(
        spec=(P("data"), P("data", "model"), P(None, None, "model")),
        axis_type=(AxisType.Auto, AxisType.Explicit),
    )
    def test_what_is_laid_out_stays_where_it_is(self, spec, axis_type):
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
        x = jnp.asarray(reference.activation(0, (4, 6, 8)))
        with jax.set_mesh(mesh):
            x = jax.device_put(x, NamedSharding(mesh, spec))
            step = jax.jit(_as_on_a_gpu).lower(x).compile()
            result = step(x)
        self.assertNotIn(" all-", step.as_text())
        self.assertTrue(result.sharding.is_equivalent_to(x.sharding, x.ndim))
        reference.assert_same_bits(np.asarray(result), np.asarray(x))

    def test_within_shard_map(self):
        mesh = jax.make_mesh((8,), ("data",))
        spec = P("data")
        mapped = jax.shard_map(
            layouts.row_major, mesh=mesh, in_specs=spec, out_specs=spec
        )
        x = jax.device_put(
            jnp.asarray(reference.activation(0, (8, 3))), NamedSharding(mesh, spec)
        )
        reference.assert_same_bits(np.asarray(jax.jit(mapped)(x)), np.asarray(x))
        text = jax.jit(mapped).trace(x).lower(lowering_platforms=("cuda",)).as_text()
        self.assertIn(_CONSTRAINT, text)


_TOKENS, _WIDTH = 97, 128


class _Block(nn.Module):
    """Attention and a dense layer, as in a transformer."""

    dropit: DropIT | None = None

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(dtype=x.dtype)(x)
        attention = dn.MultiHeadDotProductAttention
        x = x + attention(2, dtype=x.dtype, dropit=self.dropit)(y)
        y = nn.LayerNorm(dtype=x.dtype)(x)
        dense = functools.partial(dn.Dense, dtype=x.dtype, dropit=self.dropit)
        return x + dense(_WIDTH)(nn.gelu(dense(4 * _WIDTH)(y)))


def _program(preset=None, dropit=None):
    block = _Block(dropit)
    x = jax.ShapeDtypeStruct((32, _TOKENS, _WIDTH), jnp.bfloat16)
    params = jax.eval_shape(block.init, jax.random.key(0), x)

    def step(params, x):
        def loss(params, x):
            return (block.apply(params, x).astype(jnp.float32) ** 2).sum()

        if preset is not None:
            loss = dropit_jax.drop(loss, preset)
        return jax.grad(loss, argnums=(0, 1))(params, x)

    _, text = gpu_programs.compiled(step, (params, x))
    return hlo.parse(text)


@functools.cache
def _lean():
    jax.clear_caches()  # of what is traced with another layout
    return _program(preset="lean")


def _moved(program):
    """Bytes that the kernels of a program read and write."""
    entry = program.computations[program.entry]

    def nbytes(instruction):
        return sum(
            math.prod(array.shape) * jnp.dtype(array.dtype).itemsize
            for array in instruction.results
        )

    return sum(
        nbytes(instruction) + sum(nbytes(entry[name]) for name in instruction.operands)
        for instruction in entry.values()
        if instruction.opcode in ("fusion", "custom-call", "copy")
    )


class TrafficTest(parameterized.TestCase):
    def _free(self, **how):
        """Bytes that move where XLA may choose how arrays lie."""
        with mock.patch.object(layouts, "_laid_out", lambda x, order: x):
            jax.clear_caches()  # of what is traced without
            free = _moved(_program(**how))
        jax.clear_caches()
        return free

    def test_a_lean_transformer_moves_less(self):
        self.assertLess(_moved(_lean()), 0.99 * self._free(preset="lean"))

    def test_a_transformer_of_dropit_layers_moves_less(self):
        policy = {"dropit": DropIT(value_dtype="bfloat16")}
        free = self._free(**policy)
        self.assertLess(_moved(_program(**policy)), 0.99 * free)

    def test_no_token_lies_beside_the_next(self):
        arrays = {
            array.shape
            for computation in _lean().computations.values()
            for instruction in computation.values()
            for array in instruction.results
        }
        self.assertIn((32, _TOKENS, _WIDTH), arrays)
        self.assertNotIn((32, _WIDTH, _TOKENS), arrays)


if __name__ == "__main__":
    absltest.main()
