import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

from tests.train.runs.checkpoints import cases
from train.system.disk import CheckpointError


class AnotherModelTest(cases.SavedCheckpointsTest):
    def _errors(self, abstract):
        """Yields the messages of both ways to restore, which move nothing."""
        before = cases.snapshot(self.root)
        with self.open() as checkpoints:
            for restore in (
                lambda: checkpoints.restore(2, abstract),
                lambda: checkpoints.restore_latest(abstract),
            ):
                with pytest.raises(CheckpointError, match="another model") as raised:
                    restore()
                self.assertIn(str(self.directory / "2"), str(raised.value))
                yield str(raised.value)
            self.assertEqual(checkpoints.steps(), [1, 2])
        self.assertEqual(cases.snapshot(self.root), before)
        self.assertEmpty(self.said)

    @parameterized.named_parameters(
        (
            "shape",
            {"kernel": jnp.zeros((8, 5))},
            ["kernel: (8, 4) in the checkpoint, (8, 5) in the model"],
        ),
        (
            "rank",
            {"step": jnp.zeros(1, jnp.int32)},
            ["step: () in the checkpoint, (1,) in the model"],
        ),
        (
            "missing",
            {"extra": jnp.zeros(3)},
            ["extra: absent in the checkpoint, (3,) in the model"],
        ),
        (
            "nested",
            {"averages": {"kernel": jnp.zeros((8, 4))}},
            ["averages/kernel: absent in the checkpoint, (8, 4) in the model"],
        ),
        (
            "two",
            {"kernel": jnp.zeros((4, 8)), "half": jnp.zeros(4, jnp.bfloat16)},
            [
                "2 arrays differ",
                "half: (8,) in the checkpoint, (4,) in the model",
                "kernel: (8, 4) in the checkpoint, (4, 8) in the model",
            ],
        ),
    )
    def test_arrays_are_named(self, changes, parts):
        for message in self._errors(cases.abstract(cases.state() | changes)):
            for part in parts:
                self.assertIn(part, message)

    def test_an_array_too_many_is_named(self):
        abstract = cases.abstract_state()
        del abstract["rng"]
        for message in self._errors(abstract):
            self.assertIn("rng: (2,) in the checkpoint, absent in the model", message)

    def test_many_arrays_are_not_all_listed(self):
        many = {f"a{number:02}": jnp.zeros(2) for number in range(30)}
        for message in self._errors(cases.abstract(cases.state() | many)):
            self.assertIn("30 arrays differ", message)
            self.assertLen(message.splitlines(), 12)

    @parameterized.named_parameters(
        ("more", {"others": {}}, "others"),
        ("deeper", {"averages": {"kernel": {}}}, "averages/kernel"),
        (
            "fewer",
            {"optimizer": (cases.Pair(jnp.int32(0), cases.Empty()), None)},
            "optimizer/2",
        ),
    )
    def test_empty_parts_are_no_damage(self, changes, name):
        for message in self._errors(cases.abstract(cases.state() | changes)):
            self.assertIn(f"\n  {name}: ", message)

    def test_the_kind_of_an_empty_part_does_not_matter(self):
        for empty in ({}, (), None, cases.Empty()):
            abstract = cases.abstract(cases.state() | {"averages": empty})
            with self.open(read_only=True) as checkpoints:
                state, _ = checkpoints.restore(2, abstract)
            cases.assert_same_bits(state, cases.state(2) | {"averages": empty})


if __name__ == "__main__":
    absltest.main()
