import json
import math

import pytest
from absl.testing import absltest, parameterized

from train.engine.meter import FIELDS
from train.runs import position
from train.runs.position import Position
from train.runs.records import COLUMNS

_METER = dict.fromkeys(FIELDS, 1.5)
_ROW = dict.fromkeys(COLUMNS, 0.5) | {"step": 7, "epoch": 1}
_WHOLE = {"meter": _METER, "train_examples": 48, "rows": [_ROW], "test_accuracy": 0.5}


class PositionTest(parameterized.TestCase):
    @parameterized.parameters([[]], [[_ROW]], [[_ROW, _ROW | {"step": 9}]])
    def test_comes_back_from_json(self, rows):
        before = Position(_METER, 48, rows)
        content = json.loads(json.dumps(before.to_json()))
        self.assertEqual(Position.from_json(content), before)
        self.assertEqual(position.problem(content), "")

    def test_the_first_checkpoints_had_no_rows(self):
        first = {name: value for name, value in _WHOLE.items() if name != "rows"}
        self.assertEqual(Position.from_json(first).rows, [])

    @parameterized.parameters(
        ([], "no table"),
        (None, "no table"),
        ({}, "`meter`"),
        (_WHOLE | {"meter": None}, "`meter`"),
        (_WHOLE | {"meter": _METER | {"loss": "1"}}, "`meter`"),
        (_WHOLE | {"meter": _METER | {"loss": True}}, "`meter`"),
        (_WHOLE | {"train_examples": "48"}, "`train_examples`"),
        (_WHOLE | {"train_examples": True}, "`train_examples`"),
        (_WHOLE | {"train_examples": 4.8}, "`train_examples`"),
        (_WHOLE | {"rows": None}, "`rows`"),
        (_WHOLE | {"rows": {"step": 1}}, "`rows`"),
        (_WHOLE | {"rows": [{"step": 1}]}, "`rows`"),
        (_WHOLE | {"rows": [_ROW | {"step": math.inf}]}, "`rows`"),
        (_WHOLE | {"rows": [_ROW | {"epoch": 1.5}]}, "`rows`"),
        (_WHOLE | {"rows": [_ROW | {"test_loss": None}]}, "`rows`"),
    )
    def test_something_else_is_a_problem(self, content, message):
        self.assertIn(message, position.problem(content))
        with pytest.raises(ValueError, match=message):
            Position.from_json(content)


if __name__ == "__main__":
    absltest.main()
