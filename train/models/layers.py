"""The layers and functions of which models are built: Flax's or DropIT's."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import flax.linen as nn
import jax

import dropit_jax
from dropit_jax import DropIT

Remat = Literal["none", "blocks", "dots"]
REMATS: tuple[Remat, ...] = get_args(Remat)


@dataclasses.dataclass(frozen=True)
class Layers:
    """The layers and functions of which a model is built.

    Each takes the arguments of its counterpart in `flax.linen`.

    Attributes:
      dense: makes a dense layer.
      conv: makes a convolution.
      attention: makes a multi-head attention.
      head: makes the dense layer that returns the logits.
      relu: the rectified linear unit, a function of an array.
    """

    dense: Callable[..., nn.Module] = nn.Dense
    conv: Callable[..., nn.Module] = nn.Conv
    attention: Callable[..., nn.Module] = nn.MultiHeadDotProductAttention
    head: Callable[..., nn.Module] = nn.Dense
    relu: Callable[..., Any] = nn.relu


FLAX = Layers()


@functools.cache  # Flax compares the fields of modules; functions by identity
def dropit(policy: DropIT) -> Layers:
    """Returns the layers of `dropit_jax.linen` with a policy, and a one-bit ReLU.

    The head always has `fill="zero"`: its input, one vector a sample, has no positions
    over which to compute a mean.
    """

    def layer(kind: Callable[..., nn.Module], policy: DropIT = policy) -> Any:
        return functools.partial(kind, dropit=policy)

    linen = dropit_jax.linen
    return Layers(
        dense=layer(linen.Dense),
        conv=layer(linen.Conv),
        attention=layer(linen.MultiHeadDotProductAttention),
        head=layer(linen.Dense, dataclasses.replace(policy, fill="zero")),
        relu=dropit_jax.nn.relu,
    )


def remat(kind: Any, how: Remat, static_argnums: tuple[int, ...] = (2,)) -> Any:
    """Returns a block that the backward pass recomputes, entirely or partly.

    Args:
      kind: a class of modules whose call takes `(self, x, train, ...)`, or a function
        of a module.
      how: "none": returns the block unchanged; "blocks": recomputes the whole block;
        "dots": recomputes all but the outputs of matrix products with parameters;
        convolutions are recomputed.
      static_argnums: the arguments of the call that are no arrays; 0 is `self`.
    """
    if how == "none":
        return kind
    policy = None
    if how == "dots":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return nn.remat(kind, static_argnums=static_argnums, policy=policy)
