import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from configs import digits_resnet18
from tests.train.engine.step import references, steps
from train.engine import step as step_lib


class AbstractTest(steps.StepTest):
    @parameterized.parameters((steps.resnet_config, 0.0), (steps.vit_config, 0.9))
    def test_describes_the_real_arguments(self, config, ema_decay):
        config = config()
        config.ema_decay = ema_decay
        _, (state, batch) = step_lib.abstract(config)
        real = steps.initialise(config)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, real)
        chex.assert_trees_all_equal_shapes_and_dtypes(batch, steps.batch(config))

    def test_allocates_nothing(self):
        config = digits_resnet18.get_config()
        config.batch_size, config.image_size, config.model.width = 1024, 512, 512
        config.ema_decay, config.accumulate_steps = 0.9, 4
        before = jax.live_arrays()  # and none of them goes meanwhile
        step, args = step_lib.abstract(config, batch_size=2048)
        new_state, sums = jax.eval_shape(step, *args)
        known = set(map(id, before))
        self.assertEmpty([a.shape for a in jax.live_arrays() if id(a) not in known])
        chex.assert_trees_all_equal_shapes_and_dtypes(new_state, args[0])
        self.assertEqual(args[1]["image"].shape, (2048, 512, 512, 1))
        self.assertEqual({leaf.shape for leaf in jax.tree.leaves(sums)}, {()})


class TrainStepTest(steps.StepTest):
    def test_the_initial_state_depends_on_the_seed_alone(self):
        config, dropped = steps.resnet_config(), steps.layers_config()
        chex.assert_trees_all_equal(steps.initialise(config), steps.initialise(dropped))
        config.seed = 1
        states = [steps.initialise(each) for each in (config, dropped)]
        kernels = [state.params["head"]["kernel"] for state in states]
        self.assertGreater(float(jnp.abs(kernels[0] - kernels[1]).max()), 0)

    def test_the_initial_state_does_not_depend_on_how_it_is_trained(self):
        config, other = (
            steps.vit_config(),
            steps.with_plain_sgd(steps.vit_config("lean", dropout=0.2)),
        )
        other.dtype, other.mixup, other.accumulate_steps = "bfloat16", 0.2, 2
        other.optimizer.clip_norm = 1.0
        chex.assert_trees_all_equal(steps.initialise(config), steps.initialise(other))

    def test_at_rate_zero_it_is_the_flax_models_step(self):
        results = []
        for config in (
            steps.layers_config(rate=0.0, value_dtype=None),
            steps.resnet_config(),
        ):
            results.append(
                steps.train_step(config)(
                    steps.initial_state(config), steps.batch(config)
                )
            )
        chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-6)

    def test_dropping_changes_the_kernels_that_drop_and_nothing_else(self):
        states = []
        for config in (steps.layers_config(), steps.resnet_config()):
            states.append(
                steps.train_step(config)(
                    steps.initial_state(config), steps.batch(config)
                )
            )
        (dropped, sums), (plain, expected) = states
        chex.assert_trees_all_close(
            (dropped.batch_stats, sums),
            (plain.batch_stats, expected),
            rtol=1e-5,
            atol=1e-6,
        )
        changed = steps.changed_paths(dropped.params, plain.params)
        first, second = "stage1_block1", "stage2_block1"
        expected = {
            *(f"{block}/conv{n}/kernel" for block in (first, second) for n in (1, 2)),
            *(f"{second}/shortcut_conv/kernel", "head/kernel"),
        }
        self.assertEqual(changed, expected)  # and not that of the stem

    def test_counts_its_steps_and_returns_the_sums_before_the_update(self):
        config = steps.resnet_config()
        config.normalise = "unit"
        state, batch = steps.moved_state(config), steps.batch(config)
        new_state, sums = steps.train_step(config)(state, batch)
        self.assertEqual(new_state.step, 1)
        expected = references.sums(references.logits(config, state, batch, True), batch)
        chex.assert_trees_all_close(sums, expected, rtol=1e-4)
        self.assertBetween(sums.correct_top5, sums.correct, 16)

    def test_learns_a_batch_by_heart(self):
        config = steps.layers_config()
        step = steps.train_step(config)
        state, batch, losses = steps.initial_state(config), steps.batch(config), []
        for _ in range(100):
            state, sums = step(state, batch)
            losses.append(float(sums.loss / sums.count))
        self.assertGreater(losses[0], 2.0)
        self.assertLess(losses[-1], 0.1)
        self.assertEqual((sums.correct, sums.correct_top5, sums.count), (16, 16, 16))

    def test_gradients_are_those_of_the_mean_loss(self):
        config = steps.with_plain_sgd(steps.vit_config())
        config.label_smoothing = 0.1
        state, batch = steps.moved_state(config), steps.batch(config)
        new_state, sums = steps.train_step(config)(state, batch)
        gradients, loss, _ = references.by_hand(
            config, state.params, {}, batch, steps.next_key(state)
        )
        expected = jax.tree.map(np.subtract, state.params, gradients)
        chex.assert_trees_all_close(new_state.params, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(sums.loss / 16, loss, rtol=1e-5)
        logits = references.logits(config, state, batch, True)
        np.testing.assert_allclose(
            sums.loss,
            references.losses(logits, batch["label"], 0.1).sum(),
            rtol=1e-5,
        )
        # Without batch norm, parts are as one.
        config.accumulate_steps = 16
        split, found = steps.train_step(config)(state, batch)
        chex.assert_trees_all_close(split, new_state, rtol=1e-5, atol=2e-6)
        chex.assert_trees_all_close(found, sums, rtol=1e-5)
        self.assertEqual(
            (found.correct, found.correct_top5, found.count),
            (sums.correct, sums.correct_top5, sums.count),
        )

    def test_can_be_given_its_state_again_and_again(self):
        config = steps.vit_config(scan=True)
        config.ema_decay = 0.9
        step = jax.jit(step_lib.train_step(config), donate_argnums=0)
        state, batch = step_lib.initialise(config), steps.batch(config)
        for number in range(3):
            old, (state, _) = state, step(state, batch)
            self.assertEqual(state.step, number + 1)
            self.assertTrue(all(leaf.is_deleted() for leaf in jax.tree.leaves(old)))
        for leaf in jax.tree.leaves(state):
            self.assertFalse(np.isnan(leaf).any())


if __name__ == "__main__":
    absltest.main()
