"""A model's variables from a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from train.system import text
from train.system.paths import PathError, named
from train.weights import files, layers, layouts
from train.weights.errors import WeightsError
from train.weights.positions import are_square, resize
from train.weights.tensors import CLS, HEAD, POSITIONS, Specs, Tensor, Tensors, zeros


def load(path: str | Path, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Variables with the values of a file.

    The file is .npz or .safetensors; its names say which of three layouts it has:

    * Google's ViT (github.com/google-research/vision_transformer), such as
      "Transformer/encoderblock_0/LayerNorm_0/scale".
    * Hugging Face's ViT (`ViTForImageClassification` or `ViTModel` of transformers),
      such as "vit.encoder.layer.0.layernorm_before.weight". Two things are not the
      weights', and this program's models have them as Google's do: GELU is the tanh
      approximation, where Hugging Face's "gelu" is exact, by erf; and the norms'
      epsilon is 1e-6, where it is 1e-12. So logits differ a little. How many heads
      there are is the model's to say.
    * What `save` writes, of any model.

    Each variable takes the array of its name, in the variable's dtype, with these
    exceptions:

    * The head stays as it is where the file's has another number of classes, or where
      the file has none. That of a Google file with `pre_logits` counts as none, since
      it reads that layer, which this program's models do not have, and which Google's
      fine-tuning drops as well.
    * Hugging Face's `pooler` and `mask_token` are left out.
    * The class token and its position are left out for a model without one.
    * Position embeddings of another square grid are interpolated, as in `resize`. Those
      of as many positions are taken as they are.
    * Scanned blocks, which are stacked, take those of a file in which they are apart,
      and the other way round.

    Args:
      path: of the file.
      variables: the model's, nested dicts of arrays or `jax.ShapeDtypeStruct`s:
        "params", and "batch_stats" if it has them.

    Returns:
      Nested dicts of the same structure. What comes from the file is a NumPy array of
      the variable's shape and dtype; what stays is the leaf that was given.

    Raises:
      WeightsError: the file does not exist, cannot be read or has an unknown layout; or
        a name or a shape, of the file or of the model, has no counterpart, one is of
        integers where the other is not, or a value is not finite in the model's type;
        the message lists them.
    """
    flat = traverse_util.flatten_dict(variables, keep_empty_nodes=True, sep="/")
    specs = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for name, leaf in flat.items()
        if leaf is not traverse_util.empty_node
    }
    try:
        file = named(str(path))
    except PathError as error:
        raise WeightsError(str(error)) from error
    arrays = _arrays(file, layers.unstack_specs(specs))
    return traverse_util.unflatten_dict(flat | layers.stack(arrays, specs), sep="/")


def _arrays(path: Path, specs: Specs) -> dict[str, np.ndarray]:
    content = files.read(path)
    try:
        return _taken(layouts.translate(content, specs), specs)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error


def _taken(tensors: Tensors, specs: Specs) -> dict[str, np.ndarray]:
    """Returns the file's values for the model, without a head that stays."""
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
        raise WeightsError(_summary(lines))
    taken = {
        # By the name in the file, which has the blocks of a stack in one array.
        name: _values(tensors[name], specs[name].dtype)
        for name in sorted(specs, key=lambda name: tensors[name].source)
    }
    lines = [
        f"{_where(name, tensors[name])}: {bad} of {array.size} values"
        for name, array in taken.items()
        if (bad := np.count_nonzero(~np.isfinite(array)))
    ]
    if lines:
        raise WeightsError(
            f"{len(lines)} arrays have values that are infinite or NaN in the model's "
            f"type: name another file.{text.lines(lines)}"
        )
    return taken


def _values(tensor: Tensor, dtype: Any) -> np.ndarray:
    """A tensor's values in a type; those beyond it become infinite."""
    with np.errstate(over="ignore"):
        return np.asarray(tensor.read(), dtype)


def _head_stays(tensors: Tensors, specs: Specs) -> bool:
    """Whether the file has no head, or one of another number of classes."""
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
    """With no class token where the model has none, and with its positions."""
    dropped = CLS in tensors and CLS not in specs
    tensors = {k: v for k, v in tensors.items() if not dropped or k != CLS}
    positions, wanted = tensors.get(POSITIONS), specs.get(POSITIONS)
    if positions is None or wanted is None:
        return tensors
    if not _converts(positions.dtype, wanted.dtype):
        return tensors
    shape = positions.shape
    if len(shape) != 3 or shape[::2] != wanted.shape[::2]:
        return tensors
    if dropped:
        positions = positions.map(lambda array: array[:, 1:])
    if positions.like.nbytes > sum(_bytes(spec) for spec in specs.values()):
        return tensors  # of no grid that this model was trained on
    return tensors | {POSITIONS: _resized(positions, wanted.shape, CLS in tensors)}


def _bytes(spec: jax.ShapeDtypeStruct) -> int:
    return spec.size * spec.dtype.itemsize


def _resized(positions: Tensor, shape: tuple[int, ...], has_token: bool) -> Tensor:
    """Positions of another square grid interpolated, others as they are."""
    old, new = positions.shape[1], shape[1]
    if old == new or not are_square(old - has_token, new - has_token):
        return positions
    return Tensor(
        positions.source,
        zeros(shape, np.float64),
        lambda: resize(positions.read(), new, int(has_token)),
    )


def _difference(
    name: str, tensor: Tensor | None, spec: jax.ShapeDtypeStruct | None
) -> str | None:
    if spec is None:
        assert tensor is not None
        return f"{text.shown(tensor.source)} {tensor.shape}: in the file alone"
    if tensor is None:
        return f"{name} {spec.shape}: in the model alone"
    where = _where(name, tensor)
    if not _converts(tensor.dtype, spec.dtype):
        return f"{where}: {tensor.dtype} in the file, {spec.dtype} in the model"
    if tensor.shape != spec.shape:
        hint = "; only square grids are interpolated" if name == POSITIONS else ""
        return f"{where}: {tensor.shape} in the file, {spec.shape} in the model{hint}"
    return None


def _where(name: str, tensor: Tensor) -> str:
    source = text.shown(tensor.source)
    return source if tensor.source == name else f"{source} ({name})"


def _converts(source: np.dtype[Any], target: np.dtype[Any]) -> bool:
    """Whether they are the same, or both floating-point."""
    both = (jnp.issubdtype(dtype, jnp.floating) for dtype in (source, target))
    return source == target or all(both)


def _summary(lines: list[str]) -> str:
    return (
        f"{len(lines)} arrays do not fit. Configure the model that the file is of, or "
        f"name another file.{text.lines(lines)}"
    )
