"""Translates Hugging Face's ViT (transformers, models/vit/modeling_vit.py)."""

import functools
import re
from collections.abc import Iterable, Iterator, Mapping

import jax
import numpy as np

from train.weights.tensors import LazyArray, Specs

# Names of `ViTForImageClassification` start with it, those of `ViTModel` do not.
_PREFIX = "vit."
# Parameters of their own, without "weight" or "bias".
_PARAMETERS = {
    "embeddings.cls_token": "cls",
    "embeddings.position_embeddings": "Transformer/posembed_input/pos_embedding",
}
# Modules with a weight and a bias: outside the encoder's layers, and in each layer.
_MODULES = {
    "embeddings.patch_embeddings.projection": "embedding",
    "layernorm": "Transformer/encoder_norm",
    "classifier": "head",
}
_ATTENTION = "MultiHeadDotProductAttention_1"
_LAYER_MODULES = {
    "layernorm_before": "LayerNorm_0",
    "attention.attention.query": f"{_ATTENTION}/query",
    "attention.attention.key": f"{_ATTENTION}/key",
    "attention.attention.value": f"{_ATTENTION}/value",
    "attention.output.dense": f"{_ATTENTION}/out",
    "layernorm_after": "LayerNorm_2",
    "intermediate.dense": "MlpBlock_3/Dense_0",
    "output.dense": "MlpBlock_3/Dense_1",
}
# `ViTModel`'s pooler, which classifiers do not have, and the token for pre-training.
_IGNORED = re.compile(r"(pooler\.dense\.(weight|bias)|embeddings\.mask_token)")
_LAYER = re.compile(r"encoder\.layer\.(\d{1,4})\.(.+)")


def is_layout(names: Iterable[str]) -> bool:
    """Returns whether the names of a file are Hugging Face's."""
    starts = ("embeddings.", "encoder.layer.")
    return any(name.removeprefix(_PREFIX).startswith(starts) for name in names)


def translate(
    tensors: Mapping[str, LazyArray], specs: Specs
) -> Iterator[tuple[str, LazyArray]]:
    """Translates tensors to the names and layouts of this program's ViT.

    Kernels get their input axes before their output axes, `(out, in) -> (in, out)` and
    `(out, in, h, w) -> (h, w, in, out)`. The heads of attention get an axis of their
    own; the model gives their number, since the file does not.

    Args:
      tensors: tensors of the file, by name.
      specs: shapes and dtypes of the model's variables, by name.

    Yields:
      Names and tensors. A name that `ViTForImageClassification` and `ViTModel` do not
      have is left as it is.
    """
    for source, tensor in tensors.items():
        name = source.removeprefix(_PREFIX)
        if _IGNORED.fullmatch(name):
            continue
        target = _target(name)
        if target is None:
            yield source, tensor
            continue
        layout = functools.partial(_converted, target=target, spec=specs.get(target))
        yield target, tensor.map(layout)


def _target(name: str) -> str | None:
    """Returns the name in this program's ViT, `None` for an unknown name."""
    if name in _PARAMETERS:
        return f"params/{_PARAMETERS[name]}"
    layer, _, kind = name.rpartition(".")
    match = _LAYER.fullmatch(layer)
    if match is None:
        module = _MODULES.get(layer)
    else:
        number, rest = match.groups()
        module = _LAYER_MODULES.get(rest)
        module = module and f"Transformer/encoderblock_{int(number)}/{module}"
    if module is None or kind not in ("weight", "bias"):
        return None
    if kind == "weight":
        kind = "scale" if re.search("LayerNorm_|_norm", module) else "kernel"
    return f"params/{module}/{kind}"


def _converted(
    array: np.ndarray, target: str, spec: jax.ShapeDtypeStruct | None
) -> np.ndarray:
    if target.endswith("/kernel"):
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    if spec is None or _ATTENTION not in target:
        return array
    return _split_heads(array, target, spec.shape)


def _split_heads(array: np.ndarray, target: str, shape: tuple[int, ...]) -> np.ndarray:
    """Splits the axis of heads, unless the model's shape does not fit.

    Of query, key and value: `(width, heads * size) -> (width, heads, size)`; of the
    output projection: `(heads * size, width) -> (heads, size, width)`.
    """
    if target.endswith("/out/bias"):
        return array
    first = 0 if "/out/" in target else len(shape) - 2
    if first < 0:
        return array
    heads, features = shape[first : first + 2]
    joined = (*shape[:first], heads * features, *shape[first + 2 :])
    return array.reshape(shape) if array.shape == joined else array
