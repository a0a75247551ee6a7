import pytest
from absl.testing import absltest, parameterized

from benchmarks import command


class CommandTest(parameterized.TestCase):
    def test_a_table_has_a_title_where_one_is_given(self):
        lines = ["| a | b |", "| --- | --- |", "| 1 | 2 |"]
        table = command.table("### T", ["a", "b"], [["1", "2"]])
        self.assertEqual(table.split("\n"), ["### T", "", *lines])
        table = command.table("", ["a", "b"], [["1", "2"]])
        self.assertEqual(table.split("\n"), lines)

    def test_names_are_in_the_order_in_which_they_are_known(self):
        self.assertEqual(command.chosen("letter", "ca", "abc"), ["a", "c"])
        self.assertEqual(command.chosen("letter", "", "abc"), ["a", "b", "c"])
        with pytest.raises(ValueError, match="unknown letter 'd'; known are 'a', 'b'"):
            command.chosen("letter", "ad", "ab")


if __name__ == "__main__":
    absltest.main()
