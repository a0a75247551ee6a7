"""Compares the arrays of a checkpoint with the arrays of a model."""

from pathlib import Path
from typing import Any

import jax

from train.system import text
from train.system.disk import CheckpointError


def check(path: Path, found: Any, wanted: Any) -> None:
    """Checks that a checkpoint has the model's arrays and empty containers.

    Args:
      path: the path of the checkpoint, for the error message.
      found: a pytree with the shapes of the checkpoint.
      wanted: a pytree with the shapes of the model.

    Raises:
      CheckpointError: the names or shapes differ.
    """
    saved, own = _shapes(found), _shapes(wanted)
    lines = [
        f"{text.shorten(name)}: {saved.get(name, 'absent')} in the checkpoint, "
        f"{own.get(name, 'absent')} in the model"
        for name in sorted(saved | own)
        if saved.get(name) != own.get(name)
    ]
    if lines:
        raise CheckpointError(
            f"The checkpoint {path} is of another model: {len(lines)} arrays differ."
            f"{text.join_lines(lines)}"
        )


def _shapes(tree: Any) -> dict[str, tuple[int, ...] | str]:
    """Returns the shape of each leaf, and "empty" for each empty container, by path.

    `{"a": zeros((2, 3)), "b": ()}` -> `{"a": (2, 3), "b": "empty"}`.
    """
    # Orbax requires the same empty containers, too, whatever their type.
    flat, _ = jax.tree_util.tree_flatten_with_path(
        tree,
        is_leaf=lambda node: (
            not jax.tree_util.treedef_children(jax.tree.structure(node))
        ),
    )
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            tuple(node.shape) if jax.tree.leaves(node) else "empty"
        )
        for path, node in flat
    }
