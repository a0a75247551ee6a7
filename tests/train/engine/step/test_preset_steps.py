import chex
import jax
import numpy as np
import optax
from absl.testing import absltest, parameterized

from dropit_jax import PRESETS
from tests.train.engine.step import steps
from train.engine import step as step_lib


class PresetTest(steps.StepTest):
    """Compares steps whose `config.memory` is a preset with the plain step."""

    def test_exact_is_the_plain_step(self):
        config = steps.with_plain_sgd(steps.resnet_config())
        state, batch = steps.moved_state(config), steps.batch(config)
        expected = steps.train_step(config)(state, batch)
        config.memory = "exact"
        found = steps.train_step(config)(state, batch)
        chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=2e-5)

    def test_each_is_as_near_as_it_is_said_to_be(self):
        config = steps.with_plain_sgd(steps.vit_config())
        config.label_smoothing = 0.1
        state, batch = steps.moved_state(config), steps.batch(config)
        plain, sums = steps.train_step(config)(state, batch)
        gradients = jax.tree.map(np.subtract, plain.params, state.params)
        off = {}
        for config.memory in PRESETS:
            # The exact gradients are so in parts as well, of blocks computed again.
            exact = config.memory == "exact"
            config.remat, config.accumulate_steps = (
                ("blocks", 2) if exact else ("none", 1)
            )
            found, same = steps.train_step(config)(state, batch)
            chex.assert_trees_all_close(same, sums, rtol=1e-5)
            error = jax.tree.map(np.subtract, found.params, plain.params)
            off[config.memory] = float(
                optax.tree.norm(error) / optax.tree.norm(gradients)
            )
            if config.memory == "dropit":
                changed = steps.changed_paths(found.params, plain.params)
        self.assertEqual(set(off), {"exact", "dropit", "lean", "leanest"})
        self.assertLess(off["exact"], 1e-5)
        self.assertBetween(off["lean"], 1e-4, 0.02)
        self.assertBetween(off["leanest"], off["lean"], 0.3)
        self.assertBetween(off["dropit"], off["leanest"], 1)
        # The policy is for the inputs of layers, of which their kernels' gradients are.
        self.assertNotEmpty(changed)
        self.assertTrue(all(name.endswith("/kernel") for name in changed), changed)

    def test_random_elements_are_those_of_the_key(self):
        config = steps.with_plain_sgd(
            steps.vit_config("dropit", dropit={"strategy": "random"})
        )
        state, batch = steps.moved_state(config), steps.batch(config)
        step = steps.train_step(config)
        first, again, other = (
            step(state.replace(rng=state.rng + n), batch) for n in (0, 0, 1)
        )
        chex.assert_trees_all_equal(first, again)
        # The loss is the same, and so are the gradients of all but kernels.
        chex.assert_trees_all_equal(first[1], other[1])
        changed = steps.changed_paths(first[0].params, other[0].params)
        self.assertNotEmpty(changed)
        self.assertTrue(all(name.endswith("/kernel") for name in changed), changed)

    @parameterized.parameters(
        ("exact", "flax", "dots"),
        ("lean", "dropit", "none"),
        ("exact", "dropit", "blocks"),
        ("dropit", "dropit", "dots"),
    )
    def test_goes_with_all_other_ways(self, memory, layers, remat):
        config = steps.vit_config(memory, layers, scan=remat == "blocks", dropout=0.1)
        config.remat = remat
        step, (state, batch) = step_lib.abstract(config)
        found, _ = jax.eval_shape(step, state, batch)
        chex.assert_trees_all_equal_shapes_and_dtypes(found, state)


if __name__ == "__main__":
    absltest.main()
