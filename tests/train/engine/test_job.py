"""What is refused before anything is read."""

import chex
import jax
import pytest
from absl.testing import absltest, parameterized

from configs import digits_resnet18, digits_vit
from train.config.config import ConfigError, dropit_section
from train.engine import job
from train.engine import step as step_lib


def _with_mean(config):
    config.memory, config.layers = "baseline", "dropit"
    config.dropit = dropit_section(rate=0.75, fill="mean")


class CheckTest(parameterized.TestCase):
    @parameterized.parameters(digits_resnet18, digits_vit)
    def test_a_mean_suits_the_models(self, file):
        config = file.get_config()
        _with_mean(config)
        job.check(config)
        # What was checked is a step of it.
        step, (state, batch) = step_lib.abstract(config)
        new, _ = jax.eval_shape(step, state, batch)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)

    def test_a_layer_of_too_few_positions_for_a_mean_is_told(self):
        config = digits_resnet18.get_config()
        config.image_size, config.model.width = 8, 4
        job.check(config)
        _with_mean(config)
        # From the third stage on there are 2x2 positions.
        with pytest.raises(
            ConfigError, match=r"config.dropit: .*\(64, 2, 2, 16\) has 4"
        ):
            job.check(config)


if __name__ == "__main__":
    absltest.main()
