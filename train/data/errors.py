"""What can be wrong with a dataset."""


class DataError(ValueError):
    """A dataset that cannot be read, why, and what to do about it."""
