import dataclasses
import itertools

import chex
import numpy as np
import sklearn.datasets
from absl.testing import absltest, parameterized

from train import data
from train.data import digits

_BATCH = 100


def _numbered():
    """The digits, each labelled with its own number and left as it is."""
    dataset = data.load("digits", "", 8)

    def numbered(examples):
        return [example | {"label": i} for i, example in enumerate(examples)]

    return dataclasses.replace(
        dataset, train=numbered(dataset.train), test=numbered(dataset.test)
    )


class DigitsTest(parameterized.TestCase):
    def test_the_split_is_fixed_and_has_every_image_once(self):
        train, test = digits.split()
        again, _ = digits.split()
        chex.assert_trees_all_equal(train, again)
        images = [example["image"].tobytes() for example in (*train, *test)]
        source = sklearn.datasets.load_digits().images
        expected = [np.round(image * (255 / 16)).astype(np.uint8) for image in source]
        self.assertCountEqual(images, [image.tobytes() for image in expected])

    def test_the_sizes_are_those_announced(self):
        info, dataset = data.info("digits"), data.load("digits", "", 32)
        self.assertLen(dataset.train, info.train_examples)
        self.assertLen(dataset.test, info.test_examples)
        for examples in (dataset.train, dataset.test):
            labels = {example["label"] for example in examples}
            self.assertEqual(labels, set(range(info.num_classes)))
            self.assertEqual(examples[0]["image"].shape, (8, 8, info.channels))
            self.assertEqual(examples[0]["image"].dtype, np.uint8)

    def test_every_digit_has_its_share_of_the_test_images(self):
        counts = [
            np.bincount([example["label"] for example in part])
            for part in digits.split()
        ]
        np.testing.assert_allclose(counts[0] / 1437, counts[1] / 360, atol=0.003)

    def test_prepared_pixels_are_normalised(self):
        train, _ = digits.split()
        pixels = np.stack([digits.prepare(example["image"], 8) for example in train])
        chex.assert_shape(pixels, (1437, 8, 8, 1))
        chex.assert_type(pixels, np.float32)
        self.assertAlmostEqual(pixels.mean(), 0, delta=0.01)
        self.assertAlmostEqual(pixels.std(), 1, delta=0.01)
        chex.assert_shape(digits.prepare(train[0]["image"], 32), (32, 32, 1))

    def test_shifts_are_the_nine_of_at_most_a_pixel(self):
        image = digits.split()[0][0]["image"]
        padded = np.pad(image[..., 0], 1)
        expected = {
            padded[top : top + 8, left : left + 8].tobytes()
            for top, left in itertools.product(range(3), repeat=2)
        }
        rng = np.random.default_rng(0)
        seen = {digits.shift(image, rng)[..., 0].tobytes() for _ in range(200)}
        self.assertEqual(seen, expected)


class TrainingBatchesTest(parameterized.TestCase):
    def test_every_epoch_has_its_own_order_and_no_example_twice(self):
        batches = data.training_batches(_numbered(), _BATCH, seed=0)
        epochs = [
            np.concatenate([next(batches)["label"] for _ in range(1437 // _BATCH)])
            for _ in range(3)
        ]
        for epoch in epochs:
            self.assertLen(set(epoch.tolist()), 1400)
        for one, other in itertools.combinations(epochs, 2):
            self.assertLess(np.mean(one == other), 0.05)

    def test_the_seed_decides(self):
        dataset = data.load("digits", "", 8)
        one, same, other = (
            next(data.training_batches(dataset, _BATCH, seed)) for seed in (0, 0, 1)
        )
        chex.assert_trees_all_equal(one, same)
        self.assertFalse(np.array_equal(one["image"], other["image"]))
        chex.assert_shape(one["image"], (_BATCH, 8, 8, 1))
        chex.assert_type([one["image"], one["mask"], one["label"]], ["f4", "f4", "i4"])
        self.assertEqual(one["mask"].sum(), _BATCH)

    def test_a_state_leads_back_to_its_place(self):
        dataset = data.load("digits", "", 8)
        batches = data.training_batches(dataset, _BATCH, seed=0)
        for _ in range(17):  # into the second epoch
            next(batches)
        state = batches.get_state()
        expected = [next(batches) for _ in range(3)]
        resumed = data.training_batches(dataset, _BATCH, seed=0)
        resumed.set_state(state)
        chex.assert_trees_all_equal([next(resumed) for _ in range(3)], expected)


class EvaluationBatchesTest(parameterized.TestCase):
    def test_every_example_once_in_order_and_the_last_batch_padded(self):
        batches = list(data.evaluation_batches(_numbered(), _BATCH))
        self.assertEqual([len(batch["label"]) for batch in batches], [_BATCH] * 4)
        self.assertEqual(
            [batch["mask"].sum() for batch in batches], [100, 100, 100, 60]
        )
        real = [batch["label"][batch["mask"] > 0] for batch in batches]
        np.testing.assert_array_equal(np.concatenate(real), np.arange(360))


if __name__ == "__main__":
    absltest.main()
