import math

import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from configs import digits_resnet18
from train import optim

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


class OptimizerTest(parameterized.TestCase):
    @parameterized.product(nesterov=(False, True), weight_decay=(0.0, 0.1))
    def test_is_sgd_as_written_out(self, nesterov, weight_decay):
        config = _config()
        config.optimizer.nesterov = nesterov
        config.optimizer.weight_decay = weight_decay
        optimizer = optim.optimizer(config, lambda step: 0.1 / (1 + step))
        rng = np.random.default_rng(0)
        shapes = {"kernel": (3, 2), "bias": (2,), "scale": (2,)}
        expected = {name: rng.normal(size=shape) for name, shape in shapes.items()}
        params = {name: jnp.asarray(value) for name, value in expected.items()}
        trace = {name: np.zeros(shape) for name, shape in shapes.items()}
        state = optimizer.init(params)
        for step in range(4):
            gradients = {name: rng.normal(size=shape) for name, shape in shapes.items()}
            updates, state = optimizer.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            for name, gradient in gradients.items():
                decay = weight_decay if name == "kernel" else 0.0
                decayed = gradient + decay * expected[name]
                trace[name] = decayed + 0.9 * trace[name]
                change = decayed + 0.9 * trace[name] if nesterov else trace[name]
                expected[name] = expected[name] - 0.1 / (1 + step) * change
        for name, value in expected.items():
            np.testing.assert_allclose(params[name], value, rtol=1e-4, atol=1e-6)


if __name__ == "__main__":
    absltest.main()
