import contextlib
import dataclasses
import io
import json
import tempfile
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import colours, scaling, timing, workloads
from benchmarks.models import MLP

_VARIANTS = ("flax", "dropit_16")


def _mlp(layers):
    return dataclasses.replace(
        workloads.mlp(layers, batch=4),
        image_size=8,
        make=lambda memory: MLP(10, layers=layers, width=32, memory=memory),
    )


_SWEEP = scaling.Sweep("depth", "MLP", "layers", (1, 2, 3), _mlp, lambda n: n)


def _points(sweep, seconds, added):
    """Points at 1, 2, 3 of each variant, and 10 elements for one of that."""
    return [
        scaling.Point(
            "point",
            sweep.name,
            value,
            sweep.cost(value),
            variant,
            seconds(value),
            0 if variant == "flax" else 10 * value,
            timing.Spread(added(value), added(value) - 0.1, added(value) + 0.1),
        )
        for value in (1, 2, 3)
        for variant in scaling.VARIANTS
    ]


class SweepTest(parameterized.TestCase):
    def test_every_variant_is_timed_at_every_value(self):
        def interleaved(functions, rounds):
            self.assertEqual(rounds, 3)
            params, _ = functions["dropit_16, 2"]()
            self.assertIn("hidden2", params["params"])
            plain = {"flax, 1": [1.0, 9.0, 2.0], "flax, 2": [3.0, 3.0, 3.0]}
            return {name: plain.get(name, [5.0, 10.0, 5.0]) for name in functions}

        sweep = dataclasses.replace(_SWEEP, values=(1, 2))
        with (
            mock.patch.object(scaling, "VARIANTS", _VARIANTS),
            mock.patch.object(scaling.timing, "interleaved", interleaved),
        ):
            points = scaling.measure(sweep, 3)
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
        sweep = dataclasses.replace(_SWEEP, axis="width²", cost=lambda n: n**2)
        points = _points(sweep, lambda n: 3 + 2 * n**2, lambda n: 1 + 5 * n)
        lines = scaling.fits(sweep, points)
        self.assertEqual(
            [(line.of, line.variant, line.against) for line in lines],
            [
                *(("step", variant, "width²") for variant in scaling.VARIANTS),
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
        points = _points(_SWEEP, lambda n: 6 if n == 3 else 0, lambda n: 0)
        lines = scaling.fits(_SWEEP, points)
        # Through 0, 0, 6 goes -4 + 3 n, which misses by 1, 2, 1.
        self.assertAlmostEqual(lines[0].slope, 3)
        self.assertAlmostEqual(lines[0].intercept, -4)
        self.assertAlmostEqual(lines[0].r_squared, 1 - 6 / 24)
        self.assertAlmostEqual(lines[0].largest_deviation, 2 / 6)
        # Nothing added anywhere is a line, and no division by zero.
        self.assertEqual((lines[3].r_squared, lines[3].largest_deviation), (1, 0))

    def test_tables_and_plots(self):
        points = _points(_SWEEP, lambda n: 2e-3 * n, lambda n: 1e-3 * n)
        lines = scaling.fits(_SWEEP, points)
        text = scaling.markdown(_SWEEP, points, lines)
        self.assertIn("### depth: MLP", text)
        self.assertIn("| 3 | flax | 6.0 | 0.00 | 3.0 [-97.0, 103.0] |", text)
        self.assertIn("| step | lean | layers | 2.000 | ms, by layers |", text)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "scaling_depth.png")
            scaling.draw(_SWEEP, points, lines, path)
            self.assertStartsWith(path.read_bytes(), b"\x89PNG")

    def test_every_variant_has_a_colour_of_its_own(self):
        self.assertContainsSubset(workloads.TIMED_VARIANTS, colours.COLOURS)
        self.assertContainsSubset(workloads.TIMED_VARIANTS, colours.MARKERS)
        self.assertLen(set(colours.COLOURS.values()), len(colours.COLOURS))

    def test_the_sweeps_are_those_of_the_commands_help(self):
        values = {name: sweep.values for name, sweep in scaling.SWEEPS.items()}
        sizes = (8, 16, 32, 64)
        self.assertEqual(
            values, {"batch": sizes, "width": sizes, "depth": (2, 4, 8, 16)}
        )
        self.assertEqual(scaling.SWEEPS["batch"].make(64).batch, 64)
        self.assertEqual(scaling.SWEEPS["width"].cost(64), 4096)


class DevicesTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        with mock.patch.object(scaling, "VARIANTS", _VARIANTS):
            cls.results = scaling.measure_devices(_mlp(2), (1, 2), 2)

    def test_dropit_adds_no_collective(self):
        alone, alone_dropit, two, two_dropit = self.results
        self.assertEqual((alone.collectives, alone_dropit.collectives), ({}, {}))
        self.assertGreater(two.collectives["all-reduce"], 0)
        self.assertEqual(two.collectives, two_dropit.collectives)

    def test_a_device_caches_the_same_however_many_there_are(self):
        alone, alone_dropit, two, two_dropit = self.results
        self.assertEqual(two.cached_bytes, alone.cached_bytes)
        self.assertEqual(two_dropit.cached_bytes, alone_dropit.cached_bytes)
        self.assertLess(alone_dropit.cached_bytes, alone.cached_bytes)

    def test_bytes_are_those_of_the_shards(self):
        mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
        everywhere, shared = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

        def function(w, x):
            # On a device 4 by 6 of the product, all of w's sine, and half of a flag;
            # the zeros depend on nothing.
            return x @ w, jnp.sin(w), x[:, 0] > 0, jnp.zeros((64, 64))

        w = jax.device_put(jnp.ones((3, 6)), everywhere)
        x = jax.device_put(jnp.ones((8, 3)), shared)
        counted = scaling.bytes_a_device(function, (w, x), (everywhere, shared))
        self.assertEqual(counted, 4 * 4 * 6 + 4 * 3 * 6 + 4)
        results = jax.jit(function)(w, x)[:3]
        shards = [result.addressable_shards[0].data.nbytes for result in results]
        self.assertEqual(counted, sum(shards))

    def test_collectives_are_counted_by_kind(self):
        text = """
          %a = f32[4] all-reduce(%x), to_apply=%sum
          %b = f32[4] all-reduce-start(%y), to_apply=%sum
          %c = f32[4] all-reduce-done(%b)
          %d = f32[8] all-gather(%a), dimensions={0}
          %e = f32[8] add(%d, %d), metadata={op_name="all-gather"}
        """
        found = scaling.collectives(text)
        self.assertEqual(found, {"all-gather": 1, "all-reduce": 2})

    def test_tables_and_plots(self):
        text = scaling.devices_markdown(self.results)
        count = self.results[2].collectives["all-reduce"]
        self.assertIn(f"| 2 | dropit_16 | {count} all-reduce | ", text)
        self.assertIn("| 1 | flax | 0 | ", text)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "scaling_devices.png")
            scaling.draw_devices(self.results, path)
            self.assertStartsWith(path.read_bytes(), b"\x89PNG")

    def test_where_there_are_too_few_devices_a_process_simulates_them(self):
        done = mock.Mock(
            stdout=json.dumps([dataclasses.asdict(each) for each in self.results])
        )
        one = jax.devices()[:1]
        out = io.StringIO()
        with (
            mock.patch.object(scaling.jax, "devices", return_value=one),
            mock.patch.object(scaling.subprocess, "run", return_value=done) as run,
            contextlib.redirect_stdout(out),
        ):
            scaling.main(["--part=devices", "--output=", "--json"])
        flags = run.call_args.kwargs["env"]["XLA_FLAGS"]
        self.assertEndsWith(flags, "--xla_force_host_platform_device_count=8")
        self.assertEqual(json.loads(out.getvalue()), json.loads(done.stdout))


