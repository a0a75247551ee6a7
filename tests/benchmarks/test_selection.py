import contextlib
import dataclasses
import io
import json
from unittest import mock

from absl.testing import absltest, parameterized

from benchmarks import bounds, selection

_ROW = 2**14
_SIZES = (16, _ROW)


def _failing(*flags):
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            selection.main(flags)
        except SystemExit as stop:
            return stop.code, err.getvalue()
    raise AssertionError("it did not exit")


class MeasuringTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.results = selection.measure(_ROW, 0.875, 2, _SIZES)

    def test_every_method_of_every_size_is_there_and_its_peers(self):
        self.assertEqual(
            [(result.method, result.chunk_size) for result in self.results],
            [
                ("copy", None),
                ("lax.top_k", _ROW),
                ("lax.approx_max_k", _ROW),
                ("auto", 16),
                ("top_k", 16),
                ("auto", _ROW),
                ("top_k", _ROW),
            ],
        )
        copy, top_k = self.results[:2]
        self.assertEqual(copy.compress_bytes, 2 * 4 * _ROW)
        self.assertEqual((copy.copy_ratio.low, copy.copy_ratio.high), (1, 1))
        # An eighth of the values, and an index of 4 bytes for each.
        self.assertEqual(top_k.compress_bytes, 4 * _ROW + 8 * _ROW // 8)
        self.assertEqual((top_k.top_k_ratio.low, top_k.top_k_ratio.high), (1, 1))
        for result in self.results[3:]:
            self.assertGreater(result.decompress_s, 0)
            self.assertEqual(result.compress_bytes, result.decompress_bytes)

    def test_on_a_gpu_the_kernels_have_their_twins_beside_them(self):
        with mock.patch.object(selection.jax, "default_backend", return_value="gpu"):
            every = selection.operations(_ROW, 0.875, (16,))
        self.assertEqual([each.method for each in every[3:]], ["auto", "xla", "top_k"])

    def test_several_calls_in_a_turn(self):
        with mock.patch.object(
            selection.timing, "interleaved", return_value=_with_defaults({})
        ) as interleaved:
            results = selection.measure(_ROW, 0.875, 3, (16,), calls=5)
        self.assertEqual(interleaved.call_args.kwargs, {"calls": 5})
        self.assertEqual({result.calls for result in results}, {5})

    def test_rates_follow_from_the_times(self):
        durations = {"compress copy, None": [1.0, 2.0, 1.0]}
        durations["compress lax.top_k, 16384"] = [8.0, 16.0, 8.0]
        durations["compress auto, 16"] = [2.0, 4.0, 2.0]
        durations["decompress auto, 16"] = [1.0, 2.0, 1.0]
        with mock.patch.object(selection.timing, "interleaved") as interleaved:
            interleaved.return_value = _with_defaults(durations)
            results = selection.measure(_ROW, 0.875, 3, (16,))
        result = next(r for r in results if r.method == "auto")
        self.assertEqual((result.compress_s, result.decompress_s), (2, 1))
        self.assertEqual(result.compress_elements_s, _ROW / 2)
        self.assertEqual(result.decompress_elements_s, _ROW)
        self.assertEqual(result.round_trip_elements_s, _ROW / 3)
        self.assertEqual((result.copy_ratio.median, result.copy_ratio.low), (3, 3))
        self.assertEqual(result.top_k_ratio.median, 0.25)
        self.assertAlmostEqual(result.gb_s, 2e-9 * result.compress_bytes / 3)

    def test_tables_have_a_row_for_each_result(self):
        table = selection.markdown(self.results)
        self.assertLen(table.splitlines(), 4 + len(self.results))
        self.assertIn("| copy | - | - |", table)
        self.assertIn("| auto | 16 | index |", table)
        self.assertIn("| top_k | 16384 | bitmap |", table)

    def test_json_is_a_list_of_what_was_measured_and_the_bounds(self):
        out = io.StringIO()
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(io.StringIO()),
            mock.patch.object(selection, "measure", return_value=self.results),
        ):
            selection.main(["--json"])
        objects = json.loads(out.getvalue())
        self.assertLen(objects, len(self.results) + 3 * 6)
        for each in objects:
            kind = selection.Result if each["section"] == "measured" else bounds.Bound
            self.assertCountEqual(each, [f.name for f in dataclasses.fields(kind)])

    @parameterized.parameters(
        ("--elements=1000", "--elements: takes a multiple of 16384, got 1000"),
        ("--elements=0", "--elements: takes a multiple of 16384, got 0"),
        ("--rate=1", "--rate: takes a number between 0 and 1, got 1.0"),
        ("--rate=0", "--rate: takes a number between 0 and 1, got 0.0"),
    )
    def test_what_cannot_be_is_one_line_and_exit_2(self, flag, message):
        self.assertEqual(_failing(flag), (2, f"error: {message}\n"))


def _with_defaults(durations):
    every = {f"compress {each.name}" for each in selection.operations(_ROW, 0.5, (16,))}
    every |= {"decompress auto, 16", "decompress top_k, 16"}
    return {name: durations.get(name, [1.0] * 3) for name in every}


if __name__ == "__main__":
    absltest.main()
