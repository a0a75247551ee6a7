"""The CPU's variants of the definitions of kernels compute the same."""

import functools
import itertools

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

from dropit_jax.storage.kernels import definitions
from dropit_jax.storage.kernels.chunk_storage import ChunkStorage
from tests.dropit_jax import reference


class CpuTwinTest(parameterized.TestCase):
    @parameterized.product(
        activation=(reference.activation, reference.finite),
        shape=((4, 24), (2, 3, 5), (3, 0), (7,)),
        dtype=("float32", "bfloat16", "float16"),
    )
    def test_two_elements_by_one_loop_are_the_same(self, activation, shape, dtype):
        storage = ChunkStorage(16, 2, "index", dtype)
        x = jnp.asarray(activation(0, (*shape, 16), dtype))
        before = definitions.first_index_operand(shape, storage)
        self.assertEqual(before.shape, shape)
        alike, alone = (
            definitions.compress(x, storage, before),
            definitions.compress(x, storage),
        )
        for given, expected in zip(alike, alone, strict=True):
            reference.assert_same_bits(given, expected)

    @parameterized.parameters((16, 1), (16, 4), (8, 2), (32, 2))
    def test_one_loop_is_for_two_of_16(self, size, kept):
        storage = ChunkStorage(size, kept, "index", "float32")
        self.assertIsNone(definitions.first_index_operand((4, 6), storage))

    # All types at one shape and size, all shapes at one size, and all sizes.
    @parameterized.parameters(
        *itertools.product(
            ((4, 24),),
            ((16, 2),),
            ("float32", "bfloat16"),
            ("float32", "bfloat16", "float16"),
        ),
        *itertools.product(
            ((2, 3, 5), (3, 0), (7,), (2, 8, 1)), ((12, 6),), ("float32",), ("float16",)
        ),
        *itertools.product(
            ((4, 24),),
            ((16, 3), (16, 4), (8, 2), (32, 4), (64, 40)),
            ("bfloat16",),
            ("float32",),
        ),
    )
    def test_placing_by_a_reduction_is_the_same(
        self, shape, size_and_kept, dtype, value_dtype
    ):
        storage = ChunkStorage(*size_and_kept, "index", value_dtype)

        @jax.jit
        def both(x):
            stored = definitions.compress(x, storage)
            return [
                definitions.decompress(*stored, storage, dtype, by_reduction)
                for by_reduction in (False, True)
            ]

        x = reference.activation(0, (*shape, storage.unit * storage.size))
        plain, reduced = both(jnp.asarray(x, dtype))
        reference.assert_same_bits(reduced, plain)

    @parameterized.parameters(
        ("index", 16, 3, True),
        ("index", 64, 8, True),
        ("index", 128, 4, False),
        ("bitmap", 16, 3, False),
    )
    def test_indices_in_small_chunks_are_placed_by_a_reduction(
        self, encoding, size, kept, expected
    ):
        storage = ChunkStorage(size, kept, encoding, "float32")
        x = jax.ShapeDtypeStruct((4, 24, storage.unit * size), jnp.float32)
        stored = jax.eval_shape(lambda x: definitions.compress(x, storage), x)

        def program(by_reduction):
            decompress = functools.partial(
                definitions.decompress,
                storage=storage,
                dtype=jnp.float32,
                by_reduction=by_reduction,
            )
            return str(jax.make_jaxpr(decompress)(*stored))

        self.assertEqual(program(True) != program(False), expected)


if __name__ == "__main__":
    absltest.main()
