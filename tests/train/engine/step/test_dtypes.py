import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from tests.train.engine.step import steps
from train.engine import step as step_lib


def _equations(jaxpr):
    """Yields the equations of a jaxpr and of the jaxprs in it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(inner, "jaxpr", inner)  # noqa: PLW2901
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


def _products(step, *args):
    """Yields operand dtypes and all shapes of matrix products and convolutions."""
    for equation in _equations(jax.make_jaxpr(step)(*args).jaxpr):
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            avals = [var.aval for var in (*equation.invars, *equation.outvars)]
            dtypes = {str(aval.dtype) for aval in avals[:2]}
            yield dtypes, [aval.shape for aval in avals]


_CONFIGS = {
    "resnet": steps.resnet_config,
    "resnet_dropit": steps.layers_config,
    "vit": steps.vit_config,
    "vit_lean": functools.partial(steps.vit_config, "lean", scan=True),
}


class DtypeTest(steps.StepTest):
    @parameterized.parameters(*_CONFIGS)
    def test_of_the_computation_is_not_that_of_the_state(self, name):
        config = _CONFIGS[name]()
        config.dtype, config.ema_decay = "bfloat16", 0.9
        config.accumulate_steps = 2 if name == "vit" else 1
        step, (state, batch) = step_lib.abstract(config)
        new_state, sums = jax.eval_shape(step, state, batch)
        chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
        numbers = (*new_state.variables.values(), new_state.params, sums)
        dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(numbers)}
        self.assertEqual(dtypes, {"float32"})
        dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(new_state.opt_state)}
        self.assertEqual(dtypes, {"float32", "int32"})  # numbers, and counts

    def test_the_loss_is_nearly_that_of_float32(self):
        config = steps.layers_config()
        state, batch, results = steps.moved_state(config), steps.batch(config), []
        for config.dtype in ("float32", "bfloat16"):
            results.append(steps.train_step(config)(state, batch))
        (full, sums), (half, found) = results
        chex.assert_trees_all_equal_shapes_and_dtypes(full, half)
        np.testing.assert_allclose(found.loss, sums.loss, rtol=0.03)
        self.assertNotEqual(float(found.loss), float(sums.loss))

    @parameterized.parameters(*_CONFIGS)
    def test_logits_are_float32(self, name):
        config = _CONFIGS[name]()
        config.dtype = "bfloat16"
        state, batch = step_lib.abstract_state(config), steps.batch(config)
        model = step_lib.create_model(config)
        logits = jax.eval_shape(
            lambda state, images: model.apply(state.variables, images, False),
            state,
            jnp.float32(batch["image"]),
        )
        self.assertEqual((logits.shape, logits.dtype), ((16, 10), jnp.float32))

    @parameterized.parameters("resnet", "vit")
    def test_products_are_of_that_dtype_but_the_last(self, name):
        config = _CONFIGS[name]()
        state, batch = step_lib.abstract_state(config), steps.batch(config)
        found = list(_products(step_lib.train_step(config), state, batch))
        self.assertEqual({str(dtypes) for dtypes, _ in found}, {"{'float32'}"})
        config.dtype = "bfloat16"
        changed = list(_products(step_lib.train_step(config), state, batch))
        self.assertEqual([shapes for _, shapes in changed], [s for _, s in found])
        kept = [shapes for dtypes, shapes in changed if dtypes != {"bfloat16"}]
        # The head: its logits, and the gradients of its kernel and its input.
        self.assertLen(kept, 3)
        for shapes in kept:
            self.assertIn(10, sum(shapes, ()))
        self.assertGreater(len(changed), 15)


if __name__ == "__main__":
    absltest.main()
