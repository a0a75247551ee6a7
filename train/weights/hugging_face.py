"""Names and layout of Hugging Face's ViT (transformers, models/vit/modeling_vit.py)."""

import functools
import re
from collections.abc import Iterable, Iterator, Mapping

import jax
import numpy as np

from train.weights.tensors import Specs, Tensor

# `ViTForImageClassification` has it, `ViTModel` does not.
_PREFIX = "vit."
_WHOLE = {
    "embeddings.cls_token": "cls",
    "embeddings.position_embeddings": "Transformer/posembed_input/pos_embedding",
}
# Of these, and of those in a layer, the file has a weight and a bias.
_OUTSIDE = {
    "embeddings.patch_embeddings.projection": "embedding",
    "layernorm": "Transformer/encoder_norm",
    "classifier": "head",
}
_ATTENTION = "MultiHeadDotProductAttention_1"
_IN_LAYER = {
    "layernorm_before": "LayerNorm_0",
    "attention.attention.query": f"{_ATTENTION}/query",
    "attention.attention.key": f"{_ATTENTION}/key",
    "attention.attention.value": f"{_ATTENTION}/value",
    "attention.output.dense": f"{_ATTENTION}/out",
    "layernorm_after": "LayerNorm_2",
    "intermediate.dense": "MlpBlock_3/Dense_0",
    "output.dense": "MlpBlock_3/Dense_1",
}
# A layer that classifiers do not have, and one for pre-training.
_DROPPED = re.compile(r"(pooler\.dense\.(weight|bias)|embeddings\.mask_token)")
_LAYER = re.compile(r"encoder\.layer\.(\d{1,4})\.(.+)")


def is_layout(names: Iterable[str]) -> bool:
    """Whether the names of a file are Hugging Face's."""
    starts = ("embeddings.", "encoder.layer.")
    return any(name.removeprefix(_PREFIX).startswith(starts) for name in names)


def translate(
    tensors: Mapping[str, Tensor], specs: Specs
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of this program's ViT.

    Kernels have the input before the output, and the heads of the attention are axes
    of their own. How many there are is the model's to say: the file does not.

    Args:
      tensors: of the file, by name.
      specs: of the model's variables, by name.

    Yields:
      The tensors. Names that `ViTForImageClassification` and `ViTModel` do not
      have are as they were.
    """
    for source, tensor in tensors.items():
        name = source.removeprefix(_PREFIX)
        if _DROPPED.fullmatch(name):
            continue
        target = _target(name)
        if target is None:
            yield source, tensor
            continue
        layout = functools.partial(_laid_out, target=target, spec=specs.get(target))
        yield target, tensor.map(layout)


def _target(name: str) -> str | None:
    if name in _WHOLE:
        return f"params/{_WHOLE[name]}"
    layer, _, kind = name.rpartition(".")
    inside = _LAYER.fullmatch(layer)
    if inside is None:
        module = _OUTSIDE.get(layer)
    else:
        number, rest = inside.groups()
        module = _IN_LAYER.get(rest)
        module = module and f"Transformer/encoderblock_{int(number)}/{module}"
    if module is None or kind not in ("weight", "bias"):
        return None
    if kind == "weight":
        kind = "scale" if re.search("LayerNorm_|_norm", module) else "kernel"
    return f"params/{module}/{kind}"


def _laid_out(
    array: np.ndarray, target: str, spec: jax.ShapeDtypeStruct | None
) -> np.ndarray:
    if target.endswith("/kernel"):
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    if spec is None or _ATTENTION not in target:
        return array
    return _with_heads(array, target, spec.shape)


def _with_heads(array: np.ndarray, target: str, shape: tuple[int, ...]) -> np.ndarray:
    """The array with its heads apart, or as it is where they do not fit."""
    if target.endswith("/out/bias"):
        return array
    # The heads are the output of queries, keys and values, and the input of the last.
    first = 0 if "/out/" in target else len(shape) - 2
    if first < 0:
        return array
    heads, features = shape[first : first + 2]
    joined = (*shape[:first], heads * features, *shape[first + 2 :])
    return array.reshape(shape) if array.shape == joined else array
