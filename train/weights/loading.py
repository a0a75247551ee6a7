"""Loads a model's variables from a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from train.system import text
from train.system.paths import PathError, user_path
from train.weights import files, layers, layouts
from train.weights.errors import WeightsError
from train.weights.positions import are_square, resize
from train.weights.tensors import CLS, HEAD, POSITIONS, LazyArray, Specs, Tensors, zeros


def load(path: str | Path, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns variables with the values of a file.

    The file is .npz or .safetensors; its names tell which of three layouts it has:

    * Google's ViT (github.com/google-research/vision_transformer), such as
      "Transformer/encoderblock_0/LayerNorm_0/scale".
    * Hugging Face's ViT (`ViTForImageClassification` or `ViTModel` of transformers),
      such as "vit.encoder.layer.0.layernorm_before.weight". The model gives the number
      of heads. Logits differ a little from Hugging Face's, because this program's
      models, as Google's, have the tanh approximation of GELU, where Hugging Face's
      "gelu" is exact (erf), and 1e-6 as epsilon of the norms, where it has 1e-12.
    * The layout that `save` writes, of any model.

    Each variable takes the array of its name, in the variable's dtype, with these
    exceptions:

    * The head stays as given if the file has no head, or one of another number of
      classes. A head that reads `pre_logits`, in a Google file, counts as none: this
      program's models have no such layer, and Google's fine-tuning drops it as well.
    * Hugging Face's `pooler` and `mask_token` are left out.
    * The class token and its position are left out for a model without class token.
    * Position embeddings of another square grid are interpolated by `resize`. Those of
      the same number of positions are taken as they are.
    * Stacked parameters of scanned blocks take those of separate blocks, and the
      reverse.

    Args:
      path: path of the file.
      variables: the model's variables, nested dicts of arrays or of
        `jax.ShapeDtypeStruct`s: "params", and "batch_stats" if the model has them.

    Returns:
      Nested dicts of the same structure. A variable from the file is a NumPy array of
      the variable's shape and dtype; a head that stays is the given leaf.

    Raises:
      WeightsError: the file does not exist, cannot be read or has an unknown layout;
        or, listed in the message, an array is only in the file or only in the model,
        its shape differs, its dtype differs and not both are floating-point, or a value
        is not finite in the model's dtype.
    """
    flat = traverse_util.flatten_dict(variables, keep_empty_nodes=True, sep="/")
    specs = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for name, leaf in flat.items()
        if leaf is not traverse_util.empty_node
    }
    try:
        file = user_path(str(path))
    except PathError as error:
        raise WeightsError(str(error)) from error
    arrays = _read(file, layers.unstack_specs(specs))
    return traverse_util.unflatten_dict(flat | layers.stack(arrays, specs), sep="/")


def _read(path: Path, specs: Specs) -> dict[str, np.ndarray]:
    content = files.read(path)
    try:
        return _values_for(layouts.translate(content, specs), specs)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error


def _values_for(tensors: Tensors, specs: Specs) -> dict[str, np.ndarray]:
    """Returns the values of the model's variables, without a head that stays as given.

    Raises:
      WeightsError: arrays and variables do not fit, or a value is not finite.
    """
    if _head_stays(tensors, specs):
        tensors = {k: v for k, v in tensors.items() if k not in HEAD}
        specs = {k: v for k, v in specs.items() if k not in HEAD}
    tensors = _fit_tokens(tensors, specs)
    lines = [
        line
        for name in tensors | specs
        if (line := _difference(name, tensors.get(name), specs.get(name)))
    ]
    if lines:
        raise WeightsError(_mismatch_message(lines))
    taken = {
        # In the order of the file's names: blocks of one stacked array are read once.
        name: _values(tensors[name], specs[name].dtype)
        for name in sorted(specs, key=lambda name: tensors[name].source)
    }
    lines = [
        f"{_names_of(name, tensors[name])}: {bad} of {array.size} values"
        for name, array in taken.items()
        if (bad := np.count_nonzero(~np.isfinite(array)))
    ]
    if lines:
        raise WeightsError(
            f"{len(lines)} arrays have values that are infinite or NaN in the model's "
            f"type: name another file.{text.join_lines(lines)}"
        )
    return taken


