import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from configs import digits_resnet18
from train.config.config import model_section
from train.engine import optim
from train.engine import step as step_lib

_PER_EPOCH, _TOTAL = 10, 100


def _config(**schedule):
    config = digits_resnet18.get_config()
    config.optimizer.learning_rate = 0.4
    with config.unlocked():
        config.schedule.update(schedule)
    return config


class ScheduleTest(parameterized.TestCase):
    @parameterized.parameters(0.0, 0.5, 2.0)
    def test_cosine(self, warmup_epochs):
        config = _config(name="cosine", warmup_epochs=warmup_epochs)
        rate = optim.schedule(config, _PER_EPOCH, _TOTAL)
        warm = round(warmup_epochs * _PER_EPOCH)
        for step in range(_TOTAL):
            share = (step - warm) / (_TOTAL - warm)
            expected = (
                0.4 * step / warm
                if step < warm
                else 0.4 * 0.5 * (1 + math.cos(math.pi * share))
            )
            self.assertAlmostEqual(float(rate(step)), expected, places=6)

    def test_steps(self):
        config = _config(
            name="step", warmup_epochs=1.0, decay_epochs=(3, 6), decay_factor=0.2
        )
        rate = optim.schedule(config, _PER_EPOCH, _TOTAL)
        for step in range(_TOTAL):
            expected = 0.4 * (step / 10 if step < 10 else 1)
            expected *= 0.2 if step >= 30 else 1
            expected *= 0.2 if step >= 60 else 1
            self.assertAlmostEqual(float(rate(step)), expected, places=6, msg=str(step))

    def test_two_steps_of_the_schedule_at_one_step_are_two(self):
        config = _config(
            name="step", warmup_epochs=0.0, decay_epochs=(3.0, 3.01), decay_factor=0.2
        )
        rate = optim.schedule(config, _PER_EPOCH, _TOTAL)
        self.assertAlmostEqual(float(rate(29)), 0.4, places=6)
        self.assertAlmostEqual(float(rate(30)), 0.4 * 0.04, places=6)


_SHAPES = {"kernel": (3, 2), "bias": (2,), "scale": (2,)}


def _normal(rng, scale=1.0):
    return {
        name: np.float32(rng.normal(0, scale, shape)) for name, shape in _SHAPES.items()
    }


def _norm(tree):
    return math.sqrt(sum(np.sum(np.float64(a) ** 2) for a in jax.tree.leaves(tree)))


class OptimizerTest(parameterized.TestCase):
    @parameterized.product(
        nesterov=(False, True), weight_decay=(0.0, 0.1), clip_norm=(0.0, 2.0)
    )
    def test_is_sgd_as_written_out(self, nesterov, weight_decay, clip_norm):
        config = _config()
        config.optimizer.nesterov = nesterov
        config.optimizer.weight_decay = weight_decay
        config.optimizer.clip_norm = clip_norm
        optimizer = optim.optimizer(config, lambda step: 0.1 / (1 + step))
        rng = np.random.default_rng(0)
        expected = {name: rng.normal(size=shape) for name, shape in _SHAPES.items()}
        params = {name: jnp.asarray(value) for name, value in expected.items()}
        trace = {name: np.zeros(shape) for name, shape in _SHAPES.items()}
        state = optimizer.init(params)
        clipped = 0
        for step in range(4):
            gradients = _normal(rng, scale=(0.3, 1.0, 3.0, 0.1)[step])
            updates, state = optimizer.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            norm = _norm(gradients)
            factor = clip_norm / norm if 0 < clip_norm < norm else 1.0
            clipped += factor < 1
            for name, gradient in gradients.items():
                decay = weight_decay if name == "kernel" else 0.0
                decayed = factor * gradient + decay * expected[name]
                trace[name] = decayed + 0.9 * trace[name]
                change = decayed + 0.9 * trace[name] if nesterov else trace[name]
                expected[name] = expected[name] - 0.1 / (1 + step) * change
        for name, value in expected.items():
            np.testing.assert_allclose(params[name], value, rtol=1e-4, atol=1e-6)
        self.assertEqual(clipped, 2 if clip_norm else 0)  # some are, and some are not


