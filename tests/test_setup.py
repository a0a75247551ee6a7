"""`make setup` where there is no wheel of the GPU compiler, as on macOS."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from absl.testing import absltest

_ROOT = Path(__file__).parents[1]


class SetupTest(absltest.TestCase):
    def test_without_a_wheel_of_the_compiler_it_says_so_and_goes_on(self):
        venv = Path(self.enterContext(tempfile.TemporaryDirectory()))
        # An environment that is set up but for the compiler.
        (venv / "bin").mkdir()
        python = venv / "bin" / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
        (venv / "installed-cpu").touch()
        index = venv / "index"
        index.mkdir()
        # The tests may be run by make, whose settings are not this one's.
        own = {n: v for n, v in os.environ.items() if not n.startswith(("MAKE", "MFL"))}
        done = subprocess.run(
            ["make", "setup", f"VENV={venv}"],
            cwd=_ROOT,
            env=own
            | {
                "PIP_CONFIG_FILE": os.devnull,
                "PIP_NO_INDEX": "1",
                "PIP_FIND_LINKS": str(index),
            },
            capture_output=True,
            check=False,
            text=True,
        )
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        (line,) = done.stdout.splitlines()
        self.assertIn("GPU compiler, which is for Linux, could not be installed", line)
        log = venv / "gpu-compiler.log"
        self.assertIn(f"({log} says why)", line)
        self.assertIn("jax-cuda12-plugin", log.read_text())
        self.assertFalse((venv / "gpu-compiler" / "installed").exists())


if __name__ == "__main__":
    absltest.main()
