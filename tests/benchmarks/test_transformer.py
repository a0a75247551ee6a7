import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from benchmarks import memory
from benchmarks.workloads import transformer
from benchmarks.workloads.transformer import SCANNED, UNROLLED, Transformer
from benchmarks.workloads.variants import VARIANTS

_TINY = Transformer(
    layers=2, width=8, heads=2, tokens=5, batch=3, dtype="float32", scan=True
)


def _arguments(model):
    """Random arguments of its loss; stacked, they are the same for every model."""
    params, others, x = dataclasses.replace(model, scan=True).arguments()
    rng = np.random.default_rng(0)
    params, x = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), (params, x)
    )
    if not model.scan:
        params = [
            jax.tree.map(lambda leaf, n=n: leaf[n], params) for n in range(model.layers)
        ]
    return params, others, x


@functools.cache
def _gradient(model, name):
    loss = model.loss(VARIANTS[name])
    gradient, others = jax.jit(jax.grad(loss, has_aux=True))(*_arguments(model))
    return gradient, others


class TransformerTest(parameterized.TestCase):
    def test_a_block_is_that_of_flax(self):
        (own, _), _, x = _arguments(dataclasses.replace(_TINY, scan=False))
        norm = nn.LayerNorm(epsilon=1e-6)
        norms = [
            {"params": {"scale": own[f"scale{n}"], "bias": own[f"offset{n}"]}}
            for n in (1, 2)
        ]
        attention = nn.MultiHeadDotProductAttention(num_heads=2, use_bias=False)
        kernels = {
            name: {"kernel": own[name]} for name in ("query", "key", "value", "out")
        }

        @jax.jit
        def block(x):
            middle = x + attention.apply({"params": kernels}, norm.apply(norms[0], x))
            hidden = nn.gelu(norm.apply(norms[1], middle) @ own["up"])
            return middle + hidden @ own["down"], transformer._block(own, x)

        expected, found = block(x)
        chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-4)

    def test_in_a_loop_it_is_what_it_is_one_by_one(self):
        unrolled = dataclasses.replace(_TINY, scan=False)
        stacked, others = _gradient(_TINY, "baseline")
        listed, _ = _gradient(unrolled, "baseline")
        expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *listed)
        chex.assert_trees_all_close(stacked, expected, rtol=1e-4, atol=1e-5)
        self.assertEqual(others, {})

    @parameterized.parameters("exact", "remat_blocks")
    def test_what_loses_nothing_changes_no_gradient(self, name):
        expected, _ = _gradient(_TINY, "baseline")
        found, _ = _gradient(_TINY, name)
        chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)

    @parameterized.parameters(
        ("baseline", False),
        ("lean", True),
        ("remat_blocks", False),
        ("lean+remat_blocks", True),
    )
    def test_blocks_are_recomputed_where_they_are_to_be(self, name, scan):
        model = dataclasses.replace(_TINY, scan=scan)
        step, arguments, donated = model.training_step(VARIANTS[name])
        program = str(jax.make_jaxpr(step)(*arguments))
        self.assertEqual("prevent_cse" in program, "remat" in name)
        self.assertEqual("scan[" in program, scan)
        variables, opt_state, x = jax.eval_shape(
            lambda *a: (*step(*a), a[2]), *arguments
        )
        found = variables, opt_state, x
        chex.assert_trees_all_equal_shapes_and_dtypes(found, arguments)
        self.assertEqual(donated, (0, 1))

    def test_sizes_are_those_that_are_published(self):
        self.assertIs(memory.MODELS[SCANNED.name], SCANNED)
        for model, layers in ((SCANNED, 12), (UNROLLED, 24)):
            params, _, x = model.arguments()
            self.assertEqual((x.shape, x.dtype), ((16, 1024, 1024), jnp.bfloat16))
            count = sum(leaf.size for leaf in jax.tree.leaves(params))
            # Four kernels of the attention, two of the MLP, and two norms.
            self.assertEqual(count, layers * (12 * 1024**2 + 4 * 1024))
        _, _, x = SCANNED.arguments(batch=4)
        self.assertEqual(x.shape[0], 4)
        self.assertEqual(SCANNED.attention_core_flops, 2 * 12 * 16 * 1024**3)
        title = (
            "### Transformer of 12 blocks in lax.scan, width 1,024, 16 heads, "
            "16 x 1,024 tokens, bfloat16, h100"
        )
        self.assertEqual(SCANNED.title("h100"), title)


if __name__ == "__main__":
    absltest.main()
