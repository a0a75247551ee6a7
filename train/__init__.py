"""The training program: data, models, step, loop, checkpoints and reports."""

import sys

if sys.argv[:1] == ["-m"]:
    # A command of this package starts, and imports take seconds.
    from train import interrupts

    interrupts.end_in_one_line()
