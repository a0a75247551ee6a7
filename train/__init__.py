"""The training program: data, models, step, loop, checkpoints and reports."""

import os
import sys

if sys.argv[:1] == ["-m"]:
    # A command of this package starts, and imports take seconds.
    from train.processes import interrupts

    interrupts.install_exit_handlers()
    # XLA's own log is set up when JAX is imported. What it fails at it raises as well.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
