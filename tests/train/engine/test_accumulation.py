import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.engine.accumulation import accumulate

_BATCH, _FEATURES = 24, 3


def _batch():
    """Whole numbers, of which sums are exact."""
    rng = np.random.default_rng(0)
    return {
        "x": np.float32(rng.integers(-4, 5, (_BATCH, _FEATURES))),
        "y": np.float32(rng.integers(-4, 5, _BATCH)),
        "mask": np.ones(_BATCH, np.float32),
    }


def _gradient(params, stats, batch, rng):
    """Of mean squares, with the sum of squares and the number of parts seen."""
    del rng

    def loss_fn(params):
        errors = batch["x"] @ params["w"] + params["b"] - batch["y"]
        loss = jnp.sum(batch["mask"] * errors**2)
        count = jnp.sum(batch["mask"])
        return loss / count, {"loss": loss, "count": count}

    gradients, sums = jax.grad(loss_fn, has_aux=True)(params)
    return gradients, (sums, {"seen": stats["seen"] + 1})


_PARAMS = {"w": np.float32([1, -2, 3]), "b": np.float32(1)}
_STATS = {"seen": np.int32(5)}


class AccumulateTest(parameterized.TestCase):
    @parameterized.parameters(1, 2, 3, 4, 6, 8, 12, 24)
    def test_is_the_gradient_of_the_whole_batch(self, parts):
        batch, rng = _batch(), jax.random.key(0)
        found = jax.jit(accumulate(_gradient, parts))(_PARAMS, _STATS, batch, rng)
        gradients, (sums, stats) = found
        errors = batch["x"] @ _PARAMS["w"] + _PARAMS["b"] - batch["y"]
        expected = {
            "w": 2 * batch["x"].T @ errors / _BATCH,
            "b": 2 * errors.mean(),
        }
        chex.assert_trees_all_close(gradients, expected, rtol=1e-6)
        self.assertEqual(sums, {"loss": np.sum(errors**2), "count": _BATCH})
        self.assertEqual(stats["seen"], 5 + parts)
        whole = jax.jit(_gradient)(_PARAMS, _STATS, batch, rng)
        chex.assert_trees_all_equal_shapes_and_dtypes(found, whole)

    @parameterized.parameters(1, 2, 3, 8)
    def test_parts_are_interleaved_and_in_order(self, parts):
        size = _BATCH // parts

        def gradient(params, stats, batch, rng):
            seen = jnp.concatenate([stats[1:], batch[None]])
            return params, (jnp.sum(batch), seen)

        stats = jnp.zeros((parts, size), jnp.int32)
        batch = np.arange(_BATCH, dtype=np.int32)
        found = accumulate(gradient, parts)(0.0, stats, batch, jax.random.key(0))
        _, (total, seen) = found
        np.testing.assert_array_equal(
            seen, [batch[part::parts] for part in range(parts)]
        )
        self.assertEqual(total, batch.sum())

    def test_every_part_has_its_own_random_state(self):
        def gradient(params, stats, batch, rng):
            number = jax.random.normal(rng, (5,))
            return number, (number, stats)

        rng = jax.random.key(3)
        gradients, (sums, _) = accumulate(gradient, 4)(0.0, (), np.zeros(8), rng)
        numbers = np.stack(
            [
                jax.random.normal(jax.random.fold_in(rng, part), (5,))
                for part in range(4)
            ]
        )
        self.assertLen(np.unique(numbers), 20)
        np.testing.assert_allclose(gradients, numbers.mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(sums, numbers.sum(axis=0), rtol=1e-6)

    def test_nothing_may_be_without_arrays(self):
        def gradient(params, stats, batch, rng):
            return params, ({}, stats)

        found = accumulate(gradient, 2)({}, {}, np.zeros(4), jax.random.key(0))
        self.assertEqual(found, ({}, ({}, {})))

    def test_the_model_is_in_the_program_once(self):
        def program(parts):
            step = accumulate(_gradient, parts)
            args = (_PARAMS, _STATS, _batch(), jax.random.key(0))
            return re.sub(r"\d+", "", str(jax.make_jaxpr(step)(*args)))

        self.assertEqual(program(2).count("dot_general"), program(12).count("dot_gen"))

    @parameterized.parameters(2, 4)
    def test_parts_stay_on_their_devices(self, devices):
        mesh = Mesh(np.array(jax.devices()[:devices]), "data")
        split = NamedSharding(mesh, PartitionSpec("data"))
        whole = NamedSharding(mesh, PartitionSpec())
        step = jax.jit(
            accumulate(_gradient, 3), in_shardings=(whole, whole, split, whole)
        )
        arguments = (_PARAMS, _STATS, _batch(), jax.random.key(0))
        text = step.lower(*arguments).compile().as_text()
        # Gradients and sums are added up over the devices; no example goes to another.
        self.assertIn("all-reduce", text)
        for moved in ("all-gather", "all-to-all", "collective-permute"):
            self.assertNotIn(moved, text)
        chex.assert_trees_all_close(
            step(*arguments),
            jax.jit(_gradient)(_PARAMS, {"seen": np.int32(7)}, *arguments[2:]),
            rtol=1e-6,
        )


if __name__ == "__main__":
    absltest.main()
