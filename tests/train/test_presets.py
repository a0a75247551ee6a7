import tempfile
from pathlib import Path

from absl.testing import absltest, parameterized

from configs import digits_resnet18
from train import loop
from train.terminal import Terminal

# Of how many last epochs the accuracy is taken: one alone is off by some of the 360
# test images.
_LAST = 3


class PresetsTest(parameterized.TestCase):
    def test_they_train_the_digits_to_within_a_point_of_the_baseline(self):
        accuracy = {
            (memory, remat): self._accuracy(memory, remat)
            for memory, remat in (
                ("baseline", "none"),
                ("dropit", "none"),
                ("lean", "none"),
                ("lean", "blocks"),
            )
        }
        baseline = accuracy["baseline", "none"]
        self.assertGreater(baseline, 0.95)
        for name, reached in accuracy.items():
            self.assertGreaterEqual(reached, baseline - 0.01, name)

    def _accuracy(self, memory, remat):
        config = digits_resnet18.get_config()
        config.image_size = 8  # in which scikit-learn has them
        config.memory, config.remat = memory, remat
        directory = Path(self.enterContext(tempfile.TemporaryDirectory()))
        rows = loop.run(config, directory, Terminal())
        return sum(row["test_accuracy"] for row in rows[-_LAST:]) / _LAST


if __name__ == "__main__":
    absltest.main()
