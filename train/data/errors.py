"""The error about a dataset, and the place of an example in its message."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any


class DataError(ValueError):
    """A dataset cannot be prepared, read or made into batches; the message says why."""


@contextlib.contextmanager
def naming_example(example: Mapping[str, Any]) -> Iterator[None]:
    """Adds the example's `"place"`, if it has one, to a `DataError` of the body."""
    try:
        yield
    except DataError as error:
        if "place" not in example:
            raise
        raise DataError(f"{example['place']}: {error}") from error
