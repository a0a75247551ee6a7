import chex
import jax
import numpy as np
from absl.testing import absltest, parameterized

from tests.train.engine.step import references, steps


class AccumulationTest(steps.StepTest):
    @parameterized.named_parameters(
        ("resnet", steps.resnet_config, {}),
        # What is dropped is random, by DropIT and by dropout, and other in every part.
        (
            "vit_random",
            steps.vit_config,
            {
                "layers": "dropit",
                "dropit": {"strategy": "random", "granularity": "channel"},
                "dropout": 0.2,
            },
        ),
    )
    def test_is_done_part_by_part(self, config, kwargs):
        config = steps.with_plain_sgd(config(**kwargs))
        config.accumulate_steps = parts = 2
        state, batch = steps.moved_state(config), steps.batch(config)
        new_state, sums = steps.train_step(config)(state, batch)
        total, losses, batch_stats = None, [], state.batch_stats
        for part in range(parts):
            examples = {name: array[part::parts] for name, array in batch.items()}
            key = jax.random.fold_in(steps.next_key(state), part)
            gradients, loss, batch_stats = references.by_hand(
                config, state.params, batch_stats, examples, key
            )
            losses.append(float(loss))
            total = gradients if part == 0 else jax.tree.map(np.add, total, gradients)
        expected = jax.tree.map(
            lambda p, g: np.asarray(p) - np.asarray(g) / parts, state.params, total
        )
        chex.assert_trees_all_close(new_state.params, expected, rtol=1e-4, atol=5e-5)
        chex.assert_trees_all_close(
            new_state.batch_stats, batch_stats, rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(sums.loss, sum(losses) * 16 / parts, rtol=1e-5)
        self.assertEqual(sums.count, 16)
        self.assertEqual(new_state.step, 1)

    def test_batch_norm_normalises_parts_by_themselves(self):
        config = steps.resnet_config()
        state, batch = steps.moved_state(config), steps.batch(config)
        whole, sums = steps.train_step(config)(state, batch)
        # Sums and statistics are those before the update, whatever that is.
        steps.with_plain_sgd(config).accumulate_steps = 2
        split, found = steps.train_step(config)(state, batch)
        # The statistics of the stem, whose inputs do not depend on other statistics.
        old, one, two = (
            np.asarray(each.batch_stats["stem_norm"]["mean"], np.float64)
            for each in (state, whole, split)
        )
        # Parts are of one size, so that the mean of the whole batch is the mean of
        # theirs: m0, m1. Running means are 0.9 old + 0.1 (m0 + m1) / 2 for one step,
        # and 0.81 old + 0.09 m0 + 0.1 m1 for two.
        halves = [
            {name: array[part::2] for name, array in batch.items()} for part in (0, 1)
        ]
        means = [_stem_mean(config, state, half) for half in halves]
        np.testing.assert_allclose(one, 0.9 * old + 0.05 * sum(means), atol=1e-5)
        np.testing.assert_allclose(
            two, 0.81 * old + 0.09 * means[0] + 0.1 * means[1], atol=1e-5
        )
        self.assertTrue(steps.differ(whole.batch_stats, split.batch_stats))
        self.assertNotAlmostEqual(float(sums.loss), float(found.loss), places=3)


def _stem_mean(config, state, batch):
    """Returns the mean of the first convolution's output, for each channel."""
    outputs = jax.lax.conv_general_dilated(
        references.normalised(batch, config),
        state.params["stem_conv"]["kernel"],
        (1, 1),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return np.float64(outputs).mean(axis=(0, 1, 2))


if __name__ == "__main__":
    absltest.main()
