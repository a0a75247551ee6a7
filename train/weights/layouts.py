"""The names that files have for what this program's models have."""

from collections.abc import Iterable, Mapping

import numpy as np

from train.weights import hugging_face, layers
from train.weights.errors import WeightsError
from train.weights.tensors import HEAD, Specs, Tensor, Tensors

_OWN = ("params/", "batch_stats/")
# Of github.com/google-research/vision_transformer, which this program's ViT follows.
_GOOGLE = ("Transformer/", "embedding/")


def translate(arrays: Mapping[str, np.ndarray], specs: Specs) -> Tensors:
    """A file's arrays by the names that they have in this program's models.

    Names that its layout does not have are left as they are.

    Args:
      arrays: of the file, by name.
      specs: of the model's variables, by name.

    Raises:
      WeightsError: the layout is unknown, or an array is there twice.
    """
    tensors: Tensors = {}
    for name, tensor in _renamed(arrays, specs):
        for layer, part in layers.unstack(name, tensor):
            if layer in tensors:
                raise WeightsError(
                    f"{part.source} and {tensors[layer].source} are the same: leave "
                    "out one of them."
                )
            tensors[layer] = part
    return tensors


def _renamed(
    arrays: Mapping[str, np.ndarray], specs: Specs
) -> Iterable[tuple[str, Tensor]]:
    if any(name.startswith(_OWN) for name in arrays):
        return [(name, Tensor(name, array)) for name, array in arrays.items()]
    if any(name.startswith(_GOOGLE) for name in arrays):
        return _google(arrays)
    if hugging_face.is_layout(arrays):
        return hugging_face.translate(arrays, specs)
    names = ", ".join(sorted(arrays)[:5]) or "none"
    raise WeightsError(
        "the layout is unknown; known are Google's ViT, Hugging Face's ViT and what "
        f"this program exports. The first names are: {names}."
    )


def _google(arrays: Mapping[str, np.ndarray]) -> list[tuple[str, Tensor]]:
    """A file of Google's, without `pre_logits` and the head that reads it."""
    tensors = {
        f"params/{name}": Tensor(name, array)
        for name, array in arrays.items()
        if not name.startswith("pre_logits/")
    }
    if len(tensors) < len(arrays):
        tensors = {name: t for name, t in tensors.items() if name not in HEAD}
    return list(tensors.items())
