"""States, and tests that begin with a directory of checkpoints."""

import collections
import shutil
import tempfile
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from train.runs.checkpoints import Checkpoints

POSITION = {"meter": {"loss": 0.1 + 0.2, "count": 3, "since": None}, "names": ["a"]}
# A payload that arithmetic would lose, both zeros, a subnormal, both infinities.
FLOATS = np.array(
    [0x7FC12345, 0xFFC00001, 0, 0x80000000, 1, 0x7F800000, 0xFF800000, 0x3F800001],
    np.uint32,
).view(np.float32)

Empty = collections.namedtuple("Empty", [])
Pair = collections.namedtuple("Pair", ["first", "second"])


def state(step=0):
    """Returns a state of four dtypes, with empty containers of several types."""
    kernel = np.concatenate([FLOATS, np.arange(24, dtype=np.float32) + step])
    return {
        "kernel": jnp.asarray(kernel.reshape(8, 4)),
        "half": jnp.asarray(FLOATS, jnp.bfloat16) + jnp.bfloat16(step),
        "rng": jnp.array([step, 2**32 - 1], jnp.uint32),
        "step": jnp.array(step, jnp.int32),
        "averages": {},
        "optimizer": (Pair(jnp.array(step, jnp.int32), Empty()), None, Empty()),
    }


def abstract(state, sharding=None):
    """Returns shapes, dtypes and shardings of a state."""

    def of(leaf):
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding or leaf.sharding
        )

    return jax.tree.map(of, state)


def abstract_state():
    """Returns `abstract` of the state of any step."""
    return abstract(state())


def snapshot(directory):
    """Returns modes, times of change and bytes of all paths below a directory."""
    return {
        str(path.relative_to(directory)): (
            path.stat().st_mode,
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else None,
        )
        for path in [directory, *directory.rglob("*")]
    }


def files(directory):
    """Returns the bytes of all files below a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def assert_same_bits(actual, expected):
    """Checks structures, shapes, dtypes and bits, those of NaN and -0 included."""
    chex.assert_trees_all_equal_structs(actual, expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    for one, other in zip(
        jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
    ):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


class CheckpointsTest(parameterized.TestCase):
    """Tests that begin with an empty directory; `said` collects the messages."""

    def setUp(self):
        super().setUp()
        self.root = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.directory = self.root / "checkpoints"
        self.said = []

    def open(self, directory=None, **kwargs):
        return Checkpoints(directory or self.directory, self.said.append, **kwargs)

    def save(self, checkpoints, step, accuracy=None):
        checkpoints.save(step, state(step), POSITION, accuracy)

    def assert_restores(self, result, step, accuracy=None):
        restored, position = result
        assert_same_bits(restored, state(step))
        expected = POSITION | {"test_accuracy": accuracy, "version": 2}
        self.assertEqual(position, expected)

    def assert_intact(self, *steps):
        """Checks that these steps, and no others, are found and can be read."""
        with self.open(read_only=True) as checkpoints:
            self.assertEqual(checkpoints.steps(), [*steps])
            for step in steps:
                self.assert_restores(checkpoints.restore(step, abstract_state()), step)


class SavedCheckpointsTest(CheckpointsTest):
    """Tests that begin with the checkpoints of the steps 1 and 2."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.saved = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        with Checkpoints(cls.saved / "checkpoints", print) as checkpoints:
            for step in (1, 2):
                checkpoints.save(step, state(step), POSITION, None)

    def setUp(self):
        super().setUp()
        shutil.copytree(self.saved / "checkpoints", self.directory)


def flip(path):
    """Inverts the byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
