import csv
import tempfile
from pathlib import Path

from absl.testing import absltest, parameterized

from tests.train import commands

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
        workdir = Path(self.enterContext(tempfile.TemporaryDirectory()))
        # In a process of its own, compiled as for users.
        status, _, errors = commands.run(
            "train.main",
            "--config=configs/digits_resnet18.py",
            "--config.image_size=8",  # in which scikit-learn has them
            f"--config.memory={memory}",
            f"--config.remat={remat}",
            f"--workdir={workdir}",
        )
        self.assertEqual((status, errors), (0, ""))
        with (workdir / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        reached = [float(row["test_accuracy"]) for row in rows if row["test_accuracy"]]
        return sum(reached[-_LAST:]) / _LAST


if __name__ == "__main__":
    absltest.main()
