import functools
import itertools
import math
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from configs import digits_resnet18
from tests.train import commands
from tests.train.fields import refusal
from train import data, models
from train.config import mesh_axes, validation
from train.config.config import model_section
from train.config.defaults import get_defaults
from train.engine import accumulation
from train.engine import mesh as mesh_lib
from train.engine import step as step_lib

_DEVICES = 8
_BATCH = 16
# Sizes of the mesh's axes.
_MESHES = ((8, 1), (4, 2), (1, 8))

_MODELS = {
    "vit": model_section("vit_mu", patch_size=2, dropout=0.1),
    "vit_scanned": model_section("vit_mu", patch_size=2, scan=True),
    "resnet": model_section("resnet18", width=16, stem="cifar"),
}
# Presets, and layers with chunks that are longer than a sample of some of them: memory,
# layers, and fields of the policy.
_POLICIES = {
    "baseline": ("baseline", "flax", {}),
    "dropit": ("dropit", "flax", {}),
    "lean": ("lean", "flax", {}),
    "layers": ("baseline", "dropit", {"chunk_size": 2**14, "value_dtype": None}),
}
# A ResNet-18 of two blocks: most of the time is that of compilation.
_SMALL = mock.patch.dict(models._MODELS, commands.SMALL_RESNET)


def setUpModule():
    _SMALL.start()


def tearDownModule():
    _SMALL.stop()


def _config(model="vit", policy="baseline", **fields):
    config = get_defaults()
    config.dataset, config.image_size = "digits", 8
    config.batch_size, config.num_steps = _BATCH, 10
    config.model = _MODELS[model]
    config.memory, config.layers, changes = _POLICIES[policy]
    config.dropit.update(changes)
    config.optimizer.learning_rate = 0.1
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 1.0
    with config.unlocked():
        config.update(fields)
    validation.validate(config, _DEVICES)
    return config


def _mesh(shape):
    config = ConfigDict({"mesh": {"data": shape[0], "fsdp": shape[1]}})
    return mesh_lib.create(config)


def _batch(size=_BATCH):
    rng = np.random.default_rng(0)
    return data.Batch(
        image=rng.integers(0, 256, (size, 8, 8, 1), dtype=np.uint8),
        label=rng.integers(0, 10, size, dtype=np.int32),
        # The last two are padding.
        mask=np.float32(np.arange(size) < size - 2),
    )


@functools.cache
def _state(**fields):
    """A state of NumPy arrays, its floating-point numbers random and in float64.

    No kernel is zero, as the head of an untrained ViT is, so that all gradients differ
    from zero; nor is the momentum.
    """
    state, rng = step_lib.abstract_state(_config(**fields)), np.random.default_rng(1)

    def numbers(leaf):
        if leaf.dtype == np.float32:
            return 0.2 * rng.normal(size=leaf.shape)
        return np.zeros(leaf.shape, leaf.dtype)

    return jax.tree.map(numbers, state).replace(
        # Means and variances.
        batch_stats=jax.tree.map(lambda leaf: np.ones(leaf.shape), state.batch_stats)
    )


def _on_mesh(shape, **fields):
    """The mesh, the shardings of the state, the state and the batch on it."""
    mesh, state = _mesh(shape), _state(**fields)
    shardings = mesh_lib.state_sharded(mesh, state)
    placed = jax.device_put(state, shardings)
    return mesh, shardings, placed, mesh_lib.placer(mesh)(_batch())


class CreateTest(parameterized.TestCase):
    @parameterized.parameters(
        (-1, 1, (8, 1)),
        (-1, 2, (4, 2)),
        (2, -1, (2, 4)),
        (1, 8, (1, 8)),
        (-1, 8, (1, 8)),
    )
    def test_takes_all_devices(self, data_axis, fsdp_axis, expected):
        mesh = _mesh((data_axis, fsdp_axis))
        self.assertEqual(mesh.axis_names, ("data", "fsdp"))
        self.assertEqual(mesh.devices.shape, expected)
        self.assertEqual(mesh.devices.ravel().tolist(), jax.devices())

    @parameterized.parameters((3, 1), (8, 2), (-1, 3), (2, 2), (16, -1))
    def test_refuses_what_does_not_take_all(self, data_axis, fsdp_axis):
        with pytest.raises(ValueError, match=r"is not 8\."):
            _mesh((data_axis, fsdp_axis))


