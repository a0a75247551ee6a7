"""Blocks of a `flax.linen` model that are computed again for the gradient."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from dropit_jax import compat
from dropit_jax.layer_presets import LayerPreset, Remat
from dropit_jax.nn.recompute import recompute


def remat(
    block: type[nn.Module], preset: LayerPreset, static_argnums: tuple[int, ...] = ()
) -> type[nn.Module]:
    """A block of a model, recomputed in the backward pass as a preset says.

    Args:
      block: a class of modules.
      preset: with `remat="none"` it is the block itself; with `"dots"` and `"blocks"`
        `flax.linen.remat` of it, which caches its inputs; with `"blocks"` and
        `eight_bit` `recomputed` of it, which caches the first one in 8 bits.
      static_argnums: which arguments of the block's call are no arrays; 0 is `self`.
    """
    if preset.remat == "none":
        return block
    if preset.remat == "blocks" and preset.eight_bit:
        return recomputed(block)  # type: ignore[arg-type]  # a class can be hashed
    return _checkpointed(block, preset.remat, static_argnums)  # type: ignore[arg-type]


@functools.cache  # one class for one class: Flax compares them
def _checkpointed(
    block: type[nn.Module], remat: Remat, static_argnums: tuple[int, ...]
) -> type[nn.Module]:
    policy = None
    if remat == "dots":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    made: Any = nn.remat(block, static_argnums=static_argnums, policy=policy)
    # Blocks without a name of their own, and so their parameters, keep their names.
    made.__name__, made.__qualname__ = block.__name__, block.__qualname__
    return made


@functools.cache  # one class for one class: Flax compares them
def recomputed(block: type[nn.Module]) -> type[nn.Module]:
    """`flax.linen.remat` of a block that caches its first input in 8 bits.

    The block's variables and random numbers are those that it has by itself, and so is
    its output. Its gradient is the exact one at what the 8 bits stand for
    (`dropit_jax.nn.recompute`).

    Args:
      block: a class of modules, whose call takes an array first. Its other arguments
        are cached as they are.

    Raises:
      ValueError: where it is called, if one of its fields holds a module.
    """
    call: Any = block.__call__

    def __call__(self: Any, x: Float[Array, "..."], *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        if self.is_initializing():
            return call(self, x, *args, **kwargs)
        leaves, structure = jax.tree.flatten((args, kwargs))
        arrays = {i: v for i, v in enumerate(leaves) if isinstance(v, jax.Array)}
        _check_fields(self)
        # Outside of the scope, which must not be reached from a function of arrays.
        plain, mutable = self.clone(parent=None), self.scope.mutable
        # How many random numbers the block has drawn, so that it goes on from there.
        before, after = _copied(compat.flax_counters(self.scope)), {}

        def counted(module: Any, *args: Any, **kwargs: Any) -> Any:
            compat.set_flax_counters(module.scope, _copied(before))
            out = call(module, *args, **kwargs)
            after.update(_copied(compat.flax_counters(module.scope)))
            return out

        def run(
            x: Array, variables: Any, rngs: Any, arrays: dict[int, Array]
        ) -> tuple[Any, Any]:
            every = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
            args, kwargs = jax.tree.unflatten(structure, every)
            out = plain.apply(
                variables,
                x,
                *args,
                rngs=rngs,
                mutable=mutable,
                method=counted,
                **kwargs,
            )
            return (out, {}) if mutable is False else out

        rngs = dict(self.scope.rngs)
        out, updates = recompute(run, x, self.variables, rngs, arrays)
        compat.flax_counters(self.scope).update(after)
        for collection, values in updates.items():
            for name, value in values.items():
                self.put_variable(collection, name, value)
        return out

    namespace = {"__call__": __call__, "__module__": block.__module__}
    return type(block.__name__, (block,), namespace)


def _copied(counters: dict[Any, Any]) -> dict[Any, Any]:
    # Not `copy.deepcopy`: keys are compared by identity.
    return {k: _copied(v) if isinstance(v, dict) else v for k, v in counters.items()}


def _check_fields(block: Any) -> None:
    for field in dataclasses.fields(block):
        value = None if field.name == "parent" else getattr(block, field.name, None)
        leaves = jax.tree.leaves(value, is_leaf=lambda v: isinstance(v, nn.Module))
        if any(isinstance(leaf, nn.Module) for leaf in leaves):
            raise ValueError(
                f"{type(block).__name__}.{field.name} holds a module, whose variables "
                "are not the block's: a block cannot be recomputed from 8 bits then. "
                "Make the module inside of the block, or take a preset that recomputes "
                "blocks from exact inputs."
            )
