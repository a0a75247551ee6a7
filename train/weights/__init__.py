"""Weights from files, and to files.

`load` gives a model the weights of a file, `save` writes those of a model. Both take
the model's variables, and neither knows the model.
"""

from train.weights.errors import WeightsError
from train.weights.files import check_path, save
from train.weights.loading import load

__all__ = ["WeightsError", "check_path", "load", "save"]
