import contextlib
import io
import math
from unittest import mock

import rich.console
from absl.testing import absltest, parameterized

from train.system.terminal import Terminal


class TerminalTest(parameterized.TestCase):
    def _terminal(self, **kwargs):
        self.out = io.StringIO()
        return Terminal(rich.console.Console(file=self.out, width=100, **kwargs))

    def test_quiet_shows_nothing(self):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            terminal = Terminal(quiet=True)
            terminal.say("text")
            with terminal.start("name", 0, 10) as bar:
                bar.update(1, 1.0, 0.5, 10.0)
        self.assertEqual(out.getvalue(), "")

    def test_a_line_is_a_line_and_brackets_are_brackets(self):
        text = "[red] " + "long " * 100 + "[0]"
        self._terminal().say(text)
        self.assertEqual(self.out.getvalue(), text + "\n")

    def test_elsewhere_than_on_a_terminal_a_line_comes_now_and_then(self):
        terminal = self._terminal()
        with mock.patch("time.monotonic") as now:
            now.return_value = 0.0
            with terminal.start("digits", 0, 100) as bar:
                for now.return_value in (1.0, 29.0, 31.0, 32.0, 62.0):
                    bar.update(int(now.return_value), 0.5, 0.25, 1500)
        lines = self.out.getvalue().splitlines()
        line = "digits  step {}/100  loss 0.500  accuracy 25.0%  1,500 images/s"
        self.assertEqual(lines, [line.format(31), line.format(62)])

    def test_on_a_terminal_there_is_a_bar(self):
        terminal = self._terminal(force_terminal=True, color_system=None)
        with terminal.start("digits[/][bold]\x1b", 5, 100) as bar:
            bar.update(6, math.nan, math.nan, 0)
            bar.update(40, 0.5, 0.25, 1500)
            bar.say("a line above")
        text = self.out.getvalue()
        self.assertNotIn("nan", text)
        for part in (
            "digits[/][bold]",
            "a line above",
            "40/100",
            "loss 0.500",
            "accuracy 25.0%",
        ):
            self.assertIn(part, text)
        self.assertIn("1,500 images/s", text)
        self.assertIn("ETA", text)


if __name__ == "__main__":
    absltest.main()
