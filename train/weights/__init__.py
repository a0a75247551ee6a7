"""Reads and writes files of weights.

`load` returns a model's variables with the values of a file; `save` writes variables to
a file. Both take the model's variables, and do not depend on the model.
"""

from train.weights.errors import WeightsError
from train.weights.files import check_path, save
from train.weights.loading import load

__all__ = ["WeightsError", "check_path", "load", "save"]
