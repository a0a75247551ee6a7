import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from configs import digits_resnet18
from train import data
from train import step as step_lib


def _config(memory="dropit", **dropit):
    config = digits_resnet18.get_config()
    config.memory = memory
    config.image_size, config.model.width, config.batch_size = 8, 4, 16
    config.schedule.warmup_epochs = 0.0  # the first step is one already
    config.dropit.update(dropit)
    return config


def _batch(config):
    dataset = data.load(config.dataset, config.data_dir, config.image_size)
    return next(data.training_batches(dataset, config.batch_size, config.seed))


_state = step_lib.initialise


class AbstractTest(parameterized.TestCase):
    def test_describes_the_real_arguments(self):
        config = _config()
        _, (state, batch) = step_lib.abstract(config)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, _state(config))
        chex.assert_trees_all_equal_shapes_and_dtypes(batch, _batch(config))

    def test_allocates_nothing(self):
        config = digits_resnet18.get_config()
        config.batch_size, config.image_size, config.model.width = 1024, 512, 512
        before = jax.live_arrays()  # and none of them goes meanwhile
        step, args = step_lib.abstract(config)
        new_state, _ = jax.eval_shape(step, *args)
        known = set(map(id, before))
        self.assertEmpty([a.shape for a in jax.live_arrays() if id(a) not in known])
        chex.assert_trees_all_equal_shapes_and_dtypes(new_state, args[0])


class TrainStepTest(parameterized.TestCase):
    def test_the_initial_state_depends_on_the_seed_alone(self):
        config, dropped = _config(), _config("baseline")
        chex.assert_trees_all_equal(_state(config), _state(dropped))
        config.seed = 1
        kernels = [_state(c).params["head"]["kernel"] for c in (config, dropped)]
        self.assertGreater(float(jnp.abs(kernels[0] - kernels[1]).max()), 0)

    def test_at_rate_zero_it_is_the_flax_models_step(self):
        results = []
        for config in (_config(rate=0.0, value_dtype=None), _config("baseline")):
            step = jax.jit(step_lib.train_step(config))
            results.append(step(_state(config), _batch(config)))
        chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-6)

    def test_dropping_changes_the_kernels_that_drop_and_nothing_else(self):
        states = []
        for config in (_config(rate=0.875), _config("baseline")):
            step = jax.jit(step_lib.train_step(config))
            states.append(step(_state(config), _batch(config))[0])
        dropped, plain = states
        chex.assert_trees_all_close(
            dropped.batch_stats, plain.batch_stats, rtol=1e-5, atol=1e-6
        )
        differs = jax.tree.map(
            lambda a, b: not np.allclose(a, b, rtol=1e-4, atol=1e-5),
            dropped.params,
            plain.params,
        )
        flat = jax.tree_util.tree_flatten_with_path(differs)[0]
        changed = {
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, yes in flat
            if yes
        }
        self.assertNotEmpty(changed)
        self.assertNotIn("stem_conv/kernel", changed)
        self.assertTrue(all(name.endswith("/kernel") for name in changed), changed)

    def test_counts_its_steps_and_returns_the_sums_before_the_update(self):
        config = _config()
        state, batch = _state(config), _batch(config)
        new_state, sums = jax.jit(step_lib.train_step(config))(state, batch)
        self.assertEqual(new_state.step, 1)
        model = step_lib.create_model(config)
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        logits, _ = model.apply(
            variables, batch["image"], True, mutable=["batch_stats"]
        )
        expected = _numpy_sums(np.asarray(logits), batch)
        chex.assert_trees_all_close(sums, expected, rtol=1e-4)

    def test_learns_a_batch_by_heart(self):
        config = _config()
        config.optimizer.learning_rate = 0.05
        step = jax.jit(step_lib.train_step(config), donate_argnums=0)
        state, batch, losses = _state(config), _batch(config), []
        for _ in range(40):
            state, sums = step(state, batch)
            losses.append(float(sums.loss / sums.count))
        self.assertGreater(losses[0], 2.0)
        self.assertLess(losses[-1], 0.1)


class EvaluationStepTest(parameterized.TestCase):
    def test_padding_does_not_count(self):
        config = _config()
        state, batch = _state(config), _batch(config)
        batch["mask"] = np.float32(np.arange(16) < 11)
        batch["image"][11:] = 1e3
        sums = jax.jit(step_lib.evaluation_step(config))(state, batch)
        model = step_lib.create_model(config)
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        logits = np.asarray(model.apply(variables, batch["image"], False))
        chex.assert_trees_all_close(sums, _numpy_sums(logits, batch), rtol=1e-4)
        self.assertEqual(sums.count, 11)


def _numpy_sums(logits, batch):
    logits = logits.astype(np.float64)
    top = logits.max(axis=-1, keepdims=True)
    log_z = np.log(np.exp(logits - top).sum(axis=-1)) + top[:, 0]
    rows = np.arange(len(logits))
    losses = log_z - logits[rows, batch["label"]]
    correct = logits.argmax(axis=-1) == batch["label"]
    real = batch["mask"] > 0
    return step_lib.Sums(
        loss=np.float32(losses[real].sum()),
        correct=np.float32(correct[real].sum()),
        count=np.float32(real.sum()),
    )


if __name__ == "__main__":
    absltest.main()
