import statistics
import tempfile
from pathlib import Path

from absl.testing import absltest, parameterized

from tests.train import commands
from train.runs import records

# An evaluation alone is off by a few of the 360 test images: the mean is taken over the
# last of them, after each of the epochs from 6 to 10.
_LAST = 5
_WAYS = {
    "baseline": ("--config.memory=baseline",),
    "dropit": ("--config.memory=dropit",),
    "lean": ("--config.memory=lean",),
    "layers": ("--config.memory=baseline", "--config.layers=dropit"),
}


class PresetsTest(parameterized.TestCase):
    def test_they_train_the_digits_to_within_a_point_of_the_baseline(self):
        accuracy = {name: self._reached(way) for name, way in _WAYS.items()}
        baseline = accuracy["baseline"]
        self.assertGreater(baseline, 0.95)
        for name, reached in accuracy.items():
            self.assertGreaterEqual(reached, baseline - 0.01, name)

    def _reached(self, way):
        workdir = Path(self.enterContext(tempfile.TemporaryDirectory()))
        # In a process of its own, compiled as for users.
        status, _, errors = commands.run(
            "train.main",
            "--config=configs/digits_resnet18.py",
            "--config.image_size=8",  # in which scikit-learn has them
            "--config.model.width=8",
            "--config.evaluate_every=1",
            *way,
            f"--workdir={workdir}",
            small=True,
        )
        self.assertEqual((status, errors), (0, ""))
        rows = records.read(workdir / "metrics.csv")
        return statistics.mean(row["test_accuracy"] for row in rows[-_LAST:])


if __name__ == "__main__":
    absltest.main()
