import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from tests.train.runs.checkpoints import cases


class RoundTripTest(cases.CheckpointsTest):
    @parameterized.parameters(None, 0.1 + 0.2, 0.0, 1.0)
    def test_all_bits_and_the_position_come_back(self, accuracy):
        with self.open() as checkpoints:
            self.save(checkpoints, 5, accuracy)
        with self.open() as checkpoints:
            abstract = cases.abstract_state()
            self.assert_restores(checkpoints.restore(5, abstract), 5, accuracy)
            step, *result = checkpoints.restore_latest(abstract)
        self.assertEqual(step, 5)
        self.assert_restores(result, 5, accuracy)
        self.assertEmpty(self.said)

    def test_an_accuracy_of_nan_comes_back(self):
        with self.open() as checkpoints:
            self.save(checkpoints, 5, math.nan)
        with self.open() as checkpoints:
            _, position = checkpoints.restore(5, cases.abstract_state())
            self.assertIsNone(checkpoints.best_step())
        self.assertTrue(math.isnan(position["test_accuracy"]))

    def test_no_checkpoint_is_none(self):
        with self.open() as checkpoints:
            self.assertIsNone(checkpoints.restore_latest(cases.abstract_state()))
            self.assertIsNone(checkpoints.best_step())
            self.assertEqual(checkpoints.steps(), [])

    def test_a_dtype_that_is_asked_for_is_converted_to(self):
        state = {"w": jnp.array([1.0, 1.00390625, 3.0]), "n": jnp.array(7, jnp.int32)}
        wanted = {"w": state["w"].astype(jnp.bfloat16), "n": jnp.array(7.0)}
        with self.open() as checkpoints:
            checkpoints.save(1, state, {}, None)
            checkpoints.wait()
            restored, _ = checkpoints.restore(1, cases.abstract(wanted))
        cases.assert_same_bits(restored, wanted)

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
        with self.open() as checkpoints:
            checkpoints.save(1, state, {}, None)
            checkpoints.wait()
            restored, _ = checkpoints.restore(1, cases.abstract(state))
        cases.assert_same_bits(restored, state)


class ShardingTest(cases.CheckpointsTest):
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
            "kernel": jnp.asarray(np.resize(cases.FLOATS, (8, 8))),
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
        abstract = cases.abstract(state, target)
        abstract["step"] = jax.ShapeDtypeStruct((), jnp.int32, sharding=of_scalar)
        with self.open() as checkpoints:
            checkpoints.save(3, sharded, {}, None)
        with self.open(read_only=True) as checkpoints:
            restored, _ = checkpoints.restore(3, abstract)
        cases.assert_same_bits(restored, state | {"step": jnp.int32(3)})
        for name, leaf in restored.items():
            self.assertEqual(leaf.sharding, of_scalar if name == "step" else target)


if __name__ == "__main__":
    absltest.main()
