import math
import tempfile
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
from absl.testing import absltest, parameterized

from train.runs.checkpoints import Checkpoints


def _kept_by_twin(accuracies):
    """Returns the kept steps and the best, of steps 0, 1, ... of these accuracies."""
    best = None
    for step, accuracy in enumerate(accuracies):
        if accuracy is None or math.isnan(accuracy):
            continue
        if best is None or accuracy >= accuracies[best]:
            best = step
    last = range(len(accuracies))[-2:]
    return sorted({*last} | ({best} - {None})), best


class KeptTest(parameterized.TestCase):
    @hypothesis.settings(max_examples=5)
    @hypothesis.given(
        st.lists(
            st.tuples(
                st.sampled_from([None, math.nan, 0.0, 0.25, 0.5, 0.5, 1.0]),
                st.booleans(),
            ),
            min_size=4,
            max_size=7,
        )
    )
    def test_as_of_a_twin(self, saves):
        state, said, numbers = {"w": jnp.ones(2)}, [], []
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            checkpoints = Checkpoints(directory, said.append)
            for step, (accuracy, reopen) in enumerate(saves):
                if reopen:
                    checkpoints.__exit__(None, None, None)
                    checkpoints = Checkpoints(directory, said.append)
                numbers.append(accuracy)
                checkpoints.save(step * 10, state, {}, accuracy)
                checkpoints.wait()
                kept, best = _kept_by_twin(numbers)
                best = None if best is None else best * 10
                there = sorted(int(path.name) for path in directory.iterdir())
                self.assertEqual(there, [step * 10 for step in kept])
                self.assertEqual(checkpoints.steps(), there)
                self.assertEqual(checkpoints.best_step(), best)
            checkpoints.__exit__(None, None, None)
            with Checkpoints(directory, said.append, read_only=True) as reader:
                self.assertEqual(reader.steps(), there)
                self.assertEqual(reader.best_step(), best)
        self.assertEmpty(said)

    @parameterized.parameters(
        ([0.9, 0.9, 0.1, 0.2], [1, 2, 3], 1),
        ([0.9, math.nan, None, 0.2], [0, 2, 3], 0),
        ([None, math.nan, None, math.nan], [2, 3], None),
        ([0.1, 0.2, 0.3, 0.4], [2, 3], 3),
        ([0.0, None, None, None], [0, 2, 3], 0),
    )
    def test_the_twin(self, accuracies, kept, best):
        self.assertEqual(_kept_by_twin(accuracies), (kept, best))


if __name__ == "__main__":
    absltest.main()
