"""The error of a dataset, and of an example by its place."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any


class DataError(ValueError):
    """A dataset that cannot be read, why, and what to do about it."""


@contextlib.contextmanager
def of_example(example: Mapping[str, Any]) -> Iterator[None]:
    """Names the example, in its `"place"`, in an error of what is made of it."""
    try:
        yield
    except DataError as error:
        if "place" not in example:
            raise
        raise DataError(f"{example['place']}: {error}") from error
