import contextlib
import dataclasses
import functools
import io
import itertools
import math
import multiprocessing
import struct
import subprocess
import tempfile
import tracemalloc
import warnings
import zlib
from unittest import mock

import chex
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import sklearn.datasets
from absl.testing import absltest, parameterized
from PIL import Image

from tests.data import write_tiny_datasets as tiny
from train import data
from train.data import augment, digits, images

_BATCH = 100
_TINY = str(tiny.DIRECTORY)


@dataclasses.dataclass(frozen=True)
class _Numbered:
    """Examples, each labelled with its own number."""

    source: object

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return self.source[index] | {"label": index}


def _numbered(dataset):
    return dataclasses.replace(
        dataset, train=_Numbered(dataset.train), test=_Numbered(dataset.test)
    )


@functools.cache
def _digits(augmentation="shift", size=8):
    return _numbered(data.load("digits", "", size, augmentation))


def _directory(test):
    """A new directory, which is deleted after the test."""
    return test.enterContext(tempfile.TemporaryDirectory())


def _take(batches, count):
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return [{key: np.array(batch[key]) for key in batch} for batch in taken]


def _jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90, **options)
    return file.getvalue()


def _png(side):
    """A PNG that says that it is of this height and width, and has no pixel."""

    def chunk(kind, content):
        crc = zlib.crc32(kind + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + kind + content + crc

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b""))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def _photograph():
    return Image.fromarray(sklearn.datasets.load_sample_image("china.jpg"))


class DigitsTest(parameterized.TestCase):
    def test_the_split_is_fixed_and_has_every_image_once(self):
        train, test = digits.split()
        again, _ = digits.split()
        chex.assert_trees_all_equal(list(train), list(again))
        found = [example["image"].tobytes() for example in (*train, *test)]
        source = sklearn.datasets.load_digits().images
        expected = [np.round(image * (255 / 16)).astype(np.uint8) for image in source]
        self.assertCountEqual(found, [image.tobytes() for image in expected])

    def test_the_sizes_are_those_announced(self):
        info, dataset = data.info("digits"), data.load("digits", "", 32, "none")
        self.assertLen(dataset.train, info.train_examples)
        self.assertLen(dataset.test, info.test_examples)
        for examples in (dataset.train, dataset.test):
            labels = {example["label"] for example in examples}
            self.assertEqual(labels, set(range(info.num_classes)))
            chex.assert_shape(dataset.test_image(examples[0]), (32, 32, info.channels))

    def test_every_digit_has_its_share_of_the_test_images(self):
        counts = [np.bincount(part.labels) for part in digits.split()]
        np.testing.assert_allclose(counts[0] / 1437, counts[1] / 360, atol=0.003)

    def test_the_constants_are_those_of_the_training_pixels(self):
        info, pixels = data.info("digits"), digits.split()[0].images
        self.assertAlmostEqual(pixels.mean(), info.mean[0], delta=0.1)
        self.assertAlmostEqual(pixels.std(), info.std[0], delta=0.1)


