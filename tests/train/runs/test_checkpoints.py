"""Checkpoints and what guards them: a twin, every file damaged, failing disks."""

import collections
import functools
import io
import json
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path
from unittest import mock

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest, parameterized
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from train.runs import checksums
from train.runs.checkpoints import Checkpoints
from train.system import library_output
from train.system.disk import CheckpointError

_MIB = 2**20
_POSITION = {"meter": {"loss": 0.1 + 0.2, "count": 3, "since": None}, "names": ["a"]}
# A payload that arithmetic would lose, both zeros, a subnormal, both infinities.
_FLOATS = np.array(
    [0x7FC12345, 0xFFC00001, 0, 0x80000000, 1, 0x7F800000, 0xFF800000, 0x3F800001],
    np.uint32,
).view(np.float32)

Empty = collections.namedtuple("Empty", [])
Pair = collections.namedtuple("Pair", ["first", "second"])


def _state(step=0):
    kernel = np.concatenate([_FLOATS, np.arange(24, dtype=np.float32) + step])
    return {
        "kernel": jnp.asarray(kernel.reshape(8, 4)),
        "half": jnp.asarray(_FLOATS, jnp.bfloat16) + jnp.bfloat16(step),
        "rng": jnp.array([step, 2**32 - 1], jnp.uint32),
        "step": jnp.array(step, jnp.int32),
        "averages": {},
        "optimizer": (Pair(jnp.array(step, jnp.int32), Empty()), None, Empty()),
    }


def _abstract(state, sharding=None):
    def of(leaf):
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding or leaf.sharding
        )

    return jax.tree.map(of, state)


def _snapshot(directory):
    """All below a directory: bytes of files, modes and times of change."""
    return {
        str(path.relative_to(directory)): (
            path.stat().st_mode,
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else None,
        )
        for path in [directory, *directory.rglob("*")]
    }


