import tempfile
from pathlib import Path

from absl.testing import absltest, parameterized

from benchmarks.printing import scaling_plots, styles
from benchmarks.workloads import sweeps
from benchmarks.workloads.variants import TIMED_VARIANTS
from tests.benchmarks import examples


class PlotsTest(parameterized.TestCase):
    def test_a_sweep_is_drawn_into_a_png(self):
        points = examples.points(examples.SWEEP, lambda n: 2e-3 * n, lambda n: 1e-3 * n)
        lines = sweeps.fits(examples.SWEEP, points)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "scaling_depth.png")
            scaling_plots.draw(examples.SWEEP, points, lines, path)
            self.assertStartsWith(path.read_bytes(), b"\x89PNG")

    def test_devices_are_drawn_into_a_png(self):
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "scaling_devices.png")
            scaling_plots.draw_devices(examples.on_devices(), path)
            self.assertStartsWith(path.read_bytes(), b"\x89PNG")

    def test_every_variant_has_a_colour_of_its_own(self):
        self.assertContainsSubset(TIMED_VARIANTS, styles.COLOURS)
        self.assertContainsSubset(TIMED_VARIANTS, styles.MARKERS)
        self.assertLen(set(styles.COLOURS.values()), len(styles.COLOURS))


if __name__ == "__main__":
    absltest.main()