class ClipTest(parameterized.TestCase):
    def _updates(self, gradients, clip_norm):
        config = _config()
        config.optimizer.update(momentum=0.0, weight_decay=0.0, clip_norm=clip_norm)
        optimizer = optim.optimizer(config, lambda step: 1.0)
        return optimizer.update(gradients, optimizer.init(gradients), gradients)[0]

    @parameterized.product(scale=(1e-3, 1.0, 1e6), clip_norm=(1e-3, 1.0, 5.0))
    def test_bounds_the_norm_of_all_together(self, scale, clip_norm):
        gradients = _normal(np.random.default_rng(0), scale)
        updates = self._updates(gradients, clip_norm)
        self.assertLessEqual(_norm(updates), clip_norm * (1 + 1e-5))
        factor = min(1.0, clip_norm / _norm(gradients))
        expected = {name: -factor * each for name, each in gradients.items()}
        chex.assert_trees_all_close(updates, expected, rtol=1e-5)

    def test_above_the_norm_it_is_as_if_there_were_none(self):
        gradients = _normal(np.random.default_rng(0))
        expected = {name: -each for name, each in gradients.items()}
        chex.assert_trees_all_equal(self._updates(gradients, 0.0), expected)
        chex.assert_trees_all_equal(self._updates(gradients, 1e9), expected)

    def test_of_nothing_is_nothing(self):
        gradients = {name: jnp.zeros(shape) for name, shape in _SHAPES.items()}
        chex.assert_trees_all_close(self._updates(gradients, 1.0), gradients)


_MODELS = {
    "resnet": model_section("resnet18", width=4, stem="cifar"),
    "vit": model_section("vit_mu", patch_size=4),
    "vit_scanned": model_section("vit_mu", patch_size=4, pool="gap", scan=True),
}


class WeightDecayTest(parameterized.TestCase):
    @parameterized.parameters(*_MODELS)
    def test_is_of_kernels_alone(self, model):
        config = _config()
        config.image_size, config.model = 8, _MODELS[model]
        config.optimizer.update(momentum=0.0, weight_decay=0.25, clip_norm=1.0)
        shapes = step_lib.abstract_state(config).params
        params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
        zeros = jax.tree.map(np.zeros_like, params)
        optimizer = optim.optimizer(config, lambda step: 1.0)
        updates, _ = jax.jit(
            lambda: optimizer.update(zeros, optimizer.init(params), params)
        )()
        found = {}
        for path, update in jax.tree_util.tree_flatten_with_path(updates)[0]:
            (change,) = np.unique(update)
            found.setdefault(path[-1].key, set()).add(float(change))
        names = {"kernel", "bias", "scale"}
        if model.startswith("vit"):
            names |= {"pos_embedding", "cls"}
        if config.model.get("pool") == "gap":
            names -= {"cls"}  # the mean of the patches stands for it
        expected = {name: {-0.25 if name == "kernel" else 0.0} for name in names}
        self.assertEqual(found, expected)

    def test_of_blocks_that_are_scanned_biases_have_two_axes(self):
        # Otherwise the number of axes would tell kernels from all else.
        config = _config()
        config.image_size, config.model = 8, _MODELS["vit_scanned"]
        flat = jax.tree_util.tree_flatten_with_path(
            step_lib.abstract_state(config).params
        )[0]
        axes = {leaf.ndim for path, leaf in flat if path[-1].key == "bias"}
        self.assertIn(2, axes)

    def test_takes_from_parameters_what_is_said(self):
        config = _config()
        config.optimizer.update(momentum=0.0, weight_decay=0.25)
        optimizer = optim.optimizer(config, lambda step: 0.5)
        params = {"a": _normal(np.random.default_rng(0))}
        zeros = jax.tree.map(np.zeros_like, params)
        updates, _ = optimizer.update(zeros, optimizer.init(params), params)
        np.testing.assert_array_equal(
            updates["a"]["kernel"], -0.125 * params["a"]["kernel"]
        )


if __name__ == "__main__":
    absltest.main()
