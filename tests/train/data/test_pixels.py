import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from train import data
from train.config.defaults import get_defaults
from train.data import pixels


def _normaliser(dataset, normalise):
    config = get_defaults()
    config.dataset, config.normalise = dataset, normalise
    return pixels.normaliser(config)


def _pixels(channels):
    """All levels in every channel, in another order in each."""
    rng = np.random.default_rng(0)
    levels = [rng.permutation(np.uint8(range(256))) for _ in range(channels)]
    return np.stack(levels, axis=-1).reshape(4, 8, 8, channels)


class NormaliserTest(parameterized.TestCase):
    @parameterized.parameters(*data.DATASETS)
    def test_of_the_dataset_it_is_numpys_with_its_constants(self, dataset):
        info = data.info(dataset)
        pixels = _pixels(info.channels)
        found = jax.jit(_normaliser(dataset, "dataset"))(pixels)
        self.assertEqual((found.shape, found.dtype), (pixels.shape, jnp.float32))
        expected = (pixels.astype(np.float64) - info.mean) / info.std
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)

    def test_channels_have_constants_of_their_own(self):
        grey = np.full((1, 1, 1, 3), 128, np.uint8)
        found = np.ravel(_normaliser("cifar10", "dataset")(grey))
        # (128/255 - mean) / std with the constants published for CIFAR-10.
        expected = [
            (128 / 255 - 0.4914) / 0.2470,
            (128 / 255 - 0.4822) / 0.2435,
            (128 / 255 - 0.4465) / 0.2616,
        ]
        np.testing.assert_allclose(found, expected, rtol=1e-5)

    @parameterized.parameters(*data.DATASETS)
    def test_to_the_unit_it_is_from_minus_one_to_one(self, dataset):
        pixels = _pixels(data.info(dataset).channels)
        found = jax.jit(_normaliser(dataset, "unit"))(pixels)
        self.assertEqual((found.shape, found.dtype), (pixels.shape, jnp.float32))
        expected = np.interp(pixels, [0, 255], [-1, 1])
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
        self.assertEqual((found.min(), found.max()), (-1, 1))

    def test_the_digits_have_mean_zero_and_deviation_one(self):
        dataset = data.load("digits", "", 8, "none")
        pixels = np.stack([example["image"] for example in dataset.train])
        found = np.asarray(_normaliser("digits", "dataset")(pixels), np.float64)
        self.assertAlmostEqual(found.mean(), 0, delta=0.01)
        self.assertAlmostEqual(found.std(), 1, delta=0.01)


if __name__ == "__main__":
    absltest.main()
