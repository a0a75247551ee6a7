"""Prepares a dataset for training: `python -m train.prepare NAME --data_dir=DIR`.

TFDS downloads the dataset and writes it in a format with random access.
"""

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from train import data
from train.config import flags as config_flags
from train.data import datasets, prepared
from train.system.text import printable

_DATA_DIR = config_flags.data_dir()

# Packages that TFDS needs to prepare datasets, but not to read them.
_PACKAGES = ("tensorflow", "importlib_resources")
_MANUAL_FILES = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")


def prepare(name: str, data_dir: str) -> str:
    """Prepares a dataset, unless it is already prepared.

    Args:
      name: one of `data.DATASETS`.
      data_dir: directory of prepared datasets; TFDS's default directory if empty.

    Returns:
      A message for the user.

    Raises:
      DataError: the name is unknown, a package or a manual download is missing, TFDS
        failed, or the prepared dataset is damaged or in another format.
    """
    if name not in data.DATASETS:
        known = ", ".join(map(repr, data.DATASETS))
        raise data.DataError(f"There is no dataset {name!r}; known are {known}.")
    splits = datasets.splits(name)
    if not splits:
        return f"{name} comes with a package: there is nothing to prepare."
    if prepared.newest_version(name, data_dir):
        directory = prepared.checked_directory(name, data_dir, splits)
        return f"{name} is already in {directory}."
    where = prepared.datasets_directory(data_dir)
    if name == "imagenet2012":
        _check_manual_files(where / "downloads" / "manual")
    _check_packages()
    _download_and_prepare(name, where)
    return f"{name} is in {prepared.checked_directory(name, data_dir, splits)}."


def main(argv: Sequence[str]) -> int:
    """Prepares the dataset that the command line names, and prints where it is.

    Returns:
      The exit status: 0, or 2 after an error that the user can mend.
    """
    logging.set_verbosity(logging.ERROR)
    try:
        if len(argv) != 2:
            raise data.DataError(
                f"Name one dataset: {', '.join(data.DATASETS)}. "
                f"Got {' '.join(argv[1:]) or 'none'}."
            )
        print(prepare(argv[1], _DATA_DIR.value))
    except data.DataError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    return 0


def _check_manual_files(directory: Path) -> None:
    missing = [name for name in _MANUAL_FILES if not (directory / name).exists()]
    if missing:
        raise data.DataError(
            "ImageNet has to be fetched by hand: register at "
            "https://image-net.org/download-images, download "
            f"{' and '.join(_MANUAL_FILES)}, and put them into\n  {directory}\n"
            f"Missing there: {', '.join(missing)}."
        )


def _check_packages() -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise data.DataError(
            f"Preparing datasets needs {' and '.join(missing)}, which training does "
            'not: pip install -e ".[prepare]"'
        )


def _download_and_prepare(name: str, where: Path) -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before TensorFlow is imported
    import tensorflow_datasets as tfds  # noqa: PLC0415

    try:
        builder = tfds.builder(name, data_dir=where)
        builder.download_and_prepare(file_format=prepared.FILE_FORMAT)
    except Exception as error:  # of many types: network, disk, checksums
        raise data.DataError(
            f"TFDS cannot prepare {name}: {type(error).__name__}: {error}"
        ) from error


def _parse_flags(argv: list[str]) -> Any:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
