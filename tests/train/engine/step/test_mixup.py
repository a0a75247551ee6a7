import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from tests.train.engine.step import references, steps


class MixupTest(steps.StepTest):
    def test_mixes_images_and_labels_with_one_weight(self):
        config = steps.vit_config()
        config.mixup, config.label_smoothing = 0.8, 0.1
        for step in (0, 3):
            self._check_mixed(config, step)

    def _check_mixed(self, config, step):
        state, batch = steps.moved_state(config), steps.batch(config)
        state = state.replace(step=jnp.int32(step))
        _, sums = steps.train_step(config)(state, batch)
        key = jax.random.split(steps.next_key(state), 3)[2]
        weight = float(jax.random.beta(key, 0.8, 0.8))
        weight = max(weight, 1 - weight)
        self.assertBetween(weight, 0.5, 0.99)  # so that something is mixed
        images = references.normalised(batch, config)
        mixed = np.float32(weight * images + (1 - weight) * images[::-1])
        model = steps.model(steps.vit_config())
        logits = np.asarray(model(state.params, state.batch_stats, mixed, True))
        losses = [
            references.losses(logits, labels, 0.1)
            for labels in (batch["label"], batch["label"][::-1])
        ]
        expected = references.sums(logits, batch)  # of the first labels
        expected = expected.replace(
            loss=np.float32(np.sum(weight * losses[0] + (1 - weight) * losses[1]))
        )
        chex.assert_trees_all_close(sums, expected, rtol=1e-4)

    def test_parts_of_a_batch_are_mixed_by_themselves(self):
        config = steps.vit_config()
        config.mixup, config.accumulate_steps = 0.8, 16
        state, batch = steps.moved_state(config), steps.batch(config)
        _, sums = steps.train_step(config)(state, batch)
        # Each of the parts has one example, which is mixed with itself.
        config.mixup, config.accumulate_steps = 0.0, 1
        expected = references.sums(references.logits(config, state, batch, True), batch)
        chex.assert_trees_all_close(sums, expected, rtol=1e-4)

    def test_without_it_nothing_is_random(self):
        config = steps.vit_config()
        state, batch = steps.moved_state(config), steps.batch(config)
        others = [state.replace(rng=state.rng + n) for n in (1, 2)]
        step = steps.train_step(config)
        results = [step(other, batch) for other in others]
        found, expected = ((s.params, sums) for s, sums in results)
        chex.assert_trees_all_equal(found, expected)  # to the last bit
        logits = references.logits(config, state, batch, True)
        chex.assert_trees_all_close(
            results[0][1], references.sums(logits, batch), rtol=1e-5
        )
        config.mixup, config.label_smoothing = 0.8, 0.1
        step = steps.train_step(config)
        losses = [float(step(other, batch)[1].loss) for other in others]
        self.assertNotEqual(*losses)


if __name__ == "__main__":
    absltest.main()
