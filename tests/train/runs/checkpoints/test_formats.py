import functools
import json

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

from tests.train.runs.checkpoints import cases
from train.runs.checkpoints import checksums
from train.system.disk import CheckpointError


class FormatTest(cases.SavedCheckpointsTest):
    def _rewrite_position(self, step, **changes):
        """Changes fields of a position, with their checksums; `None` removes one."""
        path = self.directory / str(step) / "position" / "metadata"
        fields = json.loads(path.read_text()) | changes
        fields = {name: value for name, value in fields.items() if value is not None}
        path.write_text(json.dumps(fields))
        checksums.write(self.directory / str(step), step)

    def test_the_format_before_is_read(self):
        self._rewrite_position(2, version=None)
        with self.open() as checkpoints:
            step, state, _ = checkpoints.restore_latest(cases.abstract_state())
        self.assertEqual(step, 2)
        cases.assert_same_bits(state, cases.state(2))

    def test_a_later_format_is_refused_and_left_there(self):
        self._rewrite_position(2, version=3)
        with self.open() as checkpoints:
            for restore in (
                checkpoints.restore_latest,
                functools.partial(checkpoints.restore, 2),
            ):
                with pytest.raises(CheckpointError, match=r"format 3, .* up to 2"):
                    restore({"another": jax.ShapeDtypeStruct((3,), jnp.float32)})
        with self.open(read_only=True) as checkpoints:
            self.assertEqual(checkpoints.steps(), [1, 2])

    @parameterized.parameters(
        (b"[" * 100_000, 1),
        (b"[]", 1),
        (b"{}", 1),
        (b'{"test_accuracy": "high"}', 2),
        (b'{"test_accuracy": [1]}', 2),
    )
    def test_a_position_of_something_else(self, content, expected):
        """Takes a position that another program wrote, with its checksums."""
        (self.directory / "2" / "position" / "metadata").write_bytes(content)
        checksums.write(self.directory / "2", 2)

        def problem(step, state, position):
            del step, state
            return "" if "test_accuracy" in position else "no accuracy"

        with self.open(problem=problem) as checkpoints:
            self.assertIsNone(checkpoints.best_step())
            step, *_ = checkpoints.restore_latest(cases.abstract_state())
        self.assertEqual(step, expected)


if __name__ == "__main__":
    absltest.main()
