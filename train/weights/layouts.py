"""Translates the names of a file's layout to those of this program's models."""

from collections.abc import Iterable, Mapping

from train.system import text
from train.weights import hugging_face, layers
from train.weights.errors import WeightsError
from train.weights.tensors import HEAD, LazyArray, Specs, Tensors

_OWN = ("params/", "batch_stats/")
# As in github.com/google-research/vision_transformer, whose names the ViT here has.
_GOOGLE = ("Transformer/", "embedding/")


def translate(content: Mapping[str, LazyArray], specs: Specs) -> Tensors:
    """Returns a file's tensors by their names in this program's models.

    A name that is not of the file's layout is left as it is.

    Args:
      content: tensors of the file, by name.
      specs: shapes and dtypes of the model's variables, by name.

    Raises:
      WeightsError: the layout is unknown, or two tensors get the same name.
    """
    tensors: Tensors = {}
    for name, tensor in _renamed(content, specs):
        for layer, part in layers.unstack(name, tensor, len(specs)):
            if layer in tensors:
                raise WeightsError(
                    f"{text.shorten(part.source)} and "
                    f"{text.shorten(tensors[layer].source)} are the same: leave out "
                    "one of them."
                )
            tensors[layer] = part
    return tensors


def _renamed(
    content: Mapping[str, LazyArray], specs: Specs
) -> Iterable[tuple[str, LazyArray]]:
    if any(name.startswith(_OWN) for name in content):
        return content.items()
    if any(name.startswith(_GOOGLE) for name in content):
        return _translate_google(content)
    if hugging_face.is_layout(content):
        return hugging_face.translate(content, specs)
    names = text.join_names(sorted(content)) or "none"
    raise WeightsError(
        "the layout is unknown; known are Google's ViT, Hugging Face's ViT and what "
        f"this program exports. The first names are: {names}."
    )


def _translate_google(content: Mapping[str, LazyArray]) -> list[tuple[str, LazyArray]]:
    """Translates Google's names; leaves out `pre_logits` and a head that reads it."""
    tensors = {
        f"params/{name}": tensor
        for name, tensor in content.items()
        if not name.startswith("pre_logits/")
    }
    if len(tensors) < len(content):
        tensors = {name: t for name, t in tensors.items() if name not in HEAD}
    return list(tensors.items())
