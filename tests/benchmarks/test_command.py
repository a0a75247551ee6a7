import dataclasses
import json

import pytest
from absl.testing import absltest, parameterized

from benchmarks.printing import command


@dataclasses.dataclass(frozen=True)
class _Result:
    name: str
    seconds: float | None


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

    def test_results_are_a_list_of_objects(self):
        text = command.to_json([_Result("a", 0.5), _Result("b", None)])
        self.assertEqual(
            json.loads(text),
            [{"name": "a", "seconds": 0.5}, {"name": "b", "seconds": None}],
        )
        self.assertEqual(json.loads(command.to_json([])), [])

    def test_a_parser_says_what_the_command_does(self):
        parser = command.parser("letters", "Counts letters.\n\nOf words.")
        text = parser.format_help()
        self.assertIn("usage: benchmarks.letters", text)
        self.assertIn("Counts letters.", text)
        self.assertNotIn("words", text)
        self.assertTrue(parser.parse_args(["--json"]).json)
        self.assertFalse(parser.parse_args([]).json)


if __name__ == "__main__":
    absltest.main()
