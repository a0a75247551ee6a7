from absl.testing import absltest, parameterized
from hypothesis import given
from hypothesis import strategies as st

from train.system import text


class TextTest(parameterized.TestCase):
    @parameterized.parameters(
        ("plain", "plain"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("back\r\x08", "back\\r\\x08"),
        ("\u202eright to left", "\\u202eright to left"),
        ("half of a pair \ud800", "half of a pair \\ud800"),
        ("größer 漢字", "größer 漢字"),
    )
    def test_control_characters_are_escaped(self, given, expected):
        self.assertEqual(text.printable(given), expected)

    @given(st.text())
    def test_what_is_shown_is_one_short_line(self, value):
        shown = text.shorten(value * 50)
        self.assertNotIn("\n", shown)
        self.assertLessEqual(len(shown), 105)
        self.assertTrue(
            all(c.isprintable() or c.isspace() or c > "\xff" for c in shown)
        )

    def test_long_texts_keep_both_ends(self):
        self.assertEqual(text.shorten("ab" * 500, 8), "abab ... abab")

    @parameterized.parameters(
        ([], "", ""),
        ([1, "b"], "1, b", "\n  1\n  b"),
        (range(11), "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 1 more", None),
    )
    def test_lists_are_short(self, values, names, lines):
        self.assertEqual(text.join_names(values), names)
        found = text.join_lines([str(value) for value in values])
        if lines is None:
            self.assertEndsWith(found, "\n  9\n  ... and 1 more")
        else:
            self.assertEqual(found, lines)


if __name__ == "__main__":
    absltest.main()
