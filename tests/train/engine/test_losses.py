import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.special
import scipy.stats
from absl.testing import absltest, parameterized
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from train.engine import losses


def _logits(batch, classes, scale=3.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, batch)
    return np.float32(rng.normal(0, scale, (batch, classes))), labels


class CrossEntropyTest(parameterized.TestCase):
    @parameterized.product(
        smoothing=(0.0, 0.1, 0.9), classes=(2, 10), scale=(1.0, 100.0)
    )
    def test_is_that_of_smoothed_labels(self, smoothing, classes, scale):
        logits, labels = _logits(12, classes, scale)
        found = losses.cross_entropy(jnp.asarray(logits), labels, smoothing)
        self.assertEqual((found.shape, found.dtype), ((12,), jnp.float32))
        smoothed = (1 - smoothing) * np.eye(classes)[labels] + smoothing / classes
        log_p = scipy.special.log_softmax(logits.astype(np.float64), axis=-1)
        expected = -(smoothed * log_p).sum(axis=-1)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(
            found,
            optax.softmax_cross_entropy(logits, np.float32(smoothed)),
            rtol=1e-5,
            atol=1e-5,
        )

    def test_smoothing_is_off_unless_asked_for(self):
        logits, labels = _logits(12, 10)
        np.testing.assert_array_equal(
            losses.cross_entropy(logits, labels),
            losses.cross_entropy(logits, labels, 0.0),
        )

    @parameterized.parameters(0.0, 0.2)
    def test_gradients_are_those_of_probabilities_less_smoothed_labels(self, smoothing):
        logits, labels = _logits(6, 5)
        gradients = jax.grad(
            lambda x: losses.cross_entropy(x, labels, smoothing).sum()
        )(jnp.asarray(logits))
        smoothed = (1 - smoothing) * np.eye(5)[labels] + smoothing / 5
        expected = scipy.special.softmax(logits, axis=-1) - smoothed
        np.testing.assert_allclose(gradients, expected, atol=1e-6)


def _among_largest(logits, label, count):
    """By the order of all classes: NaN first, and of equal ones the earlier first."""
    if np.isnan(logits[label]):
        return False

    def place(label):
        is_nan = np.isnan(logits[label])
        return (not is_nan, 0 if is_nan else -logits[label], label)

    return label in sorted(range(len(logits)), key=place)[:count]


# Few values, so that many are equal.
_VALUES = st.sampled_from([-np.inf, -1.0, 0.0, 1.0, 2.0, np.inf, np.nan])


class IsAmongLargestTest(parameterized.TestCase):
    @parameterized.parameters(1, 5)
    def test_without_ties_it_is_a_place_in_the_order(self, count):
        logits, labels = _logits(200, 10)
        found = losses.is_among_largest(jnp.asarray(logits), labels, count)
        order = np.argsort(-logits, axis=-1)[:, :count]
        np.testing.assert_array_equal(found, (order == labels[:, None]).any(axis=-1))

    @given(
        hnp.arrays(np.float32, (4, 7), elements=_VALUES),
        hnp.arrays(np.int32, 4, elements=st.integers(0, 6)),
        st.integers(1, 8),
    )
    def test_is_numpys_with_ties_and_nan(self, logits, labels, count):
        found = losses.is_among_largest(jnp.asarray(logits), labels, count)
        expected = [
            _among_largest(row, label, count)
            for row, label in zip(logits, labels, strict=True)
        ]
        np.testing.assert_array_equal(found, expected)

    @parameterized.parameters(2, 4, 5)
    def test_of_few_classes_all_are_but_nan_is_not(self, classes):
        logits, labels = _logits(20, classes)
        found = losses.is_among_largest(jnp.asarray(logits), labels, 5)
        np.testing.assert_array_equal(found, True)
        logits[3:7, :] = np.nan
        found = losses.is_among_largest(jnp.asarray(logits), labels, 5)
        expected = np.ones(20, bool)
        expected[3:7] = False
        np.testing.assert_array_equal(found, expected)

    def test_of_equal_logits_the_first_ones_are(self):
        logits, labels = jnp.zeros((10, 10)), np.arange(10)
        found = losses.is_among_largest(logits, labels, 5)
        np.testing.assert_array_equal(found, np.arange(10) < 5)
        self.assertEqual(jnp.argmax(logits[0]), 0)


class MixWeightTest(parameterized.TestCase):
    @parameterized.parameters(1e-4, 0.01, 0.2, 1.0, 100.0)
    def test_is_from_a_half_to_one(self, alpha):
        keys = jax.random.split(jax.random.key(0), 1000)
        weights = np.asarray(jax.vmap(lambda key: losses.mix_weight(key, alpha))(keys))
        self.assertEqual((weights.shape, weights.dtype), ((1000,), np.float32))
        self.assertGreaterEqual(weights.min(), 0.5)
        self.assertLessEqual(weights.max(), 1)

    @parameterized.parameters(0.2, 1.0, 4.0)
    def test_is_of_the_folded_beta_distribution(self, alpha):
        keys = jax.random.split(jax.random.key(1), 4000)
        weights = np.asarray(jax.vmap(lambda key: losses.mix_weight(key, alpha))(keys))
        beta = scipy.stats.beta(alpha, alpha)
        for bound in (0.55, 0.6, 0.7, 0.8, 0.9, 0.99):
            share = beta.cdf(bound) - beta.cdf(1 - bound)
            deviation = np.sqrt(share * (1 - share) / len(weights))
            self.assertAlmostEqual(
                np.mean(weights <= bound), share, delta=4 * deviation
            )


if __name__ == "__main__":
    absltest.main()
