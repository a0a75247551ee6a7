"""Tests of figures: lines, bars, labels and colours as matplotlib has them."""

import math
from pathlib import Path
from unittest import mock

import matplotlib.colors
import numpy as np
from absl.testing import absltest, parameterized

from train.reports import palette, plots, png
from train.reports.histograms import MOMENTS, PARTS
from train.reports.summary import Mean
from train.runs import records


def _rows(*accuracies):
    rows = []
    for step, accuracy in enumerate(accuracies, 1):
        row = dict.fromkeys(records.COLUMNS, 0.0) | {"step": step}
        rows.append(row | {"test_accuracy": accuracy, "train_accuracy": accuracy / 2})
    return rows


class FigureTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.saved = []
        save = mock.patch.object(
            png, "save", lambda figure, path: self.saved.append(figure)
        )
        self.enterContext(save)

    def test_each_variant_is_drawn_over_the_baseline(self):
        runs = {
            "baseline": [_rows(0.1, 0.3), _rows(0.3, 0.5)],
            "a": [_rows(0.2, 0.2)],
            "b": [_rows(0.6, 0.8), _rows(0.4, 0.4)],
        }
        plots.against_baseline(runs, "baseline", "accuracy", Path("x.png"))
        (figure,) = self.saved
        panels = [axis for axis in figure.axes if axis.axison]
        self.assertEqual([axis.get_title() for axis in panels], ["a", "b"])
        for axis, mean in zip(panels, ([0.2, 0.2], [0.5, 0.6]), strict=True):
            lines = {line.get_label(): line for line in axis.get_lines()}
            np.testing.assert_allclose(lines["variant, test"].get_ydata(), mean)
            np.testing.assert_allclose(
                lines["variant, train"].get_ydata(), np.array(mean) / 2
            )
            np.testing.assert_allclose(lines["baseline, test"].get_ydata(), [0.2, 0.4])
            self.assertEqual(lines["baseline, test"].get_color(), palette.BLUE)
            self.assertEqual(lines["baseline, test"].get_linestyle(), "-")
            self.assertEqual(lines["baseline, train"].get_linestyle(), ":")
        # What the legend says of a line is what is drawn, bands or not.
        legend = panels[0].get_legend()
        for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True):
            drawn = {line.get_label(): line for line in panels[0].get_lines()}
            self.assertEqual(
                (handle.get_color(), handle.get_linestyle()),
                (
                    drawn[text.get_text()].get_color(),
                    drawn[text.get_text()].get_linestyle(),
                ),
            )
        self.assertLen(legend.get_texts(), 4)

    def test_rows_are_by_cost(self):
        points = {
            "baseline": (8.0, Mean(0.0, 0.0)),
            "dear": (4.0, Mean(-2.0, math.nan)),
            "cheap": (1.0, Mean(1.0, 0.25)),
        }
        plots.tradeoff(points, "baseline", ("MiB", "points"), Path("x.png"))
        left, right = self.saved[0].axes
        self.assertEqual([bar.get_width() for bar in left.patches], [1, 4, 8])
        names = [label.get_text() for label in left.get_yticklabels()]
        self.assertEqual(names, ["cheap", "dear", "baseline"])
        gains = [container.lines[0].get_xdata()[0] for container in right.containers]
        self.assertEqual(gains, [1, -2, 0])
        self.assertEqual(
            [bool(c.lines[2]) for c in right.containers], [True, False, True]
        )
        self.assertEqual((left.get_xlabel(), right.get_xlabel()), ("MiB", "points"))
        self.assertEqual(
            matplotlib.colors.to_hex(left.patches[2].get_facecolor()).upper(),
            palette.BLUE,
        )

    def test_histograms_leave_out_what_is_not_finite(self):
        values = np.array([1.0, math.nan, -2.0, math.inf])
        one = {(part, moment): values for part in PARTS for moment in MOMENTS}
        plots.histograms({"plain": {"layer": one}}, "plain", Path("x.png"))
        for axis in self.saved[0].axes:
            self.assertEqual(axis.patches[0].get_data().values.sum(), 2)

    def test_the_baseline_is_blue_whatever_its_name(self):
        self.assertEqual(palette.colour_of("plain", "plain"), palette.BLUE)
        self.assertNotEqual(palette.colour_of("lean", "plain"), palette.BLUE)

    @parameterized.parameters(2, 3)
    def test_histograms_have_panels_of_their_own(self, count):
        rng = np.random.default_rng(0)
        names = ("baseline", "a", "b")[:count]
        distributions = {
            name: {
                layer: {
                    (part, moment): rng.normal(size=50)
                    for part in PARTS
                    for moment in MOMENTS
                }
                for layer in ("first", "last")
            }
            for name in names
        }
        plots.histograms(distributions, "baseline", Path("x.png"))
        axes = self.saved[0].axes
        self.assertLen(axes, 2 * len(PARTS) * len(MOMENTS) * (count - 1))
        for axis in axes:
            # All elements are in the counts, of the baseline and of one other.
            counts = [stairs.get_data().values.sum() for stairs in axis.patches]
            self.assertEqual(counts, [50, 50])
        shown = [
            [text.get_text() for text in axis.get_legend().get_texts()]
            for axis in axes
            if axis.get_legend()
        ]
        self.assertEqual(shown, [["baseline", name] for name in names[1:]])


if __name__ == "__main__":
    absltest.main()