def _values(tensor: LazyArray, dtype: Any) -> np.ndarray:
    """Reads values as `dtype`; values out of its range become infinite."""
    with np.errstate(over="ignore"):
        return np.asarray(tensor.read(), dtype)


def _head_stays(tensors: Tensors, specs: Specs) -> bool:
    """Returns whether the model's head stays as given.

    It does if the file has no head, or one that differs only in the number of classes.
    Returns false for a model without a head.
    """
    if not all(name in specs for name in HEAD):
        return False
    found = [tensors[name].shape for name in HEAD if name in tensors]
    if len(found) < len(HEAD):
        return not found
    wanted = [specs[name].shape for name in HEAD]
    return all(
        len(a) == len(b) and a[:-1] == b[:-1] and a[-1] != b[-1]
        for a, b in zip(found, wanted, strict=True)
    )


def _fit_tokens(tensors: Tensors, specs: Specs) -> Tensors:
    """Drops a class token that the model lacks, and resizes position embeddings."""
    dropped = CLS in tensors and CLS not in specs
    tensors = {k: v for k, v in tensors.items() if not dropped or k != CLS}
    positions, wanted = tensors.get(POSITIONS), specs.get(POSITIONS)
    if positions is None or wanted is None:
        return tensors
    if not _is_convertible(positions.dtype, wanted.dtype):
        return tensors
    shape = positions.shape
    if len(shape) != 3 or shape[::2] != wanted.shape[::2]:
        return tensors
    if dropped:
        positions = positions.map(lambda array: array[:, 1:])
    if positions.like.nbytes > sum(_bytes(spec) for spec in specs.values()):
        return tensors  # larger than the whole model: left for `_difference`
    return tensors | {
        POSITIONS: _resize_positions(positions, wanted.shape, CLS in tensors)
    }


def _bytes(spec: jax.ShapeDtypeStruct) -> int:
    return spec.size * spec.dtype.itemsize


def _resize_positions(
    positions: LazyArray, shape: tuple[int, ...], has_token: bool
) -> LazyArray:
    """Interpolates position embeddings of another square grid.

    For a class token and a grid of 3 x 3, `(1, 1 + 9, width) -> (1, 1 + 16, width)`.
    Returns other embeddings as they are.
    """
    old, new = positions.shape[1], shape[1]
    if old == new or not are_square(old - has_token, new - has_token):
        return positions
    return LazyArray(
        positions.source,
        zeros(shape, np.float64),
        lambda: resize(positions.read(), new, int(has_token)),
    )


def _difference(
    name: str, tensor: LazyArray | None, spec: jax.ShapeDtypeStruct | None
) -> str | None:
    """Returns how tensor and variable of a name differ, `None` if they fit."""
    if spec is None:
        assert tensor is not None
        return f"{text.shorten(tensor.source)} {tensor.shape}: in the file alone"
    if tensor is None:
        return f"{name} {spec.shape}: in the model alone"
    where = _names_of(name, tensor)
    if not _is_convertible(tensor.dtype, spec.dtype):
        return f"{where}: {tensor.dtype} in the file, {spec.dtype} in the model"
    if tensor.shape != spec.shape:
        hint = "; only square grids are interpolated" if name == POSITIONS else ""
        return f"{where}: {tensor.shape} in the file, {spec.shape} in the model{hint}"
    return None


def _names_of(name: str, tensor: LazyArray) -> str:
    source = text.shorten(tensor.source)
    return source if tensor.source == name else f"{source} ({name})"


def _is_convertible(source: np.dtype[Any], target: np.dtype[Any]) -> bool:
    """Returns whether the dtypes are the same, or both floating-point."""
    both = (jnp.issubdtype(dtype, jnp.floating) for dtype in (source, target))
    return source == target or all(both)


def _mismatch_message(lines: list[str]) -> str:
    return (
        f"{len(lines)} arrays do not fit. Configure the model that the file is of, or "
        f"name another file.{text.join_lines(lines)}"
    )
