"""The handwritten digits that ship with scikit-learn: 1,797 images of 8x8 pixels.

The images are the test set of the UCI data set "Optical Recognition of Handwritten
Digits" (Alpaydin and Kaynak, 1998).
"""

import numpy as np

from train.data.arrays import DecodedExamples

_TEST_EXAMPLES = 360
_SPLIT_SEED = 0


def split() -> tuple[DecodedExamples, DecodedExamples]:
    """Returns training and test examples, stratified by digit with a fixed seed.

    Images are uint8 `(n, 8, 8, 1)`, scaled from the 17 levels 0 to 16 to [0, 255].
    """
    # Imported here: it takes a third of a command's start, and only digits need it.
    import sklearn.datasets  # noqa: PLC0415
    import sklearn.model_selection  # noqa: PLC0415

    digits = sklearn.datasets.load_digits()
    images = np.round(digits.images[..., None] * (255 / 16)).astype(np.uint8)
    parts = sklearn.model_selection.train_test_split(
        images,
        digits.target,
        test_size=_TEST_EXAMPLES,
        stratify=digits.target,
        random_state=_SPLIT_SEED,
    )
    train_images, test_images, train_labels, test_labels = parts
    return DecodedExamples(train_images, train_labels), DecodedExamples(
        test_images, test_labels
    )
