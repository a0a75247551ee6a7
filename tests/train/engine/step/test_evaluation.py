import chex
import jax
import numpy as np
from absl.testing import absltest, parameterized

from tests.train.engine.step import references, steps


class EvaluationStepTest(steps.StepTest):
    @parameterized.parameters(
        (steps.resnet_config, "dataset"), (steps.vit_config, "unit")
    )
    def test_padding_does_not_count(self, config, normalise):
        config = config()
        config.normalise = normalise
        state, batch = steps.moved_state(config), steps.batch(config)
        batch["mask"] = np.float32(np.arange(16) < 11)
        batch["image"][11:] = 255
        sums = steps.evaluation_step(config)(state, batch)
        expected = references.sums(
            references.logits(config, state, batch, False), batch
        )
        chex.assert_trees_all_close(sums, expected, rtol=1e-4)
        self.assertEqual(sums.count, 11)

    def test_is_of_the_labels_and_images_as_they_are(self):
        config = steps.vit_config(dropout=0.5, drop_path=0.5)
        config.label_smoothing, config.mixup, config.accumulate_steps = 0.5, 0.8, 2
        state, batch = steps.moved_state(config), steps.batch(config)
        sums = steps.evaluation_step(config)(state, batch)
        expected = references.sums(
            references.logits(config, state, batch, False), batch
        )
        chex.assert_trees_all_close(sums, expected, rtol=1e-4)

    def test_nothing_but_padding_is_nothing(self):
        config = steps.vit_config()
        batch = steps.batch(config)
        batch["mask"][:] = 0
        step = steps.evaluation_step(config)
        sums = step(steps.initial_state(config), batch)
        self.assertEqual({float(leaf) for leaf in jax.tree.leaves(sums)}, {0.0})


if __name__ == "__main__":
    absltest.main()
