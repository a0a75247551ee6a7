import chex
import jax
import numpy as np
from absl.testing import absltest

from tests.train.engine.step import references, steps


class EmaTest(steps.StepTest):
    def test_is_the_average_of_parameters(self):
        """Also checks that the average changes nothing in training."""
        config = steps.vit_config()
        plain, batch = steps.initial_state(config), steps.batch(config)
        plain_step = steps.train_step(config)
        config.ema_decay = decay = 0.9
        state, step = steps.initial_state(config), steps.train_step(config)
        chex.assert_trees_all_equal(state.ema_params, state.params)
        expected = jax.tree.map(np.float64, state.params)
        for _ in range(3):
            state, sums = step(state, batch)
            plain, plain_sums = plain_step(plain, batch)
            chex.assert_trees_all_close(
                (state.params, state.opt_state, sums),
                (plain.params, plain.opt_state, plain_sums),
                rtol=1e-6,
                atol=1e-7,
            )
            expected = jax.tree.map(
                lambda mean, new: decay * mean + (1 - decay) * np.float64(new),
                expected,
                state.params,
            )
            chex.assert_trees_all_close(
                state.ema_params, jax.tree.map(np.float32, expected), rtol=0, atol=1e-6
            )
        self.assertTrue(steps.differ(state.ema_params, state.params))
        self.assertEqual(plain.ema_params, {})
        self.assertIs(plain.variables["params"], plain.params)

    def test_is_what_is_evaluated(self):
        config = steps.vit_config()
        config.ema_decay = 0.9
        state, batch = steps.moved_state(config), steps.batch(config)
        other = jax.tree.map(lambda array: -array, state.params)
        state = state.replace(ema_params=other)
        sums = steps.evaluation_step(config)(state, batch)
        logits = [
            references.logits(config, state.replace(params=params), batch, False)
            for params in (other, state.params)
        ]
        expected, wrong = (references.sums(each, batch) for each in logits)
        chex.assert_trees_all_close(sums, expected, rtol=1e-4)
        self.assertNotAlmostEqual(float(sums.loss), float(wrong.loss), places=2)
        self.assertIs(state.variables["params"], state.ema_params)


if __name__ == "__main__":
    absltest.main()
