import dataclasses
from unittest import mock

from absl.testing import absltest, parameterized

from benchmarks.workloads import sweeps
from tests.benchmarks import examples

_VARIANTS = ("flax", "dropit_16")


class SweepTest(parameterized.TestCase):
    def test_every_variant_is_timed_at_every_value(self):
        def interleaved(functions, rounds):
            self.assertEqual(rounds, 3)
            params, _ = functions["dropit_16, 2"]()
            self.assertIn("hidden2", params["params"])
            plain = {"flax, 1": [1.0, 9.0, 2.0], "flax, 2": [3.0, 3.0, 3.0]}
            return {name: plain.get(name, [5.0, 10.0, 5.0]) for name in functions}

        sweep = dataclasses.replace(examples.SWEEP, values=(1, 2))
        with (
            mock.patch.object(sweeps, "VARIANTS", _VARIANTS),
            mock.patch.object(sweeps.timing, "interleaved", interleaved),
        ):
            points = sweeps.measure(sweep, 3)
        # Of 4 samples and 32 features, what enters each layer but the first, and the
        # head. What is added is 4, 1, 3 and 2, 7, 2.
        self.assertEqual(
            [
                (p.value, p.variant, p.median_s, p.elements, p.added_s.median)
                for p in points
            ],
            [
                (1, "flax", 2, 0, 0),
                (1, "dropit_16", 5, 128, 3),
                (2, "flax", 3, 0, 0),
                (2, "dropit_16", 5, 256, 2),
            ],
        )

    def test_lines_of_points_on_a_line(self):
        sweep = dataclasses.replace(examples.SWEEP, axis="width²", cost=lambda n: n**2)
        points = examples.points(sweep, lambda n: 3 + 2 * n**2, lambda n: 1 + 5 * n)
        lines = sweeps.fits(sweep, points)
        self.assertEqual(
            [(line.of, line.variant, line.against) for line in lines],
            [
                *(("step", variant, "width²") for variant in sweeps.VARIANTS),
                ("added", "dropit_16", "elements"),
                ("added", "lean", "elements"),
            ],
        )
        for line in lines:
            slope, intercept = (2, 3) if line.of == "step" else (0.5, 1)
            self.assertAlmostEqual(line.slope, slope)
            self.assertAlmostEqual(line.intercept, intercept)
            self.assertAlmostEqual(line.r_squared, 1)
            self.assertAlmostEqual(line.largest_deviation, 0)

    def test_a_cliff_is_off_the_line(self):
        points = examples.points(
            examples.SWEEP, lambda n: 6 if n == 3 else 0, lambda n: 0
        )
        lines = sweeps.fits(examples.SWEEP, points)
        # Through 0, 0, 6 goes -4 + 3 n, which misses by 1, 2, 1.
        self.assertAlmostEqual(lines[0].slope, 3)
        self.assertAlmostEqual(lines[0].intercept, -4)
        self.assertAlmostEqual(lines[0].r_squared, 1 - 6 / 24)
        self.assertAlmostEqual(lines[0].largest_deviation, 2 / 6)
        # Nothing added anywhere is a line, and no division by zero.
        self.assertEqual((lines[3].r_squared, lines[3].largest_deviation), (1, 0))

    def test_the_sweeps_are_those_of_the_commands_help(self):
        values = {name: sweep.values for name, sweep in sweeps.SWEEPS.items()}
        sizes = (8, 16, 32, 64)
        self.assertEqual(
            values, {"batch": sizes, "width": sizes, "depth": (2, 4, 8, 16)}
        )
        self.assertEqual(sweeps.SWEEPS["batch"].make(64).batch, 64)
        self.assertEqual(sweeps.SWEEPS["width"].cost(64), 4096)


if __name__ == "__main__":
    absltest.main()
