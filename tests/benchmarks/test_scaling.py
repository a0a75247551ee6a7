import contextlib
import dataclasses
import io
import json
import tempfile
from pathlib import Path
from unittest import mock

import jax
import pytest
from absl.testing import absltest, parameterized

from benchmarks import scaling
from benchmarks.workloads import sweeps
from tests.benchmarks import examples


class TablesTest(parameterized.TestCase):
    def test_a_sweep_has_a_table_of_points_and_one_of_lines(self):
        points = examples.points(examples.SWEEP, lambda n: 2e-3 * n, lambda n: 1e-3 * n)
        lines = sweeps.fits(examples.SWEEP, points)
        text = scaling.markdown(examples.SWEEP, points, lines)
        self.assertIn("### depth: MLP", text)
        self.assertIn("| 3 | flax | 6.0 | 0.00 | 3.0 [-97.0, 103.0] |", text)
        self.assertIn("| step | lean | depth | 2.000 | ms, by depth |", text)

    def test_devices_have_a_table(self):
        text = scaling.devices_markdown(examples.on_devices())
        self.assertIn("| 2 | dropit_16 | 9 all-reduce | 0.50 | 2.00 |", text)
        self.assertIn("| 1 | flax | 0 | ", text)


class CommandTest(parameterized.TestCase):
    def test_where_there_are_too_few_devices_a_process_simulates_them(self):
        done = mock.Mock(
            stdout=json.dumps(
                [dataclasses.asdict(each) for each in examples.on_devices()]
            )
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

    def test_json_is_a_list_of_objects_and_plots_go_where_asked(self):
        points = examples.points(examples.SWEEP, lambda n: 2e-3 * n, lambda n: 1e-3 * n)
        out = io.StringIO()
        with tempfile.TemporaryDirectory() as directory:
            with (
                mock.patch.object(sweeps, "measure", return_value=points) as measure,
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                flags = ["--part=depth", "--rounds=3", "--json"]
                scaling.main([*flags, f"--output={directory}/figures"])
            names = [path.name for path in Path(directory, "figures").iterdir()]
        self.assertEqual(names, ["scaling_depth.png"])
        measure.assert_called_once_with(sweeps.SWEEPS["depth"], 3)
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