class CommandTest(parameterized.TestCase):
    def test_json_is_a_list_of_objects_and_plots_go_where_asked(self):
        points = _points(_SWEEP, lambda n: 2e-3 * n, lambda n: 1e-3 * n)
        out = io.StringIO()
        with tempfile.TemporaryDirectory() as directory:
            with (
                mock.patch.object(scaling, "measure", return_value=points) as measure,
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                flags = ["--part=depth", "--rounds=3", "--json"]
                scaling.main([*flags, f"--output={directory}/figures"])
            names = [path.name for path in Path(directory, "figures").iterdir()]
        self.assertEqual(names, ["scaling_depth.png"])
        measure.assert_called_once_with(scaling.SWEEPS["depth"], 3)
        objects = json.loads(out.getvalue())
        kinds = [each["kind"] for each in objects]
        self.assertEqual(kinds, ["point"] * 9 + ["fit"] * 5)
        self.assertContainsSubset(["sweep", "variant", "median_s"], objects[0])

    def test_an_unknown_part_is_one_line_and_exit_2(self):
        err = io.StringIO()
        with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as raised:
            scaling.main(["--part=hight"])
        self.assertEqual(raised.value.code, 2)
        self.assertEqual(
            err.getvalue(),
            "error: unknown part 'hight'; known are 'batch', 'width', 'depth', "
            "'devices'\n",
        )


if __name__ == "__main__":
    absltest.main()
