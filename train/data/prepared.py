"""Datasets that TFDS has prepared on disk: their place, size and records.

Nothing here downloads or writes. TFDS is imported only where it is used, because its
import is slow.
"""

import dataclasses
import functools
import itertools
import json
import os
import re
import reprlib
import shlex
from collections.abc import Iterable, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np

from train.data.errors import DataError
from train.system.paths import PathError, user_path
from train.system.text import join_names, shorten

FILE_FORMAT = "array_record"

# Package of the classes that features.json may name, and its largest size in bytes.
_FEATURES_PACKAGE = "tensorflow_datasets.core.features."
_LARGEST_FEATURES = 2**20
# Characters shown of a library's error message.
_LONGEST_REASON = 300
# Files opened at once: they may be on a remote file system.
_THREADS = 32


class EncodedExamples:
    """A sequence of the examples of a prepared dataset, each read on access.

    An example is a dictionary of the dataset's features, and its `"place"`; the image
    is left encoded. Pickling keeps only the arguments: every process opens the files
    itself.

    Args:
      directory: directory of the dataset's version.
      split: TFDS's name of the split.
      num_classes: labels are in [0, num_classes).

    Raises:
      DataError: the description of the dataset is damaged or has no such split; on
        access: the example is damaged or its label is out of range.
    """

    def __init__(self, directory: Path, split: str, num_classes: int):
        self._directory, self._split = directory, split
        self._num_classes = num_classes
        self._length = _split_info(directory, split).num_examples

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        if index >= self._length:
            raise IndexError(index)
        source = self._source
        try:
            example = source[index]
        except Exception as error:  # of many types: ArrayRecord's, TFDS's
            raise self._example_error(index, error) from error
        return self._check_example(index, example)

    def many(self, indices: Sequence[int]) -> Sequence[Any]:
        """Returns the examples at several indices, as dictionaries, in their order.

        Faster than indexing for several examples, and slower for one.
        """
        source = self._source
        try:
            examples = source.__getitems__(indices)
        except Exception as error:  # as in `__getitem__`
            raise self._example_error(indices[0], error) from error
        return list(map(self._check_example, indices, examples))

    def _check_example(self, index: int, example: Any) -> Any:
        """Returns an example with its place; checks its image and its label."""
        place = Place(self._directory, self._split, index)
        if not isinstance(example.get("image"), bytes):
            raise DataError(
                f"{place}, has no encoded image. {_remedy(self._directory)}"
            )
        given = example.get("label")
        label = np.asarray(given)
        is_whole = label.ndim == 0 and np.issubdtype(label.dtype, np.integer)
        if is_whole and 0 <= label < self._num_classes:
            return example | {"place": place}
        raise DataError(
            f"{place}, has the label {reprlib.repr(given)}, and labels are whole "
            f"numbers from 0 to {self._num_classes - 1}. {_remedy(self._directory)}"
        )

    def _example_error(self, index: int, error: Exception) -> DataError:
        return DataError(
            f"Example {index} of split {self._split!r} in {self._directory}, or one "
            f"soon after, cannot be read: {shorten(error, _LONGEST_REASON)}. "
            f"{_remedy(self._directory)}"
        )

    def __reduce__(self) -> tuple[type["EncodedExamples"], tuple[Path, str, int]]:
        return EncodedExamples, (self._directory, self._split, self._num_classes)

    @functools.cached_property
    def _source(self) -> Any:
        import tensorflow_datasets as tfds  # noqa: PLC0415

        return _builder(self._directory).as_data_source(
            self._split, decoders={"image": tfds.decode.SkipDecoding()}
        )


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of an example; its text also names the file.

    Attributes:
      directory: directory of the dataset's version.
      split: TFDS's name of the split.
      index: index of the example in the split.
    """

    directory: Path
    split: str
    index: int

    def __str__(self) -> str:
        shards = _split_info(self.directory, self.split).file_instructions
        ends = itertools.accumulate(shard.examples_in_shard for shard in shards)
        file = next(
            (
                Path(shard.filename).name
                for shard, end in zip(shards, ends, strict=True)
                if self.index < end
            ),
            "no file",
        )
        return (
            f"Example {self.index} of split {self.split!r} in {self.directory}, in "
            f"{file}"
        )


def datasets_directory(data_dir: str) -> Path:
    """Returns the directory of prepared datasets: `data_dir`, or TFDS's default.

    Raises:
      DataError: `data_dir` cannot be a path.
    """
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    try:
        return user_path(data_dir or default)
    except PathError as error:
        raise DataError(f"config.data_dir: {error}") from error


def prepare_command(name: str, directory: Path | str) -> str:
    """Returns the command line that prepares a dataset."""
    return f"python -m train.prepare {name} --data_dir={shlex.quote(str(directory))}"


def newest_version(name: str, data_dir: str) -> Path | None:
    """Returns the directory of the newest version of a dataset, `None` if missing.

    Raises:
      DataError: `data_dir` cannot be a path.
    """
    versions = {
        tuple(map(int, path.parent.name.split("."))): path.parent
        for path in (datasets_directory(data_dir) / name).glob("*/dataset_info.json")
        if re.fullmatch(r"\d+\.\d+\.\d+", path.parent.name)
    }
    return versions[max(versions)] if versions else None


def count(directory: Path, split: str) -> int:
    """Returns the number of examples of a split.

    Raises:
      DataError: the description of the dataset is damaged or has no such split.
    """
    return _split_info(directory, split).num_examples


def checked_directory(name: str, data_dir: str, splits: Iterable[str]) -> Path:
    """Returns the directory of a dataset, after checking the files of the splits.

    Raises:
      DataError: `data_dir` cannot be a path, the dataset is missing or lacks a split,
        its format has no random access, or files are missing or damaged.
    """
    directory = newest_version(name, data_dir)
    if directory is None:
        where = datasets_directory(data_dir)
        raise DataError(
            f"There is no prepared {name!r} in {where}. Prepare it with\n  "
            f"{prepare_command(name, where)}\nor set the directory that it is in."
        )
    _check_format(directory)
    for split in splits:
        _check_files(directory, split)
    return directory


def _check_format(directory: Path) -> None:
    formats = sorted(
        format_.value for format_ in _builder(directory).info.available_file_formats()
    )
    if FILE_FORMAT not in formats:
        raise DataError(
            f"The dataset in {directory} is in the format {' and '.join(formats)}, "
            f"which has no random access; {FILE_FORMAT} is needed. "
            f"{_remedy(directory)}"
        )


def _check_files(directory: Path, split: str) -> None:
    """Checks that every file of a split is there and has all of its examples."""
    from array_record.python import (  # type: ignore[import-untyped]  # noqa: PLC0415
        array_record_module,
    )

    def problem(shard: Any) -> str | None:
        path = Path(shard.filename)
        if not path.exists():
            return f"{shorten(path.name)} is missing"
        try:
            reader = array_record_module.ArrayRecordReader(str(path))
            found = reader.num_records()
            reader.close()
        except RuntimeError as error:
            return f"{shorten(path.name)} is damaged: {shorten(error, _LONGEST_REASON)}"
        if found == shard.examples_in_shard:
            return None
        return f"{path.name} has {found} of {shard.examples_in_shard} examples"

    shards = _split_info(directory, split).file_instructions
    with futures.ThreadPoolExecutor(_THREADS) as pool:
        problems = [text for text in pool.map(problem, shards) if text]
    if problems:
        more = f" (and {len(problems) - 1} more files)" if len(problems) > 1 else ""
        raise DataError(
            f"The dataset in {directory} is damaged or incomplete: {problems[0]}"
            f"{more}. {_remedy(directory)}"
        )


def _split_info(directory: Path, split: str) -> Any:
    splits = _builder(directory).info.splits
    if split not in splits:
        raise DataError(
            f"The dataset in {directory} has no split {split!r}, but "
            f"{join_names(map(repr, splits)) or 'none'}. {_remedy(directory)}"
        )
    found = splits[split]
    try:
        count, shards = found.num_examples, found.file_instructions
    except Exception as error:  # of many types, for malformed numbers
        raise _description_error(directory, error) from error
    if count <= 0 or not shards:
        raise DataError(
            f"Split {split!r} of the dataset in {directory} has no examples. "
            f"{_remedy(directory)}"
        )
    return found


@functools.cache
def _builder(directory: Path) -> Any:
    """Returns TFDS's builder of the dataset in a directory."""
    import tensorflow_datasets as tfds  # noqa: PLC0415

    try:
        _check_classes(directory)
        return tfds.builder_from_directory(directory)
    except Exception as error:  # of many types, for malformed files
        raise _description_error(directory, error) from error


def _description_error(directory: Path, error: Exception) -> DataError:
    return DataError(
        f"The description of the dataset in {directory} cannot be read: "
        f"{shorten(error, _LONGEST_REASON)}. {_remedy(directory)}"
    )


def _check_classes(directory: Path) -> None:
    """Checks that features.json names only TFDS's classes: TFDS imports them."""
    path = directory / "features.json"
    if path.stat().st_size > _LARGEST_FEATURES:
        raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes")

    def check(section: dict[str, Any]) -> dict[str, Any]:
        name = section.get("pythonClassName", _FEATURES_PACKAGE)
        if not str(name).startswith(_FEATURES_PACKAGE):
            raise ValueError(f"{path.name} names {shorten(name)}, which is not TFDS's")
        return section

    json.loads(path.read_bytes(), object_hook=check)


def _remedy(directory: Path) -> str:
    name, where = directory.parent.name, directory.parent.parent
    return f"Remove that directory and run\n  {prepare_command(name, where)}"
