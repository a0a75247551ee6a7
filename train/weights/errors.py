"""What can go wrong with weights."""


class WeightsError(ValueError):
    """A file of weights that cannot be used, or written, and why."""
