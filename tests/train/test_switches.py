import os
import subprocess
import sys
import tempfile
from pathlib import Path

from absl.testing import absltest

from tests import xla_flags
from tests.train import commands


class SwitchesTest(absltest.TestCase):
    def test_training_runs_under_switches_of_jax(self):
        """In a process of its own: JAX reads them when it is imported."""
        workdir = self.enterContext(tempfile.TemporaryDirectory())
        switches = {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUMPY_DTYPE_PROMOTION": "strict",
            "JAX_NUMPY_RANK_PROMOTION": "raise",
            "JAX_TRANSFER_GUARD": "disallow",
            "XLA_FLAGS": xla_flags.devices(1),  # of eight, compiling takes longer
        }
        result = subprocess.run(
            [
                sys.executable,
                "-m",
                "train.main",
                "--config=configs/digits_vit.py",
                "--config.num_epochs=1",
                "--config.batch_size=360",
                "--config.memory=lean",
                "--config.layers=dropit",
                f"--workdir={workdir}",
            ],
            capture_output=True,
            text=True,
            check=False,
            cwd=commands.ROOT,
            env=os.environ | switches,
        )
        said = "JAX_NUMPY_DTYPE_PROMOTION is taken as 'standard'.\n"
        self.assertEqual((result.returncode, result.stderr), (0, said))
        (row,) = commands.metrics(Path(workdir))
        self.assertLess(row["train_loss"], 3)


if __name__ == "__main__":
    absltest.main()