class AugmentationTest(parameterized.TestCase):
    @parameterized.parameters((8, 1), (32, 4))
    def test_shifts_are_all_of_at_most_an_eighth(self, side, most):
        image = np.random.default_rng(0).integers(1, 256, (side, side, 3), np.uint8)
        padded = np.pad(image, ((most, most), (most, most), (0, 0)))
        offsets = range(2 * most + 1)
        expected = {
            padded[top : top + side, left : left + side].tobytes()
            for top, left in itertools.product(offsets, repeat=2)
        }
        rng = np.random.default_rng(0)
        seen = [augment.shift({"image": image}, rng, side) for _ in range(1000)]
        self.assertEqual({each.tobytes() for each in seen}, expected)

    @parameterized.parameters("shift_flip", "resized_crop")
    def test_every_other_image_is_mirrored(self, name):
        ramp = np.tile(np.arange(32, dtype=np.uint8)[None, :, None], (32, 1, 3)) * 8
        rng, change = np.random.default_rng(0), augment.augmenter(name, 32)
        mirrored = [
            (view := change({"image": ramp}, rng).astype(int))[16, 8, 0]
            > view[16, 20, 0]
            for _ in range(1000)
        ]
        self.assertAlmostEqual(np.mean(mirrored), 0.5, delta=0.06)

    def test_random_boxes_have_the_areas_and_shapes_announced(self):
        rng = np.random.default_rng(0)
        boxes = np.array([augment.random_box(1000, 1000, rng) for _ in range(4000)])
        left, top, right, bottom = boxes.T
        self.assertTrue((boxes >= 0).all() and (boxes <= 1000).all())
        area, aspect = (
            (right - left) * (bottom - top) / 1e6,
            (right - left) / (bottom - top),
        )
        self.assertBetween(area.min(), 0.079, 0.09)
        self.assertGreater(area.max(), 0.9)
        self.assertBetween(aspect.min(), 0.745, 0.76)
        self.assertBetween(aspect.max(), 1.31, 1.345)
        # Small parts fit whatever their shape: of those nothing is refused.
        small = area < 0.7
        self.assertAlmostEqual(area[small].mean(), (0.08 + 0.7) / 2, delta=0.012)
        self.assertAlmostEqual(np.log(aspect[small]).mean(), 0, delta=0.01)
        uniform = 2 * math.log(4 / 3) / math.sqrt(12)
        self.assertAlmostEqual(np.log(aspect[small]).std(), uniform, delta=0.006)

    def test_what_never_fits_is_cut_from_the_middle(self):
        box = augment.random_box(1000, 10, np.random.default_rng(0))
        self.assertEqual(box, (493, 0, 506, 10))

    def test_crops_of_arrays_are_pillows(self):
        image = np.asarray(_photograph())[200:264, 200:264]
        seed = np.random.default_rng(5)
        box = augment.random_box(64, 64, np.random.default_rng(5))
        found = augment.resized_crop({"image": image}, seed, 24)
        expected = np.asarray(
            Image.fromarray(image).crop(box).resize((24, 24), Image.Resampling.BILINEAR)
        )
        off = [
            np.abs(found.astype(int) - each)[1:-1, 1:-1].max()
            for each in (expected, expected[:, ::-1])
        ]
        self.assertLessEqual(min(off), 1)  # rounded otherwise; edges see beyond the box
        self.assertGreater(max(off), 30)

    @parameterized.parameters(*range(8))
    def test_crops_of_jpegs_are_near_those_of_all_pixels(self, seed):
        encoded = _jpeg(_photograph())
        box = augment.random_box(640, 427, np.random.default_rng(seed))
        found = images.crop(images.open_image(encoded), box, 40)
        expected = (
            Image.open(io.BytesIO(encoded))
            .convert("RGB")
            .crop(box)
            .resize((40, 40), Image.Resampling.BILINEAR)
        )
        difference = found.astype(int) - np.asarray(expected)
        self.assertLess(np.abs(difference).mean(), 6)
        self.assertLess(np.abs(difference.mean()), 1)

    @parameterized.product(seed=(0, 1, 2, 3, 4), size=(13, 40, 100, 400))
    def test_jpegs_are_decoded_no_smaller_and_no_larger_than_needed(self, seed, size):
        image = images.open_image(_jpeg(_photograph()))
        left, top, right, bottom = box = augment.random_box(
            640, 427, np.random.default_rng(seed)
        )
        scale = images.set_decoding_divisor(image, box, size)
        self.assertEqual(image.size, (math.ceil(640 / scale), math.ceil(427 / scale)))
        shorter = min(right - left, bottom - top)
        self.assertTrue(scale == 1 or shorter / scale >= size)
        self.assertTrue(scale == 8 or shorter / (2 * scale) < size)

    def test_the_view_to_evaluate_is_the_middle_of_the_resized_image(self):
        encoded = _jpeg(_photograph())
        found = images.evaluation_view({"image": encoded}, 224)
        whole = Image.open(io.BytesIO(encoded)).resize((384, 256), 2)
        expected = np.asarray(whole.crop((80, 16, 304, 240)), int)
        self.assertLess(np.abs(found - expected).mean(), 3)

    @parameterized.parameters("L", "CMYK", "RGB")
    def test_encoded_images_have_three_channels(self, mode):
        image = _photograph().convert(mode)
        png = io.BytesIO()
        image.convert("RGB").save(png, "PNG")
        found = images.evaluation_view({"image": _jpeg(image)}, 32)
        chex.assert_shape(found, (32, 32, 3))
        chex.assert_type(found, np.uint8)
        expected = images.evaluation_view({"image": png.getvalue()}, 32).astype(int)
        self.assertLess(np.abs(found - expected).mean(), 6)

    def test_a_damaged_image_is_an_error(self):
        for broken in (b"no image", _jpeg(_photograph())[:2000]):
            with pytest.raises(data.DataError, match="Damaged image"):
                images.evaluation_view({"image": broken}, 32)

    @parameterized.parameters("GIF", "BMP", "TIFF", "EPS", "PPM", "WEBP")
    def test_other_formats_are_not_opened(self, name):
        """EPS would start Ghostscript."""
        content = io.BytesIO()
        _photograph().save(content, name)
        with (
            mock.patch.object(subprocess, "Popen", side_effect=AssertionError),
            pytest.raises(data.DataError, match="neither JPEG nor PNG"),
        ):
            images.evaluation_view({"image": content.getvalue()}, 32)

    @parameterized.product(side=[20_000, 12_000, 9_500, 2**31 - 1], whole=[True, False])
    def test_the_size_is_looked_at_first(self, side, whole):
        content = _png(side)
        tracemalloc.start()
        with pytest.raises(data.DataError) as caught:
            images.decode(content, (32, 32, 3)) if whole else images.open_image(content)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        self.assertLess(peak, 2**20)
        self.assertRegex(str(caught.value), r"limit|pixels, not 32 x 32|could be")

    @hypothesis.given(
        st.sampled_from(["JPEG", "PNG"]),
        st.lists(st.tuples(st.integers(0, 1999), st.binary(max_size=8)), max_size=4),
        st.integers(0, 2000),
    )
    def test_bytes_are_an_image_or_a_data_error(self, name, changes, length):
        content = io.BytesIO()
        _photograph().resize((24, 20)).save(content, name)
        broken = bytearray(content.getvalue())
        for place, value in changes:
            broken[place : place + len(value)] = value
        with contextlib.suppress(data.DataError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of EXIF data
            found = images.evaluation_view({"image": bytes(broken[:length])}, 8)
            self.assertEqual(found.shape, (8, 8, 3))


class TrainingBatchesTest(parameterized.TestCase):
    def test_every_epoch_has_its_own_order_and_no_example_twice(self):
        batches = data.training_batches(_digits(), _BATCH, seed=0)
        labels = np.array([batch["label"] for batch in _take(batches, 3 * 14)])
        epochs = labels.reshape(3, -1)
        for epoch in epochs:
            self.assertLen(set(epoch.tolist()), 1400)
        for one, other in itertools.combinations(epochs, 2):
            self.assertLess(np.mean(one == other), 0.05)

    def test_an_example_is_changed_otherwise_in_every_epoch(self):
        batches = _take(data.training_batches(_digits(), _BATCH, seed=0), 10 * 14)
        pairs = zip(
            np.concatenate([batch["label"] for batch in batches]),
            np.concatenate([batch["image"] for batch in batches]),
            strict=True,
        )
        seen = {image.tobytes() for label, image in pairs if label == 3}
        self.assertGreater(len(seen), 3)

    def test_the_seed_decides(self):
        one, same, other = (
            _take(data.training_batches(_digits(), _BATCH, seed), 1)[0]
            for seed in (0, 0, 2**63 - 1)
        )
        chex.assert_trees_all_equal(one, same)
        self.assertFalse(np.array_equal(one["image"], other["image"]))
        chex.assert_shape(one["image"], (_BATCH, 8, 8, 1))
        chex.assert_type([one["image"], one["mask"], one["label"]], ["u1", "f4", "i4"])
        self.assertEqual(one["mask"].sum(), _BATCH)

    @parameterized.parameters(2, 4)
    def test_processes_share_the_batches_of_one(self, count):
        # Batches of 100: their quarters fill 57 parts an epoch, of which 56 are used.
        expected = _take(data.training_batches(_digits(), _BATCH, 0), 30)
        parts = [
            _take(
                data.training_batches(
                    _digits(), _BATCH, 0, process_index=i, process_count=count
                ),
                30,
            )
            for i in range(count)
        ]
        for batch, *rows in zip(expected, *parts, strict=True):
            joined = {key: np.concatenate([row[key] for row in rows]) for key in batch}
            chex.assert_trees_all_equal(joined, batch)

    @parameterized.parameters(1, 13, 14, 45)
    def test_a_start_is_the_place_where_it_would_be(self, start):
        expected = _take(data.training_batches(_digits(), _BATCH, 0), start + 2)[start:]
        for count in (1, 2):
            found = _take(
                data.training_batches(
                    _digits(), _BATCH, 0, start=start, process_count=count
                ),
                2,
            )
            for one, other in zip(found, expected, strict=True):
                chex.assert_trees_all_equal(
                    one, {key: other[key][: _BATCH // count] for key in other}
                )

    def test_workers_change_nothing_and_end_with_the_iterator(self):
        dataset = data.load("imagenet2012", _TINY, 32, "resized_crop")
        load = functools.partial(data.training_batches, dataset, 8, 0, start=4)
        batches = load(workers=2)
        found = [next(batches) for _ in range(5)]
        self.assertLen(multiprocessing.active_children(), 2)
        batches.close()
        self.assertEmpty(multiprocessing.active_children())
        chex.assert_trees_all_equal(
            [{key: np.array(each[key]) for key in each} for each in found],
            _take(load(), 5),
        )

    def test_impossible_batches_are_errors(self):
        with pytest.raises(data.DataError, match="1437 training examples"):
            data.training_batches(_digits(), 1438, 0)
        with pytest.raises(data.DataError, match="multiple of 3"):
            data.training_batches(_digits(), _BATCH, 0, process_count=3)


class EvaluationBatchesTest(parameterized.TestCase):
    @parameterized.parameters(1, 2, 4)
    def test_every_example_once_in_order_and_the_last_batch_padded(self, count):
        parts = [
            list(
                data.evaluation_batches(
                    _digits(), _BATCH, process_index=i, process_count=count
                )
            )
            for i in range(count)
        ]
        joined = [
            {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}
            for rows in zip(*parts, strict=True)
        ]
        test = digits.split()[1]
        self.assertEqual([batch["mask"].sum() for batch in joined], [100, 100, 100, 60])
        labels = np.concatenate([batch["label"] for batch in joined])
        np.testing.assert_array_equal(labels, [*range(360), *([0] * 40)])
        found = np.concatenate([batch["image"] for batch in joined])
        np.testing.assert_array_equal(found[:360], test.images)
        self.assertFalse(found[360:].any())
        chex.assert_type(found, np.uint8)

    def test_workers_change_nothing(self):
        dataset = data.load("cifar10", _TINY, 32, "none")
        expected = list(data.evaluation_batches(dataset, 6))
        found = data.evaluation_batches(dataset, 6, workers=2)
        chex.assert_trees_all_equal([dict(each) for each in found], expected)
        found.close()
        self.assertEqual([each["mask"].sum() for each in expected], [6, 6, 4])


if __name__ == "__main__":
    absltest.main()
