"""The error of a file of weights."""


class WeightsError(ValueError):
    """A file of weights cannot be used or written; the message says why."""