def _files(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def _assert_same_bits(actual, expected):
    chex.assert_trees_all_equal_structs(actual, expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    for one, other in zip(
        jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
    ):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


class _TestCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.root = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.directory = self.root / "checkpoints"
        self.said = []

    def _open(self, directory=None, **kwargs):
        return Checkpoints(directory or self.directory, self.said.append, **kwargs)

    def _save(self, checkpoints, step, accuracy=None):
        checkpoints.save(step, _state(step), _POSITION, accuracy)

    def _assert_restores(self, result, step, accuracy=None):
        state, position = result
        _assert_same_bits(state, _state(step))
        expected = _POSITION | {"test_accuracy": accuracy, "version": 2}
        self.assertEqual(position, expected)

    def _assert_intact(self, *steps):
        """The steps, and no others, are found and can be read."""
        with self._open(read_only=True) as checkpoints:
            self.assertEqual(checkpoints.steps(), [*steps])
            for step in steps:
                self._assert_restores(
                    checkpoints.restore(step, _abstract(_state())), step
                )


class _SavedTestCase(_TestCase):
    """Tests that begin with the checkpoints of the steps 1 and 2."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.saved = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        with Checkpoints(cls.saved / "checkpoints", print) as checkpoints:
            for step in (1, 2):
                checkpoints.save(step, _state(step), _POSITION, None)

    def setUp(self):
        super().setUp()
        shutil.copytree(self.saved / "checkpoints", self.directory)


class RoundTripTest(_TestCase):
    @parameterized.parameters(None, 0.1 + 0.2, 0.0, 1.0)
    def test_all_bits_and_the_position_come_back(self, accuracy):
        with self._open() as checkpoints:
            self._save(checkpoints, 5, accuracy)
        with self._open() as checkpoints:
            abstract = _abstract(_state())
            self._assert_restores(checkpoints.restore(5, abstract), 5, accuracy)
            step, *result = checkpoints.restore_latest(abstract)
        self.assertEqual(step, 5)
        self._assert_restores(result, 5, accuracy)
        self.assertEmpty(self.said)

    def test_an_accuracy_of_nan_comes_back(self):
        with self._open() as checkpoints:
            self._save(checkpoints, 5, math.nan)
        with self._open() as checkpoints:
            _, position = checkpoints.restore(5, _abstract(_state()))
            self.assertIsNone(checkpoints.best_step())
        self.assertTrue(math.isnan(position["test_accuracy"]))

    def test_no_checkpoint_is_none(self):
        with self._open() as checkpoints:
            self.assertIsNone(checkpoints.restore_latest(_abstract(_state())))
            self.assertIsNone(checkpoints.best_step())
            self.assertEqual(checkpoints.steps(), [])

    def test_a_dtype_that_is_asked_for_is_converted_to(self):
        state = {"w": jnp.array([1.0, 1.00390625, 3.0]), "n": jnp.array(7, jnp.int32)}
        wanted = {"w": state["w"].astype(jnp.bfloat16), "n": jnp.array(7.0)}
        with self._open() as checkpoints:
            checkpoints.save(1, state, {}, None)
            checkpoints.wait()
            restored, _ = checkpoints.restore(1, _abstract(wanted))
        _assert_same_bits(restored, wanted)

    @parameterized.named_parameters(
        ("sgd", optax.sgd(0.1)),
        ("adamw", optax.adamw(0.1, mask={"kernel": True, "bias": False})),
        (
            "chain",
            optax.chain(
                optax.clip_by_global_norm(1.0),
                optax.masked(optax.trace(0.9), {"kernel": True, "bias": False}),
                optax.identity(),
                optax.scale_by_schedule(optax.constant_schedule(0.1)),
            ),
        ),
        ("accumulating", optax.MultiSteps(optax.lamb(0.1), 2)),
    )
    def test_empty_parts_of_an_optimizer_come_back(self, optimizer):
        params = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
        optimizer_state = jax.tree.map(
            lambda leaf: jnp.asarray(np.full(leaf.shape, 3, leaf.dtype)),
            jax.eval_shape(optimizer.init, params),
        )
        state = {"params": params, "optimizer": optimizer_state}
        with self._open() as checkpoints:
            checkpoints.save(1, state, {}, None)
            checkpoints.wait()
            restored, _ = checkpoints.restore(1, _abstract(state))
        _assert_same_bits(restored, state)


class ShardingTest(_TestCase):
    @parameterized.named_parameters(
        ("halves", (2, 4), P("x", "y")),
        ("other_axis", (8, 1), P(None, "x")),
        ("replicated", (8, 1), P()),
        ("some_devices", (4, 1), P("x")),
        ("one_device", None, None),
    )
    def test_of_eight_devices_onto(self, shape, spec):
        chex.assert_devices_available(8, "cpu", backend="cpu")
        eight = Mesh(np.array(jax.devices()[:8]).reshape(8), ("x",))
        state = {
            "kernel": jnp.asarray(np.resize(_FLOATS, (8, 8))),
            "half": jnp.arange(64, dtype=jnp.bfloat16).reshape(8, 8),
            "rng": jnp.arange(64, dtype=jnp.uint32).reshape(8, 8),
        }
        sharded = jax.device_put(state, NamedSharding(eight, P("x")))
        sharded["step"] = jax.device_put(jnp.int32(3), NamedSharding(eight, P()))
        if shape is None:
            target = of_scalar = SingleDeviceSharding(jax.devices()[3])
        else:
            devices = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
            mesh = Mesh(devices, ("x", "y"))
            target, of_scalar = NamedSharding(mesh, spec), NamedSharding(mesh, P())
        abstract = _abstract(state, target)
        abstract["step"] = jax.ShapeDtypeStruct((), jnp.int32, sharding=of_scalar)
        with self._open() as checkpoints:
            checkpoints.save(3, sharded, {}, None)
        with self._open(read_only=True) as checkpoints:
            restored, _ = checkpoints.restore(3, abstract)
        _assert_same_bits(restored, state | {"step": jnp.int32(3)})
        for name, leaf in restored.items():
            self.assertEqual(leaf.sharding, of_scalar if name == "step" else target)


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


class NoChangeTest(_SavedTestCase):
    @parameterized.parameters(1, 2)
    def test_a_step_that_is_there_is_not_saved_again(self, step):
        before = _snapshot(self.root)
        with self._open() as checkpoints:
            checkpoints.save(step, _state(7), {"other": 1}, 0.5)
            self.assertIsNone(checkpoints.best_step())
        self.assertEqual(_snapshot(self.root), before)

    def test_a_step_under_way_is_not_saved_again(self):
        with self._open() as checkpoints:
            self._save(checkpoints, 3)
            checkpoints.save(3, _state(7), {"other": 1}, 0.5)
        self._assert_intact(2, 3)

    def test_reading_changes_nothing(self):
        for name in ("7.orbax-checkpoint-tmp", "8.orbax-checkpoint-tmp-1"):
            shutil.copytree(self.directory / "2", self.directory / name)
        before = _snapshot(self.root)
        with self._open(read_only=True) as checkpoints:
            self.assertEqual(checkpoints.steps(), [1, 2])
            self.assertIsNone(checkpoints.best_step())
            self._assert_restores(checkpoints.restore(1, _abstract(_state())), 1)
            step, *result = checkpoints.restore_latest(_abstract(_state()))
            self.assertEqual(step, 2)
            self._assert_restores(result, 2)
        self.assertEqual(_snapshot(self.root), before)
        self.assertEmpty(self.said)

    def test_a_reader_makes_no_directory(self):
        directory = self.root / "a" / "b"
        with self._open(directory, read_only=True) as checkpoints:
            self.assertEqual(checkpoints.steps(), [])
            self.assertIsNone(checkpoints.best_step())
            self.assertIsNone(checkpoints.restore_latest(_abstract(_state())))
        self.assertFalse(directory.parent.exists())

    def test_a_writer_makes_it(self):
        directory = self.root / "a" / "b"
        with self._open(directory):
            self.assertTrue(directory.is_dir())
        self.assertEmpty(list(directory.iterdir()))

    def test_half_written_ones_are_told_and_removed(self):
        before = _snapshot(self.directory)
        halves = []
        for name in ("7.orbax-checkpoint-tmp", "8.orbax-checkpoint-tmp-1"):
            halves.append(self.directory / name)
            shutil.copytree(self.directory / "2", halves[-1])
        with self._open() as checkpoints:
            self.assertEqual(checkpoints.steps(), [1, 2])
        self.assertLen(self.said, 2)
        for line, path in zip(self.said, halves, strict=True):
            self.assertIn(f"{path} was not written to its end", line)
        after = _snapshot(self.directory)
        self.assertEqual(after.pop(".")[0], before.pop(".")[0])
        self.assertEqual(after, before)

    def test_a_half_written_one_that_cannot_be_removed_is_told(self):
        half = self.directory / "7.orbax-checkpoint-tmp"
        half.mkdir()
        with (
            mock.patch.object(shutil, "rmtree", side_effect=PermissionError(13, "no")),
            pytest.raises(CheckpointError, match=f"Cannot remove {half}"),
        ):
            self._open()
        self._assert_intact(1, 2)


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def _truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def _empty(path):
    os.truncate(path, 0)


_DAMAGES = {
    "flip": _flip,
    "truncate": _truncate,
    "empty": _empty,
    "delete": Path.unlink,
}


class DamagedTest(_SavedTestCase):
    def _names(self):
        """The files that a checkpoint needs; Orbax adds its mark when all is there."""
        step = self.directory / "2"
        names = [
            str(path.relative_to(step))
            for path in sorted(step.rglob("*"))
            if path.is_file() and path.name != "commit_success.txt"
        ]
        self.assertContainsSubset({"_CHECKPOINT_METADATA", "checksums.json"}, names)
        self.assertGreater(len(names), 10)
        return names

    @parameterized.parameters(
        # Every file in two ways; which of them does not depend on the file.
        ("flip", slice(None)),
        ("truncate", slice(0, None, 3)),
        ("empty", slice(1, None, 3)),
        ("delete", slice(2, None, 3)),
    )
    def test_the_one_before_any_damaged_file_is_used(self, damage, which):
        first = _snapshot(self.directory / "1")
        for name in self._names()[which]:
            with self.subTest(name), tempfile.TemporaryDirectory() as root:
                self.said.clear()
                directory = Path(root) / "checkpoints"
                shutil.copytree(self.directory, directory)
                _DAMAGES[damage](directory / "2" / name)
                second = _snapshot(directory / "2")
                with self._open(directory) as checkpoints:
                    with pytest.raises(CheckpointError, match="2 is damaged"):
                        checkpoints.restore(2, _abstract(_state()))
                    self.assertEmpty(self.said)
                    self.assertEqual(_snapshot(directory / "2"), second)
                    step, *result = checkpoints.restore_latest(_abstract(_state()))
                    self.assertEqual(step, 1)
                    self._assert_restores(result, 1)
                    self.assertEqual(checkpoints.steps(), [1])
                (line,) = self.said
                aside = Path(root) / "damaged" / "2"
                for part in ("step 2 is damaged", name, str(aside), "of step 1 used"):
                    self.assertIn(part, line)
                self.assertEqual(_snapshot(aside), second)
                self.assertEqual(_snapshot(directory / "1"), first)
                self.assertEqual([p.name for p in directory.iterdir()], ["1"])
                self.assertLen(list(Path(root).iterdir()), 2)

    def test_a_reader_only_tells(self):
        _flip(self.directory / "2" / self._names()[0])
        before = _snapshot(self.root)
        with self._open(read_only=True) as checkpoints:
            with pytest.raises(CheckpointError, match=r"2 is damaged.*--step"):
                checkpoints.restore(2, _abstract(_state()))
            self._assert_restores(checkpoints.restore(1, _abstract(_state())), 1)
        self.assertEqual(_snapshot(self.root), before)

    @parameterized.parameters(*_DAMAGES)
    def test_all_damaged_is_an_error(self, damage):
        for name in ("1/position/metadata", "2/state/_METADATA"):
            _DAMAGES[damage](self.directory / name)
        before = _snapshot(self.root)
        with self._open() as checkpoints:
            self.assertEqual(checkpoints.steps(), [1, 2])
            with pytest.raises(CheckpointError) as raised:
                checkpoints.restore_latest(_abstract(_state()))
            self.assertEqual(checkpoints.steps(), [1, 2])
        for part in (str(self.directory), "2: state/_METADATA", "1: position/metadata"):
            self.assertIn(part, str(raised.value))
        self.assertEqual(_snapshot(self.root), before)
        self.assertEmpty(self.said)

    def test_several_damaged_ones_are_put_aside(self):
        with self._open() as checkpoints:
            self._save(checkpoints, 3, 0.9)
        with self._open() as checkpoints:
            self._save(checkpoints, 4)
        with self._open() as checkpoints:
            self._save(checkpoints, 5)
            self.assertEqual(checkpoints.steps(), [3, 4, 5])
        for step in (4, 5):
            _flip(self.directory / f"{step}" / "position" / "metadata")
        with self._open() as checkpoints:
            step, *result = checkpoints.restore_latest(_abstract(_state()))
            self.assertEqual((step, checkpoints.steps()), (3, [3]))
            self._assert_restores(result, 3, 0.9)
            self.assertEqual(checkpoints.best_step(), 3)
        self.assertLen(self.said, 2)
        names = sorted(path.name for path in (self.root / "damaged").iterdir())
        self.assertEqual(names, ["4", "5"])

    def test_the_same_step_again_gets_another_name(self):
        asides = {}
        for turn in range(3):
            with self._open() as checkpoints:
                self._save(checkpoints, 2)
            (self.directory / "2" / "position" / "metadata").write_text(f"{turn}")
            content = _snapshot(self.directory / "2")
            with self._open() as checkpoints:
                step, *_ = checkpoints.restore_latest(_abstract(_state()))
            self.assertEqual(step, 1)
            there = sorted((self.root / "damaged").iterdir())
            (new,) = (path for path in there if path not in asides)
            self.assertIn(f"put aside as {new},", self.said[-1])
            asides[new] = content
            for path, expected in asides.items():
                self.assertEqual(_snapshot(path), expected)
        self._assert_intact(1)

    def test_a_run_goes_on_with_the_step_that_was_damaged(self):
        _flip(self.directory / "2" / "state" / "_METADATA")
        with self._open() as checkpoints:
            checkpoints.restore_latest(_abstract(_state()))
            self._save(checkpoints, 2)
        self._assert_intact(1, 2)

    @parameterized.parameters(None, "{}", '{"version": 1, "step": 2, "files": {}}')
    def test_without_checksums_it_is_damaged(self, text):
        file = self.directory / "2" / "checksums.json"
        file.unlink() if text is None else file.write_text(text)
        with self._open() as checkpoints:
            step, *result = checkpoints.restore_latest(_abstract(_state()))
        self.assertEqual(step, 1)
        self._assert_restores(result, 1)
        self.assertIn("checksums.json", self.said[0])

    @parameterized.product(name=["3", "99999999"], move=[True, False])
    def test_a_step_of_another_name_is_damaged(self, name, move):
        (shutil.move if move else shutil.copytree)(
            self.directory / "2", self.directory / name
        )
        with self._open() as checkpoints:
            with pytest.raises(CheckpointError, match="written as that of step 2"):
                checkpoints.restore(int(name), _abstract(_state()))
            step, *result = checkpoints.restore_latest(_abstract(_state()))
        expected = 1 if move else 2
        self.assertEqual(step, expected)
        self._assert_restores(result, expected)
        self.assertIn("written as that of step 2", self.said[0])
        self.assertTrue((self.root / "damaged" / name).is_dir())

    def test_a_state_with_a_problem_is_damaged(self):
        def problem(step, state, position):
            self.assertEqual(state["step"], step)
            self.assertIn("meter", position)
            return "too large" if state["step"] == 2 else ""

        with self._open(problem=problem) as checkpoints:
            with pytest.raises(CheckpointError, match=r"2 is damaged \(too large\)"):
                checkpoints.restore(2, _abstract(_state()))
            step, *result = checkpoints.restore_latest(_abstract(_state()))
        self.assertEqual(step, 1)
        self._assert_restores(result, 1)
        self.assertIn("step 2 is damaged (too large)", self.said[0])

    def test_checksums_without_a_step_are_read(self):
        """Those of the first version, which had those of some files."""
        file = self.directory / "2" / "checksums.json"
        files = json.loads(file.read_text())["files"]
        del files["_CHECKPOINT_METADATA"]
        file.write_text(json.dumps(files))
        self._assert_intact(1, 2)


class AnotherModelTest(_SavedTestCase):
    def _errors(self, abstract):
        """Yields the messages of both ways to restore, which move nothing."""
        before = _snapshot(self.root)
        with self._open() as checkpoints:
            for restore in (
                lambda: checkpoints.restore(2, abstract),
                lambda: checkpoints.restore_latest(abstract),
            ):
                with pytest.raises(CheckpointError, match="another model") as raised:
                    restore()
                self.assertIn(str(self.directory / "2"), str(raised.value))
                yield str(raised.value)
            self.assertEqual(checkpoints.steps(), [1, 2])
        self.assertEqual(_snapshot(self.root), before)
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
        for message in self._errors(_abstract(_state() | changes)):
            for part in parts:
                self.assertIn(part, message)

    def test_an_array_too_many_is_named(self):
        abstract = _abstract(_state())
        del abstract["rng"]
        for message in self._errors(abstract):
            self.assertIn("rng: (2,) in the checkpoint, absent in the model", message)

    def test_many_arrays_are_not_all_listed(self):
        many = {f"a{number:02}": jnp.zeros(2) for number in range(30)}
        for message in self._errors(_abstract(_state() | many)):
            self.assertIn("30 arrays differ", message)
            self.assertLen(message.splitlines(), 12)

    @parameterized.named_parameters(
        ("more", {"others": {}}, "others"),
        ("deeper", {"averages": {"kernel": {}}}, "averages/kernel"),
        ("fewer", {"optimizer": (Pair(jnp.int32(0), Empty()), None)}, "optimizer/2"),
    )
    def test_empty_parts_are_no_damage(self, changes, name):
        for message in self._errors(_abstract(_state() | changes)):
            self.assertIn(f"\n  {name}: ", message)

    def test_the_kind_of_an_empty_part_does_not_matter(self):
        for empty in ({}, (), None, Empty()):
            abstract = _abstract(_state() | {"averages": empty})
            with self._open(read_only=True) as checkpoints:
                state, _ = checkpoints.restore(2, abstract)
            _assert_same_bits(state, _state(2) | {"averages": empty})


def _disk(free):
    return mock.patch.object(shutil, "disk_usage", return_value=mock.Mock(free=free))


class PlacesTest(_SavedTestCase):
    """Directories that users moved, linked, added or lost."""

    def test_a_checkpoint_on_another_disk_is_read_and_left_there(self):
        elsewhere = self.root / "elsewhere"
        (self.directory / "2").rename(elsewhere)
        (self.directory / "2").symlink_to(elsewhere)
        before = _snapshot(elsewhere)
        self._assert_intact(1, 2)
        with self._open() as checkpoints:
            step, *result = checkpoints.restore_latest(_abstract(_state()))
            self.assertEqual(step, 2)
            self._assert_restores(result, 2)
            for step in (3, 4):
                self._save(checkpoints, step)
        self._assert_intact(3, 4)
        self.assertFalse((self.directory / "2").is_symlink())
        self.assertEqual(_snapshot(elsewhere), before)
        self.assertEmpty(self.said)

    def test_a_link_to_a_disk_that_is_not_there_is_told(self):
        shutil.rmtree(self.directory / "2")
        (self.directory / "2").symlink_to(self.root / "nowhere")
        with self._open() as checkpoints:
            step, *_ = checkpoints.restore_latest(_abstract(_state()))
        self.assertEqual(step, 1)
        self.assertIn("step 2 is damaged", self.said[0])

    def test_one_that_is_removed_while_it_is_read_is_told_as_gone(self):
        with self._open(read_only=True) as checkpoints:
            shutil.rmtree(self.directory / "2")
            with pytest.raises(CheckpointError, match="it is gone: a run that goes on"):
                checkpoints.restore(2, _abstract(_state()))

    @parameterized.parameters("directory", "file")
    def test_what_is_no_checkpoint_is_told(self, kind):
        path = self.directory / "7"
        path.mkdir() if kind == "directory" else path.write_text("7")
        with mock.patch.object(sys, "stderr", io.StringIO()) as printed:
            library_output.silence_libraries()
            with self._open() as checkpoints:
                step, *_ = checkpoints.restore_latest(_abstract(_state()))
                self._save(checkpoints, 3)
        self.assertEqual(step, 2)
        self.assertIn("step 7 is damaged", self.said[0])
        self.assertEqual(printed.getvalue(), "")
        self._assert_intact(2, 3)

    @parameterized.parameters("007", "7x", "-7", "\u0667")
    def test_other_names_are_left_alone(self, name):
        (self.directory / name).mkdir()
        with self._open() as checkpoints:
            self._save(checkpoints, 3)
        self.assertTrue((self.directory / name).is_dir())
        self.assertEqual(checkpoints.steps(), [2, 3])
        self.assertEmpty(self.said)

    def test_older_ones_that_a_kill_left_are_removed(self):
        for step in (10, 20):
            with self._open() as checkpoints:
                self._save(checkpoints, step, accuracy=step / 100)
            for number in (1, 2):
                shutil.copytree(
                    self.saved / "checkpoints" / str(number),
                    self.directory / str(number),
                    dirs_exist_ok=True,
                )
        (self.directory / ".1.old").mkdir()
        with self._open() as checkpoints:
            self.assertEqual(checkpoints.steps(), [1, 2, 10, 20])
            checkpoints.restore_latest(_abstract(_state()))
        names = sorted(path.name for path in self.directory.iterdir())
        self.assertEqual(names, ["10", "20"])
        self.assertEmpty(self.said)

    def test_older_ones_are_kept_where_newer_ones_are_damaged(self):
        with self._open() as checkpoints:
            self._save(checkpoints, 3)
        shutil.copytree(self.saved / "checkpoints" / "1", self.directory / "1")
        for step in (2, 3):
            _flip(self.directory / str(step) / "checksums.json")
        with self._open() as checkpoints:
            step, *_ = checkpoints.restore_latest(_abstract(_state()))
        self.assertEqual(step, 1)

    def _rewrite_position(self, step, **changes):
        """Changes fields of a position, with their checksums; `None` removes one."""
        path = self.directory / str(step) / "position" / "metadata"
        fields = json.loads(path.read_text()) | changes
        fields = {name: value for name, value in fields.items() if value is not None}
        path.write_text(json.dumps(fields))
        checksums.write(self.directory / str(step), step)

    def test_the_format_before_is_read(self):
        self._rewrite_position(2, version=None)
        with self._open() as checkpoints:
            step, state, _ = checkpoints.restore_latest(_abstract(_state()))
        self.assertEqual(step, 2)
        _assert_same_bits(state, _state(2))

    def test_a_later_format_is_refused_and_left_there(self):
        self._rewrite_position(2, version=3)
        with self._open() as checkpoints:
            for restore in (
                checkpoints.restore_latest,
                functools.partial(checkpoints.restore, 2),
            ):
                with pytest.raises(CheckpointError, match=r"format 3, .* up to 2"):
                    restore({"another": jax.ShapeDtypeStruct((3,), jnp.float32)})
        with self._open(read_only=True) as checkpoints:
            self.assertEqual(checkpoints.steps(), [1, 2])

    @parameterized.parameters(
        (b"[" * 100_000, 1),
        (b"[]", 1),
        (b"{}", 1),
        (b'{"test_accuracy": "high"}', 2),
        (b'{"test_accuracy": [1]}', 2),
    )
    def test_a_position_of_something_else(self, content, expected):
        """Written with its checksums, as by another program."""
        (self.directory / "2" / "position" / "metadata").write_bytes(content)
        checksums.write(self.directory / "2", 2)

        def problem(step, state, position):
            del step, state
            return "" if "test_accuracy" in position else "no accuracy"

        with self._open(problem=problem) as checkpoints:
            self.assertIsNone(checkpoints.best_step())
            step, *_ = checkpoints.restore_latest(_abstract(_state()))
        self.assertEqual(step, expected)


class WritingFailsTest(_SavedTestCase):
    def test_too_little_room(self):
        state = {"w": jnp.zeros(3 * _MIB // 4, jnp.float32)}
        with self._open() as checkpoints:
            before = _files(self.root)
            with (
                _disk(3 * _MIB - 1),
                pytest.raises(CheckpointError, match=r"3 MiB.*3 MiB"),
            ):
                checkpoints.save(3, state, {}, 0.9)
            self.assertEqual(checkpoints.steps(), [1, 2])
            self.assertIsNone(checkpoints.best_step())
        self.assertEqual(_files(self.root), before)
        self._assert_intact(1, 2)

    def test_room_that_is_made_is_used(self):
        with self._open() as checkpoints:
            with _disk(10), pytest.raises(CheckpointError):
                self._save(checkpoints, 3)
            self._save(checkpoints, 3)
        self._assert_intact(2, 3)

    def test_just_enough_room(self):
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(_state()))
        with self._open() as checkpoints, _disk(size):
            self._save(checkpoints, 3)
        self._assert_intact(2, 3)

    def test_a_directory_that_has_gone(self):
        aside = self.directory.rename(self.root / "aside")
        with self._open(aside) as checkpoints:
            aside.rename(self.directory)
            with pytest.raises(CheckpointError, match=str(aside)):
                self._save(checkpoints, 3)
        self._assert_intact(1, 2)

    def test_a_directory_that_has_become_a_file(self):
        aside = self.directory.rename(self.root / "aside")
        with self._open(aside) as checkpoints:
            aside.rename(self.directory)
            aside.touch()
            with pytest.raises(CheckpointError, match=str(aside)):
                self._save(checkpoints, 3)
        self.assertEqual(aside.read_bytes(), b"")
        self._assert_intact(1, 2)

    def _run(self, by):
        """Saves, and does what is to tell of it if that fails."""
        with self._open() as checkpoints:
            self._save(checkpoints, 3)
            if by == "wait":
                checkpoints.wait()
            if by == "save":
                self._save(checkpoints, 4)
            if by == "another":
                raise ZeroDivisionError("of the run")

    @parameterized.parameters("wait", "save", "exit")
    def test_an_error_in_the_background_is_told_by_the_next(self, by):
        reason = OSError(28, "No space left on device")
        with (
            mock.patch.object(checksums, "write", side_effect=reason),
            pytest.raises(CheckpointError, match="No space left") as raised,
        ):
            self._run(by)
        self.assertIn(str(self.directory), str(raised.value))
        self._assert_intact(1, 2)
        with self._open() as checkpoints:
            self.assertEqual(checkpoints.steps(), [1, 2])
            self._save(checkpoints, 3)
        (line,) = self.said
        self.assertIn("was not written to its end", line)
        self._assert_intact(2, 3)

    def test_another_error_is_not_hidden(self):
        with (
            mock.patch.object(checksums, "write", side_effect=OSError(28, "")),
            pytest.raises(ZeroDivisionError, match="of the run") as raised,
        ):
            self._run("another")
        self.assertIsNone(raised.value.__cause__)
        self._assert_intact(1, 2)

    def test_another_error_lets_the_writing_end(self):
        with pytest.raises(ZeroDivisionError, match="of the run"):
            self._run("another")
        self._assert_intact(2, 3)


if __name__ == "__main__":
    absltest.main()