class StateShardedTest(parameterized.TestCase):
    def _specs(self, shape, **shapes):
        state = {
            name: jax.ShapeDtypeStruct(shape, jnp.float32)
            for name, shape in shapes.items()
        }
        shardings = mesh_lib.state_sharded(_mesh(shape), state)
        return {name: sharding.spec for name, sharding in shardings.items()}

    def test_the_largest_axis_that_can_be_split_evenly(self):
        specs = self._specs(
            (2, 4),
            first=(16, 8),
            last=(8, 16),
            middle=(3, 12, 5),
            not_the_odd_one=(8, 1001),
            equal=(8, 8),
            vector=(4,),
        )
        expected = {
            "first": P("fsdp"),
            "last": P(None, "fsdp"),
            "middle": P(None, "fsdp"),
            "not_the_odd_one": P("fsdp"),
            "equal": P("fsdp"),
            "vector": P("fsdp"),
        }
        self.assertEqual(specs, expected)

    def test_what_cannot_be_split_is_on_every_device(self):
        specs = self._specs((2, 4), odd=(3, 7), small=(2,), scalar=())
        self.assertEqual(specs, dict.fromkeys(specs, P()))

    def test_without_fsdp_all_of_it_is_on_every_device(self):
        specs = self._specs((8, 1), kernel=(16, 8), scalar=())
        self.assertEqual(specs, dict.fromkeys(specs, P()))

    def test_shardings_are_placed_with_shapes_and_dtypes(self):
        config = _config()
        mesh, abstract = _mesh((2, 4)), step_lib.abstract_state(config)
        shardings = mesh_lib.state_sharded(mesh, abstract)
        placed = mesh_lib.placed(abstract, shardings)
        chex.assert_trees_all_equal_shapes_and_dtypes(placed, abstract)
        found = jax.tree.map(lambda leaf: leaf.sharding, placed)
        self.assertEqual(jax.tree.leaves(found), jax.tree.leaves(shardings))
        state = step_lib.initialise(config, shardings)
        for leaf, sharding in zip(
            jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True
        ):
            self.assertEqual(leaf.sharding, sharding)
        # The same numbers, wherever they are computed.
        expected = step_lib.initialise(config)
        chex.assert_trees_all_close(
            jax.device_get(state), jax.device_get(expected), rtol=1e-6, atol=1e-7
        )


class ShapeTest(parameterized.TestCase):
    def test_takes_all_devices_or_is_an_error(self):
        sizes = range(-10, 11)
        for count, *axes in itertools.product(range(1, 9), sizes, sizes):
            try:
                shape = mesh_axes.sizes(*axes, count)
            except ValueError:
                shape = None
            self.assertEqual(shape, _mesh_shape(axes, count), (axes, count))

    def test_two_times_three_are_not_four(self):
        with pytest.raises(ValueError, match="2 x 3 is not 4"):
            mesh_axes.sizes(2, 3, 4)

    @parameterized.parameters(1, 2, 4, 6, 8)
    def test_a_mesh_takes_all_devices(self, count):
        config = digits_resnet18.get_config()
        config.batch_size = 48
        for axes in itertools.product((-2, -1, 0, 1, 2, 3, 4, 8), repeat=2):
            config.mesh.update(data=axes[0], fsdp=axes[1])
            refused = refusal(config, count)
            if _mesh_shape(axes, count):
                self.assertIsNone(refused)
            else:
                self.assertStartsWith(refused, "config.mesh")


def _mesh_shape(axes, count):
    """The shape by trial: the axes that are -1 may be anything."""
    found = [
        shape
        for shape in itertools.product(range(1, count + 1), repeat=2)
        if math.prod(shape) == count
        and all(axis in (-1, size) for axis, size in zip(axes, shape, strict=True))
    ]
    # Of two that may be anything, the first takes all.
    return max(found, default=None)


class PlacerTest(parameterized.TestCase):
    @parameterized.parameters(*_MESHES)
    def test_rows_stay_in_order_and_each_device_has_its_own(self, *shape):
        mesh, rows = _mesh(shape), _batch()
        batch = mesh_lib.placer(mesh)(rows)
        share = _BATCH // _DEVICES
        for name, expected in rows.items():
            placed = batch[name]
            self.assertEqual(placed.dtype, expected.dtype)
            self.assertEqual(placed.shape, expected.shape)
            np.testing.assert_array_equal(placed, expected)
            on = {shard.device: shard.data for shard in placed.addressable_shards}
            for number, device in enumerate(mesh.devices.ravel()):
                mine = expected[number * share : (number + 1) * share]
                np.testing.assert_array_equal(on[device], mine)


class TrainStepTest(parameterized.TestCase):
    # In float64, up to the head, activations differ by so little that all meshes keep
    # the same elements of them.
    def setUp(self):
        super().setUp()
        self.enterContext(jax.enable_x64(True))

    @parameterized.parameters(
        (
            (8, 1),
            {
                "policy": "dropit",
                "model": "vit_scanned",
                "ema_decay": 0.9,
                "accumulate_steps": 2,
            },
        ),
        (
            (4, 2),
            {"policy": "lean", "mixup": 0.2, "label_smoothing": 0.1, "remat": "blocks"},
        ),
        ((4, 2), {"model": "resnet", "policy": "layers"}),
        ((1, 8), {"model": "resnet", "policy": "dropit"}),
    )
    def test_is_that_of_one_device(self, shape, fields):
        """And each device keeps its part of the state, which is donated."""
        mesh, shardings, state, batch = _on_mesh(shape, **fields)
        step = step_lib.train_step(_config(**fields))
        compiled = mesh_lib.compile_training(step, mesh, shardings)
        new, sums = compiled(state, batch)
        self._check_donated(state, batch)
        self._check_parts(new, shardings, shape[1])
        for leaf in jax.tree.leaves(sums):
            self.assertTrue(leaf.sharding.is_fully_replicated)
        expected, expected_sums = jax.jit(step)(_state(**fields), _batch())
        chex.assert_trees_all_equal_shapes_and_dtypes(new, expected)
        found, expected = jax.device_get(((new, sums), (expected, expected_sums)))
        chex.assert_trees_all_close(found[1], expected[1], rtol=1e-6)
        chex.assert_trees_all_close(found[0], expected[0], rtol=1e-6, atol=1e-7)

    def _check_donated(self, state, batch):
        """Checks that the state is donated, and the batch is not."""
        kept = [leaf.shape for leaf in jax.tree.leaves(state) if not leaf.is_deleted()]
        self.assertEmpty(kept)
        self.assertFalse(batch["image"].is_deleted())

    def _check_parts(self, state, shardings, fsdp):
        """Checks that each device keeps its part of a state, and no more."""
        not_there = 0
        for leaf, sharding in zip(
            jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True
        ):
            self.assertTrue(leaf.sharding.is_equivalent_to(sharding, leaf.ndim))
            even = any(n % fsdp == 0 for n in leaf.shape)
            part = leaf.size // fsdp if even else leaf.size
            sizes = [shard.data.size for shard in leaf.addressable_shards]
            self.assertEqual(sizes, [part] * _DEVICES)
            not_there += leaf.size - part
        # Next to nothing is on all devices.
        total = sum(leaf.size for leaf in jax.tree.leaves(state))
        self.assertAlmostEqual(not_there / total, 1 - 1 / fsdp, delta=1e-3)

    @parameterized.parameters(*_MESHES)
    def test_a_part_of_a_batch_is_spread_over_all_devices(self, *shape):
        def gradient(params, stats, part, rng):
            jax.debug.inspect_array_sharding(part, callback=found.append)
            return params, (jnp.sum(part) + params, stats)

        found = []
        mesh = _mesh(shape)
        step = jax.jit(
            accumulation.accumulate(gradient, 2),
            in_shardings=(None, None, mesh_lib.batch_sharded(mesh), None),
        )
        rows = mesh_lib.placer(mesh)(np.arange(float(_BATCH)))
        _, (sums, _) = step(jnp.zeros(()), {}, rows, jax.random.key(0))
        self.assertEqual(sums, np.arange(_BATCH).sum())
        self.assertNotEmpty(found)
        for sharding in found:
            self.assertEqual(sharding.shard_shape((_BATCH // 2,)), (1,))


class EvaluationStepTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.enterContext(jax.enable_x64(True))

    @parameterized.parameters(
        ((4, 2), {"model": "vit", "ema_decay": 0.9}), ((1, 8), {"model": "resnet"})
    )
    def test_is_that_of_one_device(self, shape, fields):
        mesh, shardings, state, batch = _on_mesh(shape, **fields)
        evaluate = step_lib.evaluation_step(_config(**fields))
        sums = mesh_lib.compile_evaluation(evaluate, mesh, shardings)(state, batch)
        expected = jax.jit(evaluate)(_state(**fields), _batch())
        chex.assert_trees_all_close(
            jax.device_get(sums), jax.device_get(expected), rtol=1e-6
        )
        self.assertEqual(sums.count, _BATCH - 2)
        for leaf in (*jax.tree.leaves(state), *jax.tree.leaves(batch)):
            self.assertFalse(leaf.is_deleted())
        for leaf in jax.tree.leaves(sums):
            self.assertTrue(leaf.sharding.is_fully_replicated)


if __name__ == "__main__":
    absltest.main()
